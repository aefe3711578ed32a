"""`tsqlora audit` of text: the ledger and the findings of a file of chats, instructions or preferences."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from tsqlora.compat.hub import require_model
from tsqlora.data.formats import Format
from tsqlora.data.prepare import resolve_max_length
from tsqlora.data.rows import Row, find_columns
from tsqlora.data.sources import first_columns, open_table
from tsqlora.data.write import require_place, without_formulas, write_rows
from tsqlora.errors import DataError, SettingsError
from tsqlora.files import reading, write_json, write_text
from tsqlora.progress import Progress
from tsqlora.reports.text_page import ON_PAGE, text_page
from tsqlora.run.audit import source_digest
from tsqlora.run.config import Config, load_config
from tsqlora.text.among import among_rows
from tsqlora.text.conversations import Conversation, conversation, format_of
from tsqlora.text.findings import Finding, findings_of
from tsqlora.text.ledger import Line, line_of
from tsqlora.text.matching import match, unwrapped
from tsqlora.text.prepared import IDS, Collate, Trained, sequences_of
from tsqlora.text.raw import prepared_rows
from tsqlora.text.vocabulary import Vocabulary, vocabulary_of

LEDGER_FILE, FINDINGS_FILE, PAGE_FILE, SUSPECTS_FILE = "ledger.parquet", "findings.json", "audit.html", "suspects.csv"
PREPARED = {"input_ids", "labels", "attention_mask", "position_ids", "text"}
"""Columns of a prepared set that are no source."""
MOST_UNMATCHED = 0.01
MOST_ALIKE = 0.9
TEXT_TASKS = ("causal-lm", "preference")


def text_config(source: str, model: str | None, overrides: Sequence[str]) -> Config | None:
    """The settings of an audit of text; None where a config's task, or a file's column of labels, asks for labels."""
    is_yaml = Path(source).suffix.lower() in (".yaml", ".yml")
    if not is_yaml and not any(one.startswith("task.type=") for one in overrides) and not _holds_text(source):
        return None
    sections: dict[str, Any] = {} if model is None else {"model": {"path": model}}
    if not is_yaml:
        sections = {"model": {"path": model or "."}, "data": {"train": source}}
    config = load_config(source if is_yaml else None, overrides, sections=sections)
    named = is_yaml or any(one.startswith("task.type=") for one in overrides)
    return config if not named or config.task.type in TEXT_TASKS else None


def _holds_text(source: str) -> bool:
    names = first_columns(source)
    try:
        if find_columns(names, text=None, text_pair=None, label=None, source=source).label is not None:
            return False
    except DataError:
        pass  # no column of a text to classify
    try:
        return bool(names and format_of(names, source))
    except DataError:
        return False


def audit_text(
    source: str,
    *,
    model: str,
    named: Mapping[str, str | None] | None = None,
    evaluation: str | None = None,
    max_length: int | None = None,
    chat_template: Path | None = None,
    out: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reconcile every row of a file with what `tsqlora train` would make of it; write ledger, findings and page.

    `named` are columns by the names of their settings: format, prompt, target, messages, text. No weights are read.
    Raises DataError for a file without texts, SettingsError for a model without a tokenizer, and if `out` holds an
    audit already.
    """
    start = time.perf_counter()
    require_new(out)
    vocabulary, positions = load_vocabulary(model, chat_template)
    tokenizer = vocabulary.tokenizer
    limit = resolve_max_length(max_length, tokenizer_limit=tokenizer.model_max_length, positions=positions)
    table = open_table(source, split="train")
    format = format_of(table.names, table.name, **(named or {}))
    lacks_template = format.name in ("messages", "sharegpt") and not tokenizer.chat_template
    rows, lines = list[Conversation](), list[Line]()
    for chunk in table.chunks():
        made = [conversation(row.cells, format, row.id) for row in chunk]
        rows += made
        if lacks_template:
            lines += [failed(one, vocabulary, "no_template") for one in made]
        else:
            lines += audited(chunk, made, format, vocabulary, limit)
        if progress is not None:
            progress("ledger", len(lines), len(table))

    def sequences(places: Collection[int]) -> dict[int, tuple[Trained, ...]]:
        chosen = [row for chunk in table.chunks() for row in chunk if row.id in places and not lacks_template]
        made = prepared_rows(chosen, format, tokenizer, max_length=limit)
        return {row.id: one.sequences for row, one in zip(chosen, made, strict=True)}

    about = {
        "source": _named(source),
        "sha256": source_digest(source, None),
        "model": model,
        "format": format.name,
        "max_length": limit,
        "mask": "those that tsqlora train would make; other trainers cut and mask in other ways",
    }
    result = finish(out, about, rows, lines, conversations_of(evaluation), sequences, vocabulary)
    return {**result, "seconds": time.perf_counter() - start}


