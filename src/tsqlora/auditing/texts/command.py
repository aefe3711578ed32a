"""`tsqlora audit` of text: the ledger and the findings of a file of chats, instructions or preferences."""

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Trainer

from tsqlora.adapter.template import read_template
from tsqlora.auditing.command import FINDINGS_FILE, PAGE_FILE, require_new, source_digest, write_audit
from tsqlora.auditing.draw.subset import undrawn
from tsqlora.auditing.review_page import OF_A_FINDING, text_page
from tsqlora.auditing.texts.among import among_rows
from tsqlora.auditing.texts.answers import behind, read_answers, turns_in, turns_of
from tsqlora.auditing.texts.findings import OF_ALL, OF_LABELS, OF_TOKENS, findings_of, impossible, lengths_of
from tsqlora.auditing.texts.ledger import Line
from tsqlora.auditing.texts.look import LEAST_TURNS, SAMPLE, AnswerLook, look_at_answers
from tsqlora.auditing.texts.prepared import IDS
from tsqlora.auditing.texts.raw import audit_table
from tsqlora.auditing.texts.reconcile import Reconciled, audit_sequences, conversations_of
from tsqlora.auditing.texts.vocabulary import Vocabulary, vocabulary_of_model
from tsqlora.errors import DataError, Finding, SettingsError, UnsupportedError
from tsqlora.files import reading, replacing
from tsqlora.libs.hub import cached_model, loading, require_model
from tsqlora.libs.transformers import load, row_collator
from tsqlora.model.request import Compute
from tsqlora.progress import Progress
from tsqlora.rows.chat import Chat, format_of
from tsqlora.rows.readers import SNIFF, Hints
from tsqlora.rows.sources import absolute, open_table
from tsqlora.rows.splits import resolve_max_length

LEDGER_FILE = "ledger.parquet"
BATCH, READ = 8, 16
"""Rows of a training batch, where nothing says how many there are; and answers that the model reads together."""
TIMED, PASSES = 8, 2.8
"""Answers that are timed, and the passes over all answers that a look takes at most, besides the planted ones."""
MARGIN = 1.3
"""Memory that a model needs, for each byte of its weights."""
MOST_PADDING = 0.3
"""Share of padding in random batches above which it is a finding."""


