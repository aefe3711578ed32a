"""`tsqlora audit` of text: the ledger and the findings of a file of chats, instructions or preferences."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Trainer

from tsqlora.compat.hub import loading, require_model
from tsqlora.compat.transformers import load, row_collator
from tsqlora.data.chat import Conversation, format_of
from tsqlora.data.readers import SNIFF, Hints
from tsqlora.data.sources import absolute, open_table
from tsqlora.data.splits import resolve_max_length
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.files import digest, reading, replacing
from tsqlora.interop.template import read_template
from tsqlora.progress import Progress
from tsqlora.quality.subset import QualitySubset
from tsqlora.reports.review_page import OF_A_FINDING, text_page
from tsqlora.run.audit import FINDINGS_FILE, PAGE_FILE, require_new, source_digest, write_audit
from tsqlora.run.text_answers import Sequences, answers_of
from tsqlora.text.among import among_rows
from tsqlora.text.findings import FINDINGS, OF_ALL, OF_LABELS, OF_TOKENS, findings_of, impossible
from tsqlora.text.ledger import Line
from tsqlora.text.lengths import lengths_of
from tsqlora.text.look import AnswerLook
from tsqlora.text.prepared import IDS, Trained
from tsqlora.text.raw import Conversations, audited, prepared_rows
from tsqlora.text.reconcile import Reconciled, audit_sequences, conversations_of
from tsqlora.text.vocabulary import Vocabulary, vocabulary_of_model

LEDGER_FILE = "ledger.parquet"
BATCH = 8
"""Rows of a batch, where nothing says how many there are."""
MOST_PADDING = 0.3
"""Share of padding in random batches above which it is a finding."""


def audit_text(
    source: str,
    *,
    model: str,
    named: Mapping[str, str | None] | None = None,
    hints: Hints = SNIFF,
    evaluation: str | None = None,
    max_length: int | None = None,
    chat_template: Path | None = None,
    batch: int = BATCH,
    trust_remote_code: bool = False,
    baseline: Path | None = None,
    answers: bool = True,
    every: bool = False,
    out: Path,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Reconcile every row of a file with what `tsqlora train` would make of it; write ledger, findings and page.

    `named` are columns by the names of their settings: format, prompt, target, messages, text. `batch` is the rows of
    a training batch, and `baseline` an earlier findings.json to compare with. With `answers` the model reads a sample
    of the rows, or `every` row; else no weights are read but for embeddings of added tokens. Raises DataError for a
    file without texts, SettingsError for a model without a tokenizer, and if `out` holds an audit already.
    """
    start, before = time.perf_counter(), None if baseline is None else findings_in(baseline)
    require_new(out)
    vocabulary, positions = load_vocabulary(model, chat_template, trust_remote_code=trust_remote_code)
    tokenizer = vocabulary.tokenizer
    limit = resolve_max_length(max_length, tokenizer_limit=tokenizer.model_max_length, positions=positions)
    table = open_table(source, split="train", hints=hints)
    format = format_of(table.names, table.name, **(named or {}))
    evaluated = conversations_of(evaluation, hints, format)
    rows, lines = Conversations(table, format), list[Line]()
    for chunk in table.chunks():
        lines += audited(chunk, format, vocabulary, limit)
        if progress is not None:
            progress("ledger", len(lines), len(table))

    def sequences(places: Collection[int]) -> dict[int, tuple[Trained, ...]]:
        chosen = list(replace(table, ids=np.array(sorted(places), np.int64)))
        made = prepared_rows(chosen, format, tokenizer, max_length=limit)
        return {row.id: one.sequences for row, one in zip(chosen, made, strict=True)}

    about = {
        "source": absolute(source),
        "sha256": source_digest(table),
        "model": model,
        "hints": asdict(hints),
        "format": format.name,
        "max_length": limit,
        "mask": "those that tsqlora train would make; other trainers cut and mask in other ways",
    }
    about["lengths"] = lengths_of([line.tokens for line in lines], batch, limit)
    how = {"every": every, "trust_remote_code": trust_remote_code, "progress": progress, "tell": tell}
    read = partial(answers_of, model, rows, sequences, vocabulary, **how)
    look = read if answers else None
    result = finish(out, about, rows, lines, evaluated, sequences, vocabulary, look)
    return {**result, **changes_of(before, result), "seconds": time.perf_counter() - start}


