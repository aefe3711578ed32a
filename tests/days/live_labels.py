"""Live a day of labelled rows: audit, corrections, training, prediction, export and doctor."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from days import laws
from days.day import Day, rows_of
from days.doors import Outcome, command
from days.files import DELIMITED, options_of, save
from days.labels import MEDIA, TASKS, encoder, save_images
from days.laws import Seen
from days.rows import Drawn, Row


class LabelDay:
    """A day of labelled rows and its file."""

    def __init__(self, one: Day, folder: Path, drawn: Drawn | None = None) -> None:
        self.day, self.folder, self.seen = one, folder, Seen()
        self.hold = self.seen.hold
        self.drawn = drawn or rows_of(one)
        self.rng = random.Random(f"{one.number} door")
        media = one.kind in MEDIA
        self.source = save_images(folder, self.drawn.rows) if media else save(one.file, folder, self.drawn.rows)
        self.model = encoder(one.kind)
        task = TASKS.get(one.kind)
        # Rows with tokens and tags, and lists of labels, say by themselves what they are.
        named = task if one.source or one.kind in ("numbers", "label sets, bars", *MEDIA) else None
        self.task = (*(() if named is None else ("--set", f"task.type={named}")), *options_of(one.file))

    def ended(self, outcome: Outcome) -> bool:
        """Whether a command went through; labelled rows without a fault are never refused."""
        self.seen.codes.append(outcome.code)
        self.hold(laws.no_traceback(outcome), laws.refusal_is_sound(outcome, of_rows=False))
        if outcome.refusal and self.day.fault == "lone quote":
            self.hold(laws.refusal_is_sound(outcome, of_rows=True))
        elif outcome.refusal:
            self.seen.broken.append(f"clean rows are refused: {outcome.refusal}")
        return outcome.code == 0 and not outcome.trace

    def audit(self) -> Outcome:
        out = self.folder / "audit"
        outcome = command("audit", self.source, "--model", self.model, *self.task, "--out", out)
        if self.day.kind == "numbers":
            self.hold(laws.no_traceback(outcome))
            return outcome
        if not self.ended(outcome):
            return outcome
        result, rows = outcome.result, self.drawn.rows
        lacking = sum(row.get("label", 0) is None for row in rows)
        if result["rows"] not in (len(rows), len(rows) - lacking):
            self.seen.broken.append(f"{result['rows']} rows are audited of {len(rows)}")
        classes = {str(label) for label in result["classes"]}
        right = {str(label).strip().lower() for row in rows for label in labels_of(row)}
        if len(classes) != len(right) or {name.lower() for name in classes} != right:
            self.seen.broken.append(f"the classes are {sorted(classes)}; the rows have {sorted(right)}")
        blind = self.day.number % 2 == 1
        if blind and self.day.kind != "tags" and result["evident"] and result["likely_wrong"]:
            self.seen.unlucky.append(f"labels by lot: {result['likely_wrong']} of {len(rows)} are called wrong")
        self.seen.findings = {
            "evident": result["evident"],
            "likely_wrong": result["likely_wrong"],
            "rows": result["rows"],
        }
        return outcome

    def apply(self) -> None:
        """Correct two labels by the table: they land on their rows, and all others stay."""
        if not self.ended(self.audit()) or self.day.kind in ("numbers", *MEDIA):
            return
        table, folder = self.folder / "audit" / "suspects.csv", self.folder / "corrected"
        with table.open(encoding="utf-8", newline="") as file:
            suspects = list(csv.DictReader(file))
        changed = dict[int, str]()
        for one in suspects:
            if int(one["row"]) not in changed and one["suggested_label"] != one["label"] and len(changed) < 2:
                one["reviewed_label"] = changed[int(one["row"])] = one["suggested_label"]
        if not changed:
            return
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(suspects[0]))
            writer.writeheader()
            writer.writerows(suspects)
        outcome = command("audit", "--apply", table, "--out", folder)
        if not self.ended(outcome):
            return
        got = read_back(Path(outcome.result["corrected"]))
        texts = self.day.file in DELIMITED
        if self.day.fault:
            return
        right = [row for place, row in enumerate(self.drawn.rows) if place not in changed]
        if len(got) != len(self.drawn.rows):
            self.seen.broken.append(f"{len(got)} rows are written of {len(self.drawn.rows)}")
        self.hold(
            laws.rows_are_equal([row for place, row in enumerate(got) if place not in changed], right, texts=texts)
        )
        for place, label in changed.items():
            after = {str(one).lower() for one in labels_of(got[place])}
            if self.day.kind != "tags" and not after >= {part.lower() for part in label.split("|")}:
                self.seen.broken.append(f"row {place} was corrected to {label}, and has {sorted(after)}")

    def options(self) -> list[object]:
        words = ["training.max_steps=3", "training.batch_size=8", "ranks.mean=2"]
        return [*self.task, *(word for one in words for word in ("--set", one))]

    def generation(self) -> tuple[object, ...]:
        return ()

    def train(self) -> Path | None:
        run = self.folder / "run"
        outcome = command("train", "--model", self.model, "--data", self.source, *self.options(), "--out", run)
        return run if self.ended(outcome) else None

    def dry_run(self) -> None:
        outcome = command("train", "--model", self.model, "--data", self.source, *self.options(), "--dry-run")
        if self.ended(outcome) and sum(outcome.result["rows"].values()) < len(self.drawn.rows) - 2:
            self.seen.broken.append(f"the plan has the rows {outcome.result['rows']}, of {len(self.drawn.rows)}")

    def run(self) -> None:
        """Train, predict, export, and ask the doctor."""
        if (run := self.train()) is None:
            return
        after_training(self, run, self.source, len(self.drawn.rows))


def labels_of(row: Row) -> list[Any]:
    """The labels of a row, as they were drawn."""
    if "tags" in row:
        return row["tags"]
    value = row.get("label", row.get("labels", row.get("class")))
    if isinstance(value, str) and value.startswith("["):
        return json.loads(value)
    if isinstance(value, str):
        return value.split("|")
    return value if isinstance(value, list) else [] if value is None else [value]


def read_back(path: Path) -> list[Row]:
    """The rows of a written file, by other readers than ours."""
    import pyarrow.parquet as pq

    if path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else max(",;", key=file.readline().count)
            file.seek(0)
            return list(csv.DictReader(file, delimiter=delimiter))
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return [json.loads(line) for line in text.splitlines()]
    rows = json.loads(text)
    return rows["data"] if isinstance(rows, dict) else rows


def after_training(lived: Any, run: Path, source: Path, count: int) -> None:
    """Predict for the rows, export the adapter, and ask which servers read it."""
    out = lived.folder / "predicted.jsonl"
    rows = source if source.is_file() or lived.day.kind in MEDIA else save("jsonl", lived.folder, lived.drawn.rows)
    outcome = command("predict", run, "--data", rows, "--out", out, *lived.generation())
    if lived.ended(outcome):
        got = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        if len(got) != count or any("prediction" not in row for row in got):
            lived.seen.broken.append(f"{len(got)} rows have predictions, of {count}")
    if lived.ended(command("export", run, "--format", "peft", "--out", lived.folder / "exported")):
        lived.ended(command("doctor", lived.folder / "exported"))


LABEL_DOORS: dict[str, Callable[[LabelDay], Any]] = {
    "audit": LabelDay.audit,
    "apply": LabelDay.apply,
    "train": LabelDay.train,
    "dry run": LabelDay.dry_run,
    "run": LabelDay.run,
}