def audit_text(
    source: str | None,
    *,
    model: str,
    prepared: Path | None = None,
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

    Or with a set that a trainer has `prepared`; without a source its rows are the set's own columns of texts, where it
    has kept them, else what its labels say. `named` are columns by the names of their settings: format, prompt,
    target, messages, text. `batch` is the rows of a training batch, and `baseline` an earlier findings.json to compare
    with. With `answers` the model reads a sample of the rows, or `every` row; else no weights are read but for
    embeddings of added tokens. Raises DataError for a file without texts and for a directory that holds no prepared
    set, SettingsError for a model without a tokenizer, and if `out` holds an audit already.
    """
    start, before = time.perf_counter(), None if baseline is None else counts_in(baseline)
    require_new(out)
    vocabulary, positions = load_vocabulary(model, chat_template, trust_remote_code=trust_remote_code)
    about: dict[str, Any] = {"model": model}
    if prepared is not None:
        made, evaluated = prepared_set(prepared), conversations_of(evaluation, answers=False)
        result = audit_sequences(made, None, vocabulary, data=source, progress=progress)
        if all("vocabulary" in line.findings for line in result.lines):
            reason = "its tokens are those of another tokenizer; give --model the one that prepared it"
            raise DataError(f"{prepared}: {reason}")
        if source is not None and result.finds is OF_TOKENS:
            tell(f"packing cut {prepared} anywhere: findings are by its own rows, not by those of {source}")
            source = None
        about |= {"source": absolute(source or str(prepared)), "mask": f"those in {prepared}"}
        about["sha256"] = None if source is None else source_digest(source)
    else:
        assert source is not None
        limit = resolve_max_length(
            max_length, tokenizer_limit=vocabulary.tokenizer.model_max_length, positions=positions
        )
        table = open_table(source, split="train", hints=hints)
        format = format_of(table.names, table.name, **(named or {}))
        evaluated = conversations_of(evaluation, hints, format, answers=False)
        result = audit_table(table, format, vocabulary, limit, progress)
        about |= {"source": absolute(source), "sha256": source_digest(table), "hints": asdict(hints)}
        about["mask"] = "those that tsqlora train would make; other trainers cut and mask in other ways"
    how = {"every": every, "trust_remote_code": trust_remote_code, "progress": progress, "tell": tell}
    look = partial(look_by_model, model, result, vocabulary, **how) if answers else None
    written = finish(out, about, result, evaluated, vocabulary, batch, look)
    if before is not None:
        now = {one["name"]: one["rows"] for one in written["findings"]}
        both = [{"name": n, "before": before.get(n, 0), "now": now.get(n, 0)} for n in sorted({*now, *before})]
        written["changes"] = [one for one in both if one["before"] != one["now"]]
    return {**written, "seconds": time.perf_counter() - start}


def audit_trainer(
    trainer: Trainer, *, data: Any = None, evaluation: Any = None, out: Path | None = None
) -> dict[str, Any]:
    """Reconcile the train_dataset of a Trainer that was built, as its collator makes batches of it, with its rows.

    Raises UnsupportedError for a stream, SettingsError for a Trainer without a tokenizer, DataError for rows without
    token ids.
    """
    start, made, model = time.perf_counter(), trainer.train_dataset, cast(Any, trainer.model)
    made = undrawn(made)
    if out is not None:
        require_new(out)
    if not hasattr(made, "__len__"):
        raise UnsupportedError("the Trainer's train_dataset is a stream; audit its first rows, as a datasets.Dataset")
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if tokenizer is None:
        raise SettingsError("the Trainer has no tokenizer; give it as processing_class")
    vocabulary = vocabulary_of_model(tokenizer, model.config, model.generation_config, size_of=model)
    result = audit_sequences(made, row_collator(trainer), vocabulary, data=data)
    file = data if isinstance(data, str) and result.finds is not OF_TOKENS else None
    about = {
        "source": type(trainer).__name__ if file is None else absolute(file),
        "sha256": None if file is None else source_digest(file),
        "model": str(getattr(model.config, "_name_or_path", "")),
        "mask": f"those of the {type(trainer).__name__} and its collator",
    }
    evaluated = conversations_of(evaluation, answers=False)
    audited = finish(out, about, result, evaluated, vocabulary, trainer.args.train_batch_size)
    return {**audited, "seconds": time.perf_counter() - start}


def counts_in(path: Path) -> dict[str, int]:
    """How many rows have each finding of an earlier audit.  Raises DataError for another file."""
    reading(path)
    try:
        return {one["name"]: one["rows"] for one in json.loads(path.read_text(encoding="utf-8"))["findings"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"--baseline {path} is not the findings.json of an audit of text ({error})") from None


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


def finish(
    out: Path | None,
    about: Mapping[str, Any],
    result: Reconciled,
    evaluation: Sequence[Chat] | None,
    vocabulary: Vocabulary,
    batch: int,
    look: Callable[[], AnswerLook] | None = None,
) -> dict[str, Any]:
    """Gather the findings, and write ledger, findings, suspects and page into `out`; None returns the ledger.

    The ledger is written before `look` reads the answers, and again with what that finds.
    """
    rows, lines, lengths = result.rows, result.lines, lengths_of(result.lengths, batch, result.longest)
    further = among_rows(rows, lines, evaluation)
    if look is not None:
        write_ledger(out, lines, findings_of(lines, further))
    answers = AnswerLook([]) if look is None else look()
    suspects = {name: answers.rows(name) for name in answers.detections}
    for turn, owner in answers.owners.items():
        line = lines[answers.turns[turn].row]
        line.detail = line.detail or f"its answer fits the prompt of row {owner} best"
    further |= {name: sorted(places) for name, places in suspects.items()}
    if lengths is not None and lengths["padding"] > MOST_PADDING:
        further["lengths"] = [line.row for line in lines if line.tokens]
    findings = findings_of(lines, further, limit=result.longest)
    ledger = write_ledger(out, lines, findings)
    why_not = impossible(result.finds, evaluation=evaluation is not None, answers=bool(answers.turns))
    shown_names = {finding.name for finding in findings}.difference(OF_ALL)
    fates = Counter(line.fate.partition(" of ")[0] for line in lines)
    left = result.unmatched
    about = {
        **about,
        "format": result.format,
        "max_length": result.longest,
        **({} if left is None else {"unmatched": len(left), "unmatched_places": left}),
        "lengths": lengths,
        "rows": len(lines),
        "tokens": sum(line.tokens for line in lines),
        "trained_tokens": sum(line.trained_tokens for line in lines),
        "fates": dict(sorted(fates.items(), key=lambda one: one[0] != "trained")),
        "answers": None if look is None else answers.summary(),
        "findings": [
            {
                "name": finding.name,
                "severity": finding.severity,
                "share": len(finding.where) / max(1, len(lines)),
                "cause": finding.cause,
                "rows": len(finding.where),
                "places": list(finding.where),
                "cure": dict(finding.cure),
            }
            for finding in findings
        ],
        "cannot": {name: why for name, why in why_not.items() if name not in shown_names},
    }
    if out is None:
        return {**about, "ledger": ledger}
    names = ("rows", "hints", "source", "sha256", "model", "lengths", "answers", "findings", "cannot")
    cells = [
        {
            "row": (row := rows[place]).row,
            "finding": one.name,
            "probability": round(suspects[one.name][place], 3) if one.name in suspects else "",
            "prompt": "\n".join(message.content for message in row.question),
            "answer": row.answer,
            "reviewed": "",  # for the reader to fill in
        }
        for one in findings
        if one.name not in OF_ALL
        for place in one.where
    ]
    none: dict[str, Any] = dict.fromkeys(("row", "finding", "probability", "prompt", "answer", "reviewed"), "")
    tokens = result.of({place for finding in findings for place in finding.where[:OF_A_FINDING]})
    page = text_page(out, about, rows, lines, tokens, vocabulary, answers.by_token())
    record = {name: about[name] for name in names if name in about}
    write_audit(out / FINDINGS_FILE, record, cells or [none], page)
    return {**about, "out": str(out), "page": str(out / PAGE_FILE)}


def write_ledger(out: Path | None, lines: Sequence[Line], findings: Sequence[Finding]) -> pa.Table:
    """Return the lines as a table, each with the names of its findings; write it into `out`, if that is not None."""
    names = defaultdict(list[str])
    for finding in findings:
        for row in finding.where:
            names[row].append(finding.name)
    columns = {field.name: [getattr(line, field.name) for line in lines] for field in fields(Line)}
    del columns["shows"]
    ledger = pa.table(columns | {"findings": pa.array([names[line.row] for line in lines], pa.list_(pa.string()))})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / LEDGER_FILE, private=True) as unfinished:
            pq.write_table(ledger, unfinished)
    return ledger


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


def look_by_model(
    model: str,
    result: Reconciled,
    vocabulary: Vocabulary,
    *,
    every: bool,
    trust_remote_code: bool,
    progress: Progress | None,
    tell: Callable[[str], None],
) -> AnswerLook:
    """Look at a sample of the rows, or at all; a model that cannot be read here leaves only a note.

    `tell` gets the estimate of the time before the first batch.
    """
    if why := no_judge(model):
        return AnswerLook([], notes=[f"the model read no answers: {why}"])
    net: Any = load(AutoModelForCausalLM, model, dtype="auto", trust_remote_code=trust_remote_code)
    readable = np.array([row.row for row in result.rows if row.problem is None], np.int64)
    chosen = np.sort(np.random.default_rng([0, 45]).permutation(readable)[: None if every else SAMPLE])
    made = result.of({*chosen.tolist()})
    if result.finds is OF_LABELS:  # these show where the answers are
        turns = turns_in((one for row in chosen.tolist() for one in made.get(row, ())), vocabulary)
    else:
        own = ((result.rows[row], made.get(row, ())) for row in chosen.tolist())
        turns = [turn for row, some in own for turn in turns_of(row, some, vocabulary)]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    net = net.to(device)
    compute = Compute(READ, torch.bfloat16, progress=progress)
    if len(turns) >= LEAST_TURNS:
        few = [behind(turn.prompt, turn.answer) for turn in turns[:: max(1, len(turns) // TIMED)][:TIMED]]
        start = time.perf_counter()
        read_answers(net, few, vocabulary.stops, replace(compute, progress=None), phase="timing")
        minutes = PASSES * len(turns) / len(few) * (time.perf_counter() - start) / 60
        about = f", for about {minutes:.0f} minutes; --no-model leaves this out" if minutes >= 1 else ""
        tell(f"reads {len(turns):,} answers of {len(chosen):,} rows{about}")
    return look_at_answers(net, turns, vocabulary, compute)


def no_judge(model: str) -> str:
    """Say why a model cannot read answers here; "" if it can."""
    folder = model if Path(model).is_dir() else cached_model(model, "main")
    files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("pytorch_model*.bin")] if folder else []
    if not files:
        return f"the weights of {model} are not on this machine"
    size = MARGIN * sum(path.stat().st_size for path in files)
    try:
        machine = 1024 * int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0])
    except (OSError, IndexError):  # not Linux: all that the machine has
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else machine
    if size > free:
        return (
            f"{model} needs {size / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free; "
            "give --model a smaller one with the same tokenizer"
        )
    return ""
