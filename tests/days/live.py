"""Live a day: write its rows, go through its door, and see which laws hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from days import laws
from days.day import Day, rows_of
from days.doors import Outcome, batches, command, ledger_of
from days.families import FAMILIES, POSITIONS, model_folder, tokenizer_of
from days.files import ARROW, save
from days.laws import Findings, Seen
from days.oracle import Expected, expected

NAMED: dict[str, tuple[str, ...]] = {}
"""Settings of kinds whose columns have no usual names."""


class TextDay:
    """A day of texts: its rows, its file, and what the template makes of them."""

    def __init__(self, one: Day, folder: Path) -> None:
        self.day, self.folder, self.seen = one, folder, Seen()
        self.tokenizer, self.drawn = tokenizer_of(one.family), rows_of(one)
        family = FAMILIES[one.family]
        opening = str(family.bos) if family.adds_bos else ""
        arrow = one.file in ARROW
        self.expected: list[Expected | None] = [
            expected(row, one.kind, self.tokenizer, opening, arrow=arrow) for row in self.drawn.rows
        ]
        self.source = save(one.file, folder, self.drawn.rows)
        self.model = model_folder(one.family)
        self.task = ("--set", "task.type=" + ("preference" if "pair" in one.kind else "causal-lm"))
        self.limit = () if one.limit == POSITIONS else ("--max-length", one.limit)

    @property
    def clean(self) -> bool:
        """Whether the template renders all rows, and none is longer than the limit."""
        if self.drawn.planted:
            return False
        return all(
            one is None or not (one.refusal or one.lost or len(one.ids) > self.day.limit - 3) for one in self.expected
        )

    def hold(self, *broken: Any) -> None:
        for law in broken:
            self.seen.broken += list(law)

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
        outcome = command(
            "audit", self.source, "--model", self.model, *options, *self.limit, *further, "--out", out_folder
        )
        if self.ended(outcome):
            self.ledger(out_folder, outcome)
        return outcome

    def ledger(self, out: Path, outcome: Outcome) -> None:
        lines, limit, drawn = ledger_of(out), self.day.limit, self.drawn
        findings: Findings = {one["name"]: one for one in outcome.result["findings"]}
        self.hold(
            laws.rows_out_are_rows_in(lines, len(drawn.rows)),
            laws.clean_rows_have_no_finding(lines, findings, self.expected, drawn.planted, limit),
            laws.refusals_are_the_templates(lines, findings, self.expected),
            laws.lost_content_is_said(lines, findings, self.expected),
            laws.planted_faults_are_named(lines, findings, drawn.planted),
            laws.counts_are_the_templates(lines, self.expected, limit, drawn.planted),
            laws.no_skill_accuses_nobody(findings, str(outcome.result.get("answers") or "")),
        )
        self.seen.findings = {name: [one["severity"], sorted(one["places"])] for name, one in sorted(findings.items())}
        self.seen.reasons = {str(line["row"]): line["fate"] for line in lines if line["fate"] != "trained"}

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
        return [*self.task, *options]

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
        self.hold(
            laws.batches_are_the_templates([] if self.day.limit < POSITIONS else seen, self.expected, self.tokenizer)
        )

    def dry_run(self) -> None:
        outcome = command("train", "--model", self.model, "--data", self.source, *self.train_options(3), "--dry-run")
        self.ended(outcome)

    def look(self) -> None:
        """Audit with the model, which has random weights."""
        self.audit("--all")


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


DOORS: dict[str, Callable[[TextDay], Any]] = {
    "audit": TextDay.audit,
    "train": TextDay.train,
    "dry run": TextDay.dry_run,
    "look": TextDay.look,
}


def live(one: Day, folder: Path) -> Seen:
    """Live the day in an empty folder."""
    lived = TextDay(one, folder)
    DOORS[one.door](lived)
    return lived.seen