def audit_prepared(
    prepared: Path,
    *,
    model: str,
    data: str | None = None,
    evaluation: str | None = None,
    baseline: Path | None = None,
    answers: bool = True,
    every: bool = False,
    out: Path,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Reconcile a set that a trainer has prepared with the rows that it was made of.

    The rows are those of `data`; without it the set's own columns of texts, where it has kept them, else what its
    labels say. Raises DataError for a directory that holds no prepared set.
    """
    start, before = time.perf_counter(), None if baseline is None else findings_in(baseline)
    require_new(out)
    vocabulary, _ = load_vocabulary(model, None)
    made, evaluated = prepared_set(prepared), conversations_of(evaluation)
    reason = "its tokens are those of another tokenizer; give --model the one that prepared it"
    result = audit_sequences(made, None, vocabulary, data=data, progress=progress)
    if all("vocabulary" in line.findings for line in result.lines):
        raise DataError(f"{prepared}: {reason}")
    if data is not None and result.finds is OF_TOKENS:
        tell(f"packing cut {prepared} anywhere: findings are by its own rows, not by those of {data}")
        data = None
    about = {
        "source": absolute(data or str(prepared)),
        "sha256": None if data is None else _digest_of(data),
        "model": model,
        "mask": f"those in {prepared}",
        **_about_set(result, BATCH),
    }
    options: dict[str, Any] = {"every": every, "labels": result.finds is OF_LABELS, "progress": progress, "tell": tell}
    look = partial(answers_of, model, result.rows, result.of, vocabulary, **options) if answers else None
    written = finish(out, about, result.rows, result.lines, evaluated, result.of, vocabulary, look, result.finds)
    return {**written, **changes_of(before, written), "seconds": time.perf_counter() - start}


def audit_trainer(
    trainer: Trainer, *, data: Any = None, evaluation: Any = None, out: Path | None = None
) -> dict[str, Any]:
    """Reconcile the train_dataset of a Trainer that was built, as its collator makes batches of it, with its rows.

    Raises UnsupportedError for a stream, SettingsError for a Trainer without a tokenizer, DataError for rows without
    token ids.
    """
    start, made, model = time.perf_counter(), trainer.train_dataset, cast(Any, trainer.model)
    made = made.dataset if isinstance(made, QualitySubset) else made  # a draw has its rows in another order
    if out is not None:
        require_new(out)
    if not hasattr(made, "__len__"):
        raise UnsupportedError("the Trainer's train_dataset is a stream; audit its first rows, as a datasets.Dataset")
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if tokenizer is None:
        raise SettingsError("the Trainer has no tokenizer; give it as processing_class")
    vocabulary = vocabulary_of_model(tokenizer, model.config, model.generation_config, size_of=model)
    result = audit_sequences(made, row_collator(trainer), vocabulary, data=data)
    data = None if result.finds is OF_TOKENS else data
    about = {
        "source": absolute(data) if isinstance(data, str) else type(trainer).__name__,
        "sha256": _digest_of(data) if isinstance(data, str) else None,
        "model": str(getattr(model.config, "_name_or_path", "")),
        "mask": f"those of the {type(trainer).__name__} and its collator",
        **_about_set(result, trainer.args.train_batch_size),
    }
    rows = conversations_of(evaluation)
    audited = finish(out, about, result.rows, result.lines, rows, result.of, vocabulary, finds=result.finds)
    return {**audited, "seconds": time.perf_counter() - start}


def _about_set(result: Reconciled, batch: int) -> dict[str, Any]:
    return {
        "format": "prepared",
        "max_length": result.longest,
        "unmatched": len(result.unmatched),
        "unmatched_places": result.unmatched,
        "lengths": lengths_of(result.lengths, batch, result.longest),
    }


def findings_in(path: Path) -> dict[str, dict[str, Any]]:
    """The findings of an earlier audit by name.  Raises DataError for another file."""
    reading(path)
    try:
        return {one["name"]: one for one in json.loads(path.read_text(encoding="utf-8"))["findings"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"--baseline {path} is not the findings.json of an audit of text ({error})") from None


def changes_of(before: Mapping[str, Mapping[str, Any]] | None, result: Mapping[str, Any]) -> dict[str, Any]:
    """What changed since an earlier audit: rows of each finding then and now, where they differ."""
    if before is None:
        return {}
    now = {one["name"]: one for one in result["findings"]}
    both = [(before.get(name), now.get(name)) for name in sorted({*now, *before})]
    counts = [
        {"name": (new or old or {})["name"], "before": old["rows"] if old else 0, "now": new["rows"] if new else 0}
        for old, new in both
    ]
    return {"changes": [one for one in counts if one["before"] != one["now"]]}


def prepared_set(folder: Path) -> Any:
    """Load a saved set with input_ids.  Raises DataError for any other directory."""
    from datasets import load_from_disk  # seconds to import

    if not folder.is_dir():
        raise DataError(f"{folder} is no directory; give what the trainer prepared, such as dataset_prepared_path/HASH")
    try:
        made: Any = load_from_disk(str(folder))
        made = made.get("train", next(iter(made.values()))) if isinstance(made, Mapping) else made
        made.data.table.validate(full=True)  # a damaged offset would end the process
    except Exception as error:  # a damaged or hostile file can make datasets raise anything
        why = str(error).partition("\n")[0][:200] or type(error).__name__
        raise DataError(f"{folder} is not a saved data set ({why})") from None
    if not {*made.column_names} & {*IDS}:
        raise DataError(
            f"{folder} is not prepared: it has no input_ids; its columns are {', '.join(made.column_names)}"
        )
    return made


def _cells(finding: str, row: Conversation, suspects: Mapping[int, float]) -> dict[str, Any]:
    """A row of suspects.csv; the reader fills in `reviewed`."""
    return {
        "row": row.row,
        "finding": finding,
        "probability": round(suspects[row.row], 3) if suspects else "",
        "prompt": "\n".join(message.content for message in row.question),
        "answer": row.answer,
        "reviewed": "",
    }


def finish(
    out: Path | None,
    about: Mapping[str, Any],
    rows: Sequence[Conversation],
    lines: Sequence[Line],
    evaluation: Sequence[Conversation] | None,
    sequences: Sequences,
    vocabulary: Vocabulary,
    look: Callable[[], AnswerLook] | None = None,
    finds: Collection[str] = FINDINGS.keys(),
) -> dict[str, Any]:
    """Gather the findings, and write ledger, findings, suspects and page into `out`; None returns the ledger.

    The ledger is written before `look` reads the answers. `finds` are the findings that the rows can show.
    """
    further = among_rows(rows, lines, evaluation)
    names = [field.name for field in fields(Line) if field.name != "shows"]
    ledger = pa.table({name: pa.array([getattr(line, name) for line in lines]) for name in names})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / LEDGER_FILE, private=True) as unfinished:
            pq.write_table(ledger, unfinished)
    answers = AnswerLook([]) if look is None else look()
    suspects = {name: answers.rows(name) for name in answers.detections}
    for turn, owner in answers.owners.items():
        line = lines[answers.turns[turn].row]
        line.detail = line.detail or f"its answer fits the prompt of row {owner} best"
    further |= {name: sorted(places) for name, places in suspects.items()}
    if (about.get("lengths") or {}).get("padding", 0) > MOST_PADDING:
        further["lengths"] = [line.row for line in lines if line.tokens]
    findings = findings_of(lines, further, limit=about["max_length"])
    why_not = impossible(finds, evaluation=evaluation is not None, answers=bool(answers.turns))
    shown_names = {finding.name for finding in findings}.difference(OF_ALL)
    fates = Counter(line.fate.partition(" of ")[0] for line in lines)
    about = {
        **about,
        "rows": len(lines),
        "tokens": sum(line.tokens for line in lines),
        "trained_tokens": sum(line.trained_tokens for line in lines),
        "fates": dict(sorted(fates.items(), key=lambda one: one[0] != "trained")),
        "answers": None if look is None else answers.summary(),
        "findings": [finding.to_dict() for finding in findings],
        "cannot": {name: why for name, why in why_not.items() if name not in shown_names},
    }
    if out is None:
        return {**about, "ledger": ledger}
    names = ("rows", "hints", "source", "sha256", "model", "lengths", "answers", "findings", "cannot")
    own = [finding for finding in findings if finding.name not in OF_ALL]
    cells = [_cells(one.name, rows[place], suspects.get(one.name, {})) for one in own for place in one.places]
    none = dict.fromkeys(_cells("", Conversation(0, ()), {}), "")
    tokens = sequences({place for finding in findings for place in finding.places[:OF_A_FINDING]})
    page = text_page(out, about, rows, lines, findings, tokens, vocabulary, answers.by_token())
    record = {name: about[name] for name in names if name in about}
    write_audit(out / FINDINGS_FILE, record, cells or [none], page)
    return {**about, "out": str(out), "page": str(out / PAGE_FILE)}


def _digest_of(source: str) -> str:
    return digest(Path(source)) if os.path.isfile(source) else source_digest(open_table(source))


def load_vocabulary(
    model: str, chat_template: Path | None, *, trust_remote_code: bool = False
) -> tuple[Vocabulary, int | None]:
    """Read what a model's tokens stand for, and how many positions it has; no weights."""
    require_model(model)
    with loading("--model", model):
        config = load(AutoConfig, model, trust_remote_code=trust_remote_code)
        tokenizer = load(AutoTokenizer, model, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    generation = None
    with suppress(OSError, ValueError):
        generation = load(GenerationConfig, model)
    vocabulary = vocabulary_of_model(tokenizer, config, generation, size_of=model)
    return vocabulary, getattr(config.get_text_config(), "max_position_embeddings", None)