def audit_prepared(
    prepared: Path,
    *,
    model: str,
    data: str | None = None,
    evaluation: str | None = None,
    out: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reconcile a set that a trainer has prepared with the rows that it was made of.

    The rows are those of `data`; without it the set's own columns of texts, where it has kept them, else none: then
    only what tokens and labels say is found. Raises DataError for a directory that holds no prepared set.
    """
    start = time.perf_counter()
    require_new(out)
    vocabulary, _ = load_vocabulary(model, None)
    made = prepared_set(prepared)
    reason = "its tokens are those of another tokenizer; give --model the one that prepared it"
    result = audit_sequences(made, None, vocabulary, data=data, progress=progress)
    if all("vocabulary" in line.findings for line in result.lines):
        raise DataError(f"{prepared}: {reason}")
    about = {
        "source": _named(data or str(prepared)),
        "sha256": None if data is None else source_digest(data, None),
        "model": model,
        "format": "prepared",
        "max_length": result.longest,
        "mask": f"those in {prepared}",
    }
    written = finish(out, about, result.rows, result.lines, conversations_of(evaluation), result.of, vocabulary)
    return {**written, "unmatched": result.unmatched, "seconds": time.perf_counter() - start}


@dataclass(frozen=True, slots=True)
class Reconciled:
    """Source rows, their lines, and their sequences; and how many sequences have no row."""

    rows: list[Conversation]
    lines: list[Line]
    sequences: dict[int, list[Trained]]
    unmatched: int
    longest: int

    def of(self, places: Collection[int]) -> dict[int, tuple[Trained, ...]]:
        """The sequences of some rows."""
        return {place: tuple(self.sequences.get(place, ())) for place in places}


def audit_sequences(
    made: Any,
    collate: Collate | None,
    vocabulary: Vocabulary,
    *,
    data: Any = None,
    progress: Progress | None = None,
) -> Reconciled:
    """Reconcile a prepared set with source rows: a file, rows, or the set's own columns.

    Where more than MOST_UNMATCHED of the sequences have no row, no row is called dropped.
    """
    sequences = list[Trained]()
    for number, one in enumerate(sequences_of(made, collate)):
        sequences.append(one)
        if progress is not None and number % 1000 == 0:
            progress("ledger", one.row, len(made))
    names, unmatched = list(getattr(made, "column_names", None) or made[0]), 0
    packed = len({(one.row, one.side) for one in sequences}) < len(sequences)
    if data is not None:
        rows = conversations_of(data)
        assert rows is not None
        if _is_wrapped(names, sequences):
            sequences = unwrapped(rows, sequences, vocabulary)
        by_row, sure, left = match(rows, sequences, vocabulary)
        unmatched = len(left)
    elif not packed and (format := _own_format(names)) is not None:
        rows = [_without_end(conversation(made[j], format, j), vocabulary) for j in range(len(made))]
        by_row, sure = _by_row(sequences), {}
    else:
        by_row = {j: [one] for j, one in enumerate(sequences)} if packed else _by_row(sequences)
        rows, sure = [Conversation(j, ()) for j in range(len(by_row) if packed else len(made))], {}
    longest = max((len(one.ids) for one in sequences), default=0)
    lines = [line_of(row, by_row.get(row.row, ()), vocabulary, limit=longest) for row in rows]
    unsure = unmatched > MOST_UNMATCHED * len(sequences)
    for line in lines:
        line.match = sure.get(line.row, line.match)
        if unsure and line.match == "unmatched":
            line.fate = "unknown"
    return Reconciled(rows, lines, by_row, unmatched, longest)


def _is_wrapped(names: Collection[str], sequences: Sequence[Trained]) -> bool:
    """Whether rows were joined and cut into equal parts, with no word of where one ends.

    Rows that were cut to one length begin alike; parts of a stream begin anywhere.
    """
    lengths = {len(one.ids) for one in sequences[:-1]}
    if len(lengths) != 1 or len(sequences) < 3 or {"seq_lengths", "position_ids"} & {*names}:
        return False
    ((_, alike),) = Counter(tuple(one.ids[:2].tolist()) for one in sequences).most_common(1)
    return alike < MOST_ALIKE * len(sequences)


def _by_row(sequences: Iterable[Trained]) -> dict[int, list[Trained]]:
    by_row = dict[int, list[Trained]]()
    for one in sequences:
        by_row.setdefault(one.row, []).append(one)
    return by_row


def _without_end(row: Conversation, vocabulary: Vocabulary) -> Conversation:
    """The row without the end token that TRL writes behind its completion."""
    end = vocabulary.tokenizer.eos_token
    if not isinstance(end, str) or not row.answer.endswith(end):
        return row
    answer = replace(row.messages[-1], content=row.answer.removesuffix(end))
    return replace(row, messages=(*row.messages[:-1], answer))


def _own_format(names: Sequence[str]) -> Format | None:
    try:
        return format_of([name for name in names if name not in PREPARED], "prepared")
    except (DataError, SettingsError):
        return None


def prepared_set(folder: Path) -> Any:
    """Load a saved set with input_ids.  Raises DataError for any other directory."""
    from datasets import load_from_disk  # seconds to import

    if not folder.is_dir():
        raise DataError(f"{folder} is no directory; give what the trainer prepared, such as dataset_prepared_path/HASH")
    try:
        made: Any = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no saved data set ({str(error).splitlines()[0]})") from None
    made = made.get("train", next(iter(made.values()))) if isinstance(made, Mapping) else made
    if not {*made.column_names} & {*IDS}:
        raise DataError(
            f"{folder} is not prepared: it has no input_ids; its columns are {', '.join(made.column_names)}"
        )
    return made


def conversations_of(rows: Any) -> list[Conversation] | None:
    """Read a file, or a list of dicts or `datasets.Dataset`, as conversations; None for None."""
    if rows is None:
        return None
    if isinstance(rows, str | Path):
        table = open_table(rows)
        names, name, cells = table.names, table.name, (row.cells for row in table)
    else:
        names, name, cells = list(rows[0]), "data", (rows[j] for j in range(len(rows)))
    format = format_of(names, name)
    return [conversation(row, format, j) for j, row in enumerate(cells)]


def require_new(out: Path) -> None:
    """Raise SettingsError if a folder holds an audit already, or cannot hold one."""
    if (out / FINDINGS_FILE).exists() or (out / SUSPECTS_FILE).exists():
        raise SettingsError(f"{out} holds an audit, maybe with your review; choose another --out")
    require_place(out / FINDINGS_FILE)


def finish(
    out: Path,
    about: Mapping[str, Any],
    rows: Sequence[Conversation],
    lines: Sequence[Line],
    evaluation: Sequence[Conversation] | None,
    sequences: Callable[[Collection[int]], Mapping[int, Sequence[Trained]]],
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """Gather the findings, and write ledger, findings, suspects and page."""
    findings = findings_of(lines, among_rows(rows, lines, evaluation))
    about = {
        **about,
        "rows": len(lines),
        "tokens": sum((line.prompt_tokens or 0) + (line.answer_tokens or 0) for line in lines),
        "trained_tokens": sum(line.trained_tokens for line in lines),
        "fates": Counter(line.fate.partition(" of ")[0] for line in lines),
        "findings": [finding.to_dict() for finding in findings],
    }
    shown = {place for finding in findings for place in finding.places[:ON_PAGE]}
    _write(out, about, rows, lines, findings, sequences(shown), vocabulary)
    return {**about, "out": str(out), "page": str(out / PAGE_FILE)}


def _named(source: str) -> str:
    return str(Path(source).absolute()) if Path(source).exists() else source


def audited(
    chunk: Sequence[Row], made: Sequence[Conversation], format: Format, vocabulary: Vocabulary, limit: int
) -> list[Line]:
    """The lines of some rows."""
    lines = list[Line]()
    for one, prepared in zip(made, prepared_rows(chunk, format, vocabulary.tokenizer, max_length=limit), strict=True):
        if prepared.finding:
            line = failed(one, vocabulary, prepared.finding)
            line.detail, line.lost_tokens = prepared.reason, prepared.lost
        else:
            line = line_of(one, prepared.sequences, vocabulary, lost=prepared.lost, cut=prepared.cut)
        lines.append(line)
    return lines


def failed(one: Conversation, vocabulary: Vocabulary, finding: str) -> Line:
    """The line of a row that has no tokens; what its own texts show says more than "dropped"."""
    line = line_of(one, (), vocabulary)
    line.match = "exact"  # the source is known
    if finding != "dropped" or not line.findings:
        line.findings.append(finding)
    return line


def load_vocabulary(model: str, chat_template: Path | None) -> tuple[Vocabulary, int | None]:
    """Read what a model's tokens stand for, and how many positions it has; no weights."""
    require_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--model {model} cannot be read ({str(error).splitlines()[0]})") from error
    if chat_template is not None:
        reading(chat_template)
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    try:
        generation = _ends(GenerationConfig.from_pretrained(model).eos_token_id)
    except (OSError, ValueError):
        generation = []
    own = _ends(config.eos_token_id)
    vocabulary = vocabulary_of(tokenizer, model_ends=[*own, *generation], generation_ends=generation or own or None)
    return vocabulary, getattr(config.get_text_config(), "max_position_embeddings", None)


def _ends(value: Any) -> list[int]:
    return [] if value is None else [int(one) for one in value] if isinstance(value, list) else [int(value)]


def _write(
    out: Path,
    about: Mapping[str, Any],
    rows: Sequence[Conversation],
    lines: Sequence[Line],
    findings: Sequence[Finding],
    tokens: Mapping[int, Sequence[Trained]],
    vocabulary: Vocabulary,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    columns = {field.name: [getattr(line, field.name) for line in lines] for field in fields(Line)}
    pq.write_table(pa.table(columns), out / LEDGER_FILE)
    write_json(out / FINDINGS_FILE, {name: about[name] for name in ("rows", "source", "sha256", "model", "findings")})
    cells = [
        {
            "row": place,
            "finding": finding.name,
            "probability": "",
            "prompt": "\n".join(message.content for message in rows[place].question),
            "answer": rows[place].answer,
            "reviewed": "",
        }
        for finding in findings
        for place in finding.places
    ]
    none: dict[str, Any] = dict.fromkeys(("row", "finding", "probability", "prompt", "answer", "reviewed"), "")
    write_rows(out / SUSPECTS_FILE, without_formulas(cells or [none])[0])
    write_text(out / PAGE_FILE, text_page(out, about, rows, lines, findings, tokens, vocabulary))
