"""Live a day: write its rows, go through its door, and see which laws hold."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

from days import laws
from days.day import Day, rows_of
from days.doors import Outcome, batches, command, ledger_of, script
from days.families import FAMILIES, POSITIONS, model_folder, tokenizer_of
from days.files import ARROW, DELIMITED, columns_of, options_of, save
from days.laws import Findings, Seen
from days.live_labels import LABEL_DOORS, LabelDay, after_training
from days.oracle import Expected, expected
from days.prepared import MASKS, sample_of, spoil
from days.rows import Drawn


class TextDay:
    """A day of texts: its rows, its file, and what the template makes of them."""

    def __init__(self, one: Day, folder: Path, drawn: Drawn | None = None) -> None:
        self.day, self.folder, self.seen = one, folder, Seen()
        self.hold = self.seen.hold
        self.tokenizer, self.drawn = tokenizer_of(one.family), drawn or rows_of(one)
        arrow = one.file in ARROW
        self.expected: list[Expected | None] = [
            expected(row, one.kind, self.tokenizer, arrow=arrow) for row in self.drawn.rows
        ]
        asked = [{"role": role, "content": "A word?"} for role in ("user", "assistant")]
        self.simple = expected({"messages": asked}, "chat", self.tokenizer)
        self.source = save(one.file, folder, self.drawn.rows)
        self.rng = random.Random(f"{one.number} door")
        self.model = model_folder(one.family)
        self.task = ("--set", "task.type=" + ("preference" if "pair" in one.kind else "causal-lm"))
        self.limit: tuple[object, ...] = () if one.limit == POSITIONS else ("--set", f"data.max_length={one.limit}")

    @property
    def clean(self) -> bool:
        """Whether the template renders all rows, and none is longer than the limit."""
        if self.drawn.planted:
            return False
        return all(
            one is None or not (one.refusal or one.lost or len(one.ids) > self.day.limit - 3) for one in self.expected
        )

    def ended(self, outcome: Outcome) -> bool:
        """Whether a command went through; it may be refused only where rows are not clean."""
        self.seen.codes.append(outcome.code)
        self.hold(laws.no_traceback(outcome), laws.refusal_is_sound(outcome, of_rows=False))
        if outcome.refusal and self.clean:
            self.seen.broken.append(f"clean rows are refused: {outcome.refusal}")
        return outcome.code == 0 and not outcome.trace

    def audit(self, *further: object, out: str = "audit") -> Outcome:
        """Audit the file, and hold the laws of its ledger."""
        out_folder = self.folder / out
        options = () if "--all" in further else ("--no-model",)
        if self.drawn.evaluation and self.day.fault == "leak":
            evaluation = save(self.day.file, _new(self.folder / "evaluation"), self.drawn.evaluation)
            further = (*further, "--eval", evaluation)
        options = (*options, *self.limit, *options_of(self.day.file), *further)
        outcome = command("audit", self.source, "--model", self.model, *options, "--out", out_folder)
        if self.ended(outcome):
            self.ledger(out_folder, outcome)
        return outcome

    def ledger(self, out: Path, outcome: Outcome) -> None:
        lines, limit, drawn, findings = ledger_of(out), self.day.limit, self.drawn, self.record(out, outcome)
        self.hold(
            laws.rows_out_are_rows_in(lines, len(drawn.rows)),
            laws.clean_rows_have_no_finding(lines, findings, self.expected, drawn.planted, limit, self.simple),
            laws.refusals_are_the_templates(lines, findings, self.expected),
            laws.lost_content_is_said(lines, findings, self.expected),
            laws.planted_faults_are_named(lines, findings, drawn.planted),
            laws.counts_are_the_templates(lines, self.expected, limit, drawn.planted),
        )
        self.seen.unlucky += laws.no_skill_accuses_nobody(findings)
        self.seen.unlucky += laws.no_recall_without_skill(json.dumps(outcome.result.get("answers") or {}))

    def record(self, out: Path, outcome: Outcome) -> Findings:
        """Keep what a user relies on, and return the findings by name."""
        findings: Findings = {one["name"]: one for one in outcome.result["findings"]}
        self.seen.findings = {name: [one["severity"], sorted(one["places"])] for name, one in sorted(findings.items())}
        self.seen.reasons = {str(line["row"]): line["fate"] for line in ledger_of(out) if line["fate"] != "trained"}
        return findings

    def train_options(self, steps: int) -> list[object]:
        held_out = save("jsonl", _new(self.folder / "held out"), self.drawn.evaluation)
        settings = {
            "data.validation": held_out,
            "quality.enabled": "false",
            "quality.fraction": 1,
            "training.batch_size": 8,
            "training.max_steps": steps,
            "training.eval_strategy": "no",
            **({} if self.day.limit == POSITIONS else {"data.max_length": self.day.limit}),
        }
        options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return [*self.task, *options_of(self.day.file), *options]

    def generation(self) -> tuple[object, ...]:
        return ("--set", "task.max_new_tokens=2")

    def run(self) -> None:
        """Train, predict, export, and ask the doctor."""
        run, options = self.folder / "run", self.train_options(2)
        outcome = command("train", "--model", self.model, "--data", self.source, *options, "--out", run)
        if self.ended(outcome):
            after_training(self, run, self.source, len(self.drawn.rows))

    def train(self) -> None:
        """Audit, and train on all rows once: both must be of the same tokens."""
        self.audit()
        steps = -(-len(self.drawn.rows) // 8)
        with batches() as seen:
            run = self.folder / "run"
            outcome = command(
                "train", "--model", self.model, "--data", self.source, *self.train_options(steps), "--out", run
            )
        if not self.ended(outcome):
            return
        if (self.folder / "audit" / "ledger.parquet").exists() and "pair" not in self.day.kind:
            self.hold(laws.batches_are_the_ledgers(ledger_of(self.folder / "audit"), seen))
        whole = [] if self.day.limit < POSITIONS else [one for one in seen if len(one.ids) < POSITIONS - 3]
        self.hold(laws.batches_are_the_templates(whole, self.expected, self.tokenizer))

    def dry_run(self) -> None:
        outcome = command("train", "--model", self.model, "--data", self.source, *self.train_options(3), "--dry-run")
        self.ended(outcome)

    def prepared(self) -> None:
        """Audit the set that a trainer made of the rows, beside its rows or alone."""
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        whole = [None if one is None else sample_of(one, self.tokenizer) for one in self.expected]
        rows = [place for place, sample in enumerate(whole) if sample is not None]
        samples = [sample for sample in whole if sample is not None]
        if not samples:
            return
        spoiled, family = list[int](), FAMILIES[self.day.family]
        if self.day.mask:
            rng = random.Random(f"{self.day.number} spoiled")
            spoiled = spoil(samples, self.day.mask, self.tokenizer, family.stops, rng)
        Dataset.from_list(samples).save_to_disk(str(self.folder / "prepared"))
        source = ("--data", self.source) if self.day.source else ()
        out = self.folder / "audit"
        outcome = command(
            "audit", "--prepared", self.folder / "prepared", "--model", self.model, *source, "--no-model", "--out", out
        )
        if not self.ended(outcome):
            return
        lines, findings = ledger_of(out), self.record(out, outcome)
        self.hold(laws.rows_out_are_rows_in(lines, len(self.drawn.rows) if source else len(samples)))
        place_of = (lambda j: rows[j]) if source else (lambda j: j)
        back = {place: j for j, place in enumerate(rows)}
        planted = {
            (place if source else back[place]): names
            for place, names in self.drawn.planted.items()
            if source or place in back
        }
        for j in spoiled:
            planted[place_of(j)] = MASKS[self.day.mask][0]
        self.hold(laws.planted_faults_are_named(lines, findings, planted))
        masked = self.day.mask in ("inverted mask", "nothing trained") and len(spoiled) == len(samples)
        if self.day.mask == "inverted mask":  # of a chat whose last answer alone was trained, earlier ones now are
            masked &= not any(one is not None and one.rewrites for one in self.expected)
        if masked and not any(one["severity"] == "error" for one in findings.values()):
            self.seen.broken.append(f"no token of any answer is trained ({self.day.mask}), and no error says so")
        recorded = [lines[place_of(j)] for j in range(len(samples)) if place_of(j) < len(lines)]
        self.hold(laws.ledger_is_the_sets(recorded, samples))
        clean = [line for j, line in enumerate(recorded) if j not in spoiled]
        seen = [self.expected[rows[j]] for j in range(len(samples)) if j not in spoiled]
        self.hold(laws.clean_rows_have_no_finding(clean, findings, seen, planted, POSITIONS))

    def callback(self) -> None:
        """Train with QualityCallback; a model with random weights leaves no row out."""
        whole = [None if one is None else sample_of(one, self.tokenizer) for one in self.expected]
        samples = [sample for sample in whole if sample is not None]
        if len(samples) < 4:
            return
        self.model_of(samples)

    def model_of(self, samples: list[Any]) -> None:
        import tsqlora as tsq

        base = AutoModelForCausalLM.from_pretrained(self.model, trust_remote_code=False)
        net, outcome = script(tsq.wrap, base, mean_rank=2)
        if not self.ended(outcome):
            return
        data = tsq.QualitySubset(samples, fraction=1.0)
        quality = tsq.QualityCallback(data)
        quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
        quiet |= {"save_strategy": "no", "logging_strategy": "no"}
        args = TrainingArguments(str(self.folder / "out"), max_steps=3, per_device_train_batch_size=4, **quiet)
        collate = DataCollatorForSeq2Seq(self.tokenizer, padding=True)

        def built(rows: Any, *callbacks: Any) -> Any:
            options = {"data_collator": collate, "processing_class": self.tokenizer, "callbacks": [*callbacks]}
            trainer = Trainer(net, args, train_dataset=rows, **options)
            trainer.remove_callback(PrinterCallback)
            return trainer

        result, outcome = script(tsq.audit, built(samples))
        if self.ended(outcome):
            lines = result["ledger"].to_pylist()
            self.hold(laws.rows_out_are_rows_in(lines, len(samples)), laws.ledger_is_the_sets(lines, samples))
        with batches() as seen:
            _, outcome = script(built(data, quality).train)
        if not self.ended(outcome):
            return
        self.hold(laws.batches_are_of_the_set(seen, samples))
        drawn_rows = quality.looks[-1].get("kept") if quality.looks else None
        if drawn_rows is not None and drawn_rows < len(samples):
            self.seen.unlucky.append(
                f"QualityCallback leaves out {len(samples) - drawn_rows} of {len(samples)}: {quality.notes}"
            )
        self.seen.unlucky += laws.no_recall_without_skill(" ".join(quality.notes))

    def select(self) -> None:
        """Choose rows for another trainer: each that comes out is one that went in."""
        import tsqlora as tsq

        net = AutoModelForCausalLM.from_pretrained(self.model, trust_remote_code=False)
        fraction = self.rng.choice((0.5, 1.0))
        drop = "evident" if fraction == 1.0 else None
        rows, options = self.drawn.rows, {"processing_class": self.tokenizer, "fraction": fraction, "drop": drop}
        chosen, outcome = script(tsq.select, net, rows, **options, max_length=POSITIONS)
        if not self.ended(outcome):
            return
        columns = columns_of(rows)
        if {*chosen.column_names} != {*columns}:
            self.seen.broken.append(f"columns {sorted({*columns} - {*chosen.column_names})} are lost")
        if self.clean and len(chosen) != round(fraction * len(rows)):
            self.seen.unlucky.append(f"{len(chosen)} of {len(rows)} rows are chosen, for a fraction of {fraction}")
        self.hold(laws.rows_are_of(chosen.to_list(), rows))

    def apply(self) -> None:
        """Drop rows by a review: each row lands in one of two files, unchanged."""
        if not self.ended(self.audit()):
            return
        out, rows = self.folder / "audit", self.drawn.rows
        dropped = sorted(self.rng.sample(range(len(rows)), 2)) if len(rows) > 2 else [0]
        review = self.folder / "reviewed.csv"
        review.write_text("row,reviewed\n" + "".join(f"{row},drop\n" for row in dropped), encoding="utf-8")
        outcome = command("audit", "--apply", review, "--out", out)
        if not self.ended(outcome):
            return
        parts = [
            [json.loads(line) for line in (out / name).read_text("utf-8").splitlines()]
            for name in ("clean.jsonl", "quarantine.jsonl")
        ]
        expected_parts = [[rows[j] for j in range(len(rows)) if (j in dropped) == away] for away in (False, True)]
        for got, right in zip(parts, expected_parts, strict=True):
            if len(got) != len(right):
                self.seen.broken.append(f"{len(got)} rows are written in place of {len(right)}")
            texts = self.day.file in DELIMITED
            self.hold(laws.rows_are_equal(got, right, texts=texts))

    def look(self) -> None:
        """Audit with the model, which has random weights."""
        self.audit("--all")


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


TEXT_DOORS: dict[str, Callable[[TextDay], Any]] = {
    "audit": TextDay.audit,
    "train": TextDay.train,
    "dry run": TextDay.dry_run,
    "look": TextDay.look,
    "prepared": TextDay.prepared,
    "callback": TextDay.callback,
    "select": TextDay.select,
    "apply": TextDay.apply,
    "run": TextDay.run,
}


def live(one: Day, folder: Path, drawn: Drawn | None = None) -> Seen:
    """Live the day in an empty folder, with its own rows or others."""
    if one.of_texts:
        lived: Any = TextDay(one, folder, drawn)
        TEXT_DOORS[one.door](lived)
    else:
        lived = LabelDay(one, folder, drawn)
        LABEL_DOORS[one.door](lived)
    return lived.seen
