"""Decide which rows each split has, with columns and labels; leave out incomplete rows, and encode the others."""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from heapq import heapify, heappop, heappush
from shlex import quote
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tsqlora.errors import DataError, SettingsError, few
from tsqlora.libs.deepspeed import whole_shape
from tsqlora.rows.chat import PLAINLY, Format, are_answers
from tsqlora.rows.labels import (
    LabelKind,
    LabelMap,
    are_measures,
    classes_of,
    distinct_labels,
    encode_labels,
    encode_targets,
    look_alikes,
    looks_missing,
    mostly_numbers,
)
from tsqlora.rows.media import require_reader, why_unread
from tsqlora.rows.readers import SNIFF, Hints
from tsqlora.rows.rows import (
    Columns,
    NoColumnError,
    Row,
    is_missing,
    lacking,
    one_hot_columns,
    quoted,
    row_hash,
    sample_hash,
    text_at,
)
from tsqlora.rows.sources import ORDER, open_tables
from tsqlora.rows.table import Samples, Table, store
from tsqlora.rows.tokens import Encode, left_out

MEASURED = ("validation", "test")
"""The splits that training only measures."""

Find = Callable[..., tuple[Columns, Format | None]]
"""Takes the names of a file's columns, and its own as `source`."""
Lacks = Callable[[Row], str | None]
"""What a row lacks, in words; None for nothing."""
MANY_CLASSES = 20
"""So many different labels may be classes however few the rows."""
_SHOWN, _GROUPS = 5, 10
"""Rows that a note lists for each reason."""


def read_data(
    train: str,
    validation: str | None,
    test: str | None,
    *,
    find: Find,
    columns: Mapping[str, str | None] | None = None,
    label: LabelKind | None = None,
    validation_fraction: float,
    seed: int,
    trusted: str | None = None,
    holds_out: bool = True,
    max_bad_rows: float = 0.0,
    hints: Hints = SNIFF,
    numbers: bool = False,
) -> dict[str, Table]:
    """Read the splits: train, trusted if named, validation (a seeded share of train if not named), and test if any.

    `find` chooses the columns and, of text, the format, by the settings in `columns`; `label` says what a cell holds of
    the classes, and None means numbers or texts. Every label is checked. Rows without a text or a label are left out,
    with a warning, up to the share `max_bad_rows` of a split. A test split beside the training rows that has no labels
    is left out, with a warning: benchmarks keep theirs secret. Without `holds_out` all rows train. With
    `numbers` class numbers do not get the names that a data set has for them; else those of the training rows serve
    for splits that have none. Raises DataError with file and row.
    """
    tables = open_tables(train, validation, test, trusted, hints)
    first, tags, used = tables["train"], label is not None and label.by_token, None
    if not any(name.strip() for name in first.names):
        raise DataError(f"{first.name}: its rows have no columns with a name; write a text and a label into each")
    try:
        used, format = find(first.names, source=first.name, **(columns or {}))
        flags = used.label is None and format is None and label is not None and not tags
        if flags and (names := one_hot_columns((row.cells for row in first), used, first.names)):
            used = replace(used, label="label", one_hot=names)
            note = f"{first.name}: each of the columns {quoted(names)}, which hold zeros and ones, is a label"
            tables["train"] = first.noted(note, warn=False)
        if used.label is None and format is None:
            raise NoColumnError(f"{first.name} has no label column")
    except DataError as error:
        if holds_out and {"chosen", "rejected"} <= {*first.names}:
            cure = "to score chosen and rejected answers, set task.type to preference; DPOTrainer of TRL trains on them"
        elif not any((columns or {}).values()) and are_answers(first.names):
            cure = "of chats, or of prompts with answers, set task.type to causal-lm"
        elif isinstance(error, NoColumnError):
            cure = _naming(first, {**(columns or {}), "text": None if used is None else used.text})
        else:
            raise
        raise DataError(f"{error}; {cure}") from error
    named = {} if numbers or (label is None and format is None) else first.class_names
    tables = {
        name: replace(table.using(used, format=format), class_names=named and (table.class_names or named))
        for name, table in tables.items()
    }
    if test is None and "test" in tables and used.label is not None:
        cells = (row.cells.get(used.label) for row in tables["test"])
        if all(is_missing(cell) or cell in (-1, "-1") for cell in cells):
            warnings.warn(f"{tables['test'].name} has no labels in column '{used.label}' and is left out", stacklevel=2)
            del tables["test"]
    tables = {name: complete(table, max_bad_rows, tags=tags) for name, table in tables.items()}
    tables["train"], groups = _with_classes(tables["train"], label)
    if "validation" not in tables and holds_out:
        both = tables["train"]
        out = held_out(groups, fraction=validation_fraction, seed=seed, source=first.name)
        tables |= {n: replace(both, ids=both.ids[mask]) for n, mask in (("train", ~out), ("validation", out))}
    return {name: replace(tables[name], classes=tables["train"].classes) for name in ORDER if name in tables}


def _naming(table: Table, named: Mapping[str, str | None]) -> str:
    """The settings that name text and label, by the first rows: the longest text, and few different labels."""
    rows = [row.cells for row in next(table.chunks())]
    single = [name for name in table.names if not any(isinstance(row.get(name), dict) for row in rows)]
    written = {name: [str(row.get(name)) for row in rows] for name in single if name.strip()}
    text = named.get("text") or max(written, key=lambda name: sum(map(len, written[name])))
    counts = {name: len({*cells}) for name, cells in written.items() if name not in (text, named.get("text_pair"))}
    # Neither one value in all rows nor another one in each row is a label.
    likely = sorted(counts, key=lambda name: (not 1 < counts[name] <= max(MANY_CLASSES, len(rows) / 2), counts[name]))
    if not likely and not named.get("label"):
        return "set task.type to causal-lm, for a model that writes text; a classifier needs a column of labels"
    chosen = {"text": text, "label": named.get("label") or next(iter(likely), None)}
    words = [f"--set {quote(f'data.{key}={name}')}" for key, name in chosen.items() if name is not None]
    return (
        f"add {' '.join(words)}, or name other columns (those that look like labels first: {quoted(likely)}); or set "
        "task.type to causal-lm, for a model that writes text"
    )


def held_out_rows(tables: Mapping[str, Table]) -> int:
    """Rows of the training file that are the validation split."""
    validation = tables.get("validation")
    return len(validation) if validation is not None and validation.stored is tables["train"].stored else 0


def unmeasured(data: Mapping[str, Table]) -> str | None:
    """A note about classes of prepared training rows that have no row in the validation rows held out of them."""
    train, classes = data["train"], data["train"].classes
    if not held_out_rows(data) or classes is None or not classes.kind.single:
        return None
    measured = {*data["validation"].samples.labels.tolist()}
    rows = Counter(number for number in train.samples.labels.tolist() if number not in measured)
    if not rows:
        return None
    shown = ", ".join(
        f"{classes.names[number]!r} ({count} row{'s' if count > 1 else ''})"
        for number, count in rows.most_common()[-_GROUPS:]
    )
    more = ", …" if len(rows) > _GROUPS else ""
    return (
        f"{train.name}: classes with too few rows for validation, whose metrics leave them out: {shown}{more}; "
        "add rows, or set data.validation"
    )


def complete(table: Table, most: float, *, tags: bool) -> Table:
    """The rows with text and label (or prompt and target); a note and a warning tell about the others.

    Raises DataError if the others are more than the share `most`.
    """
    lacks, bad = lacks_of(table.columns, table.format, tags=tags), dict[str, list[int | str]]()
    retained, unanswered = np.ones(len(table), dtype=np.bool_), 0
    for j, row in enumerate(table):
        reason, goes_on = (lacks(row), False) if table.format is None else table.format.lacks(row)
        unanswered += goes_on
        if reason is not None:
            bad.setdefault(reason, []).append(row.number)
            retained[j] = False
    if unanswered:
        table = table.noted(
            f"{table.name}: {unanswered:,} of {len(table):,} chats end with turns that have no answer; "
            "these turns are left out"
        )
    if (left_out := int((~retained).sum())) == 0:
        return table
    if left_out > most * len(table) or left_out == len(table):
        require_columns(table, bad)
        raise DataError(
            f"{table.name}: {left_out:,} of {len(table):,} rows are incomplete, more than data.max_bad_rows ({most:g}) "
            f"allows: {listed(bad, table.name)}; fill them in, or raise it"
        )
    table = table.noted(f"{table.name}: {left_out:,} of {len(table):,} rows are left out: {listed(bad, table.name)}")
    return replace(table, ids=table.ids[retained])


def require_columns(table: Table, bad: Iterable[str]) -> None:
    """Raise DataError if one of these reasons is a column that no row has."""
    used = table.columns
    for column in (used.text, used.text_pair, used.label):
        if column is not None and column not in table.names and any(f"column '{column}'" in reason for reason in bad):
            raise DataError(
                f"{table.name} has no column '{column}', which the training rows have; rename one of its columns: "
                f"{quoted(table.names)}"
            )


def listed(bad: Mapping[str, list[int | str]], source: str) -> str:
    """Each reason with its count and the numbers, or files, of the first rows.

    >>> listed({"no text in column 'text'": [4, 9], "no label in column 'label'": [7]}, "a.csv")
    "2 with no text in column 'text' (lines 4, 9), 1 with no label in column 'label' (line 7)"
    """
    line, parts = "row" if source.endswith((".parquet", ".json", "]")) else "line", []
    for reason, numbers in bad.items():
        unit = "file" if isinstance(numbers[0], str) else line
        units = f"{unit}s" if len(numbers) > 1 else unit
        where = f"{units} {few(numbers, _SHOWN)}{', from 1' * (unit == 'row')}"
        parts.append(f"{len(numbers):,} with {reason} ({where})")
    return ", ".join(parts)


def lacks_of(columns: Columns, format: Format | None, *, answers: bool = True, tags: bool = False) -> Lacks:
    """A function that says what a row lacks, with `answers` also a label or target; None for nothing.

    With `tags` a row lacks something, too, if it has not one tag for each token.
    """
    media, text, label = columns.media, columns.text, columns.label if answers else None
    if media:
        require_reader(media)
    used = {text: "tokens" if tags else "file" if media else "text", columns.text_pair: "text"}
    used[label] = "tags" if tags else "label"
    needed = {column: what for column, what in used.items() if column is not None}

    def lacks(row: Row) -> str | None:
        if format is not None:
            return format.lacks(row, answers=answers)[0]
        words, own = row.cells.get(text), row.cells.get(label or "")
        if tags and words == []:
            return f"no tokens in column '{text}'"
        if reason := lacking(row.cells, needed):
            return reason
        if tags and isinstance(words, list) and isinstance(own, list) and len(words) != len(own):
            return "unequal numbers of tokens and tags"
        return why_unread(text_at(row, text), media) if media else None

    return lacks


def _with_classes(table: Table, label: LabelKind | None) -> tuple[Table, np.ndarray]:
    """The table with the classes of its rows, and the number of each row's class; all 0 without a single class."""
    name, column = table.name, table.columns.label
    if label is None or column is None:
        if table.format is None and column is not None:
            encode_targets(table, column)
        return table, np.zeros(len(table), dtype=np.int32)
    # A data set that names its classes names each apart.
    apart = column in table.class_names
    values, groups, spellings = distinct_labels(table, column, label, typed=table.typed, apart=apart)
    if label.single and len(values) > max(MANY_CLASSES, len(table) / 2):
        numbers = " (numbers: set task.type to regression)" if mostly_numbers(values) else ""
        others = quoted(name for name in table.names if name not in (column, table.columns.text))
        raise DataError(
            f"{name}: column '{column}' has {len(values):,} different values in {len(table):,} rows, so it holds no "
            f"classes{numbers}"
            + (f"; set data.label to another column: {others}" if others else ", and there is no other column")
        )
    classes = replace(classes_of(values, name, column, label), spellings=spellings)
    rows = dict(zip(values, np.bincount(groups).tolist(), strict=True)) if label.single else {}
    return replace(table, classes=classes).noted(*(f"{name}: {one}" for one in _doubts(classes, column, rows))), groups


def _doubts(classes: LabelMap, column: str, rows: Mapping[str | int, int]) -> Iterator[str]:
    """What classes may not be meant as such; `rows` counts those of each single class."""
    if are_measures(classes.names):
        yield (
            f"the labels in column '{column}' are numbers with decimals, and each of {len(classes.names)} becomes a "
            "class; set task.type to regression if they are measurements"
        )
    if classes.kind.by_token and isinstance(classes.names[0], int):
        yield (
            f"the tags in column '{column}' are numbers without names, so span_f1 counts equal neighbours as spans, "
            "also those outside; write names, with O for outside"
        )
    for sign, by in ((",", "commas"), (";", "semicolons")):
        parts = {part.strip() for name in classes.names for part in str(name).split(sign)}
        numbers = all(re.fullmatch(r"[-+\d]*", part) for part in parts)  # with a decimal comma
        if 2 * len(parts) < len(classes.names) and not numbers:
            also = "" if classes.kind.joint else " and set task.type to multi-label-classification if a row has several"
            yield (
                f"the {len(classes.names)} classes in column '{column}' are {len(parts)} names joined by {by}; join "
                f"them by |{also}"
            )
    if classes.names[0] == -1 and 0 in classes.names:
        yield f"the label -1 in column '{column}' is a class like any other; remove its rows if it means no label"
    for missing in filter(looks_missing, rows):
        yield (
            f"the label {missing!r} of {rows[missing]:,} rows looks like a missing label, and is a class like any "
            "other; empty these cells if it means no label"
        )
    if alike := look_alikes(classes.names):
        shown = few([", ".join(map(repr, group)) for group in alike], _GROUPS, "; ")
        yield (
            f"these classes differ only in case, spaces or Unicode: {shown}; use one spelling if they are the same "
            "class"
        )
    if spelled := look_alikes([*classes.names, *classes.spellings]) if classes.spellings else []:
        what = "rows" if classes.kind.single else "labels"
        groups = [
            f"{' and '.join(map(repr, others))} as {name!r} in {sum(classes.spellings[one] for one in others):,} {what}"
            for name, *others in spelled
        ]
        yield (
            f"other spellings are read as their class: {few(groups, _GROUPS, '; ')}; if they are different classes, "
            "give them names that differ in more than case, spaces or Unicode"
        )


def held_out(groups: np.ndarray, *, fraction: float, seed: int, source: str) -> np.ndarray:
    """Draw a random `fraction` of the rows for validation, as a mask; `groups` numbers each row's class.

    Each class gives its share, by largest remainder, and keeps at least one row for training. Both sides have at least
    one row; the same groups and seed give the same split. Raises DataError if there are too few rows.
    """
    sizes = np.bincount(groups).tolist()
    # A class without training rows would be unknown to the model that is validated.
    most = [size - 1 for size in sizes]
    if sum(most) < 1:
        raise DataError(f"{source} has too few rows to hold out validation rows; set data.validation")
    shares = [size * fraction for size in sizes]
    quotas = [min(math.floor(share), limit) for share, limit in zip(shares, most, strict=True)]
    below = [(quotas[j] - shares[j], j) for j in range(len(sizes)) if quotas[j] < most[j]]
    heapify(below)
    for _ in range(min(max(1, round(sum(shares))), sum(most)) - sum(quotas)):
        _, j = heappop(below)
        quotas[j] += 1
        if quotas[j] < most[j]:
            heappush(below, (quotas[j] - shares[j], j))
    # Not a stream of `seeds`: other draws would move validation rows of older runs into training.
    rng = np.random.default_rng(seed)
    out = np.zeros(len(groups), dtype=np.bool_)
    by_class = np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])
    for rows, count in zip(by_class, quotas, strict=True):
        out[rng.permutation(rows)[:count]] = True
    return out


def prepare(
    tables: Mapping[str, Table], tokenizer: Any, *, max_length: int, encode: Encode, most: float = 0.0
) -> dict[str, Table]:
    """Encode every split, with its labels; `tokenizer` is what `encode` makes samples with.

    Samples are stored on disk, as in `store`. A row whose target does not fit whole is left out with a note. So are
    those that cannot be read or rendered, up to the share `most`. Raises DataError with the first if there are more.
    """
    prepared, trained = dict[str, Table](), np.empty(0, dtype=np.uint64)
    for name, table in tables.items():
        inputs, refused = list[int](), dict[int, DataError]()
        samples = store(_encoded(table, tokenizer, max_length, encode, inputs, refused))
        table = table.noted(*left_out(samples), warn=False)
        if refused:
            why, of = str(refused[min(refused)]), f"{len(refused):,} of {len(table):,} rows of {table.name}"
            if len(refused) > most * len(table) or len(refused) == len(table):
                raise DataError(f"{why}; {of} cannot be used, more than data.max_bad_rows ({most:g}) leaves out")
            table = table.noted(f"{of} are left out, such as this one: {why}")
        if table.format is not None and not len(samples):
            raise DataError(
                f"{table.name}: none of {len(samples.left_out)} targets fits whole into {max_length} tokens; "
                f"raise data.max_length to {min(needs for _, needs in samples.left_out)} or more"
            )
        numbers = np.array(inputs, dtype=np.uint64)
        trained = numbers if name == "train" else trained
        seen = np.isin(numbers, trained, kind="sort")  # whatever the label
        if name in MEASURED and seen.any():
            says = "are training rows too: their metrics say little about new rows"
            table = table.noted(f"{seen.sum()} of {len(seen)} {name} rows {says}", warn=False)
        prepared[name] = replace(table, samples=samples, ids=samples.ids)
    return prepared


def _encoded(
    table: Table, tokenizer: Any, max_length: int, encode: Encode, inputs: list[int], refused: dict[int, DataError]
) -> Iterator[Samples]:
    """Yield a table's samples, chunk by chunk; adds a number for the input of each, and the errors of other rows."""
    column, classes = table.columns.label, table.classes
    for rows in table.chunks():
        if table.format is not None:
            part = encode(rows, table.format, tokenizer, max_length=max_length, refused=refused)
            inputs.extend(int(name, 16) for name in part.hashes)
        else:
            assert column is not None
            labels = encode_targets(rows, column) if classes is None else encode_labels(rows, column, classes)
            part = encode(rows, table.columns, tokenizer, max_length=max_length, labels=labels)
            inputs.extend(_input_number(row, table) for row in rows)
        yield part


def require_embedded(tables: Mapping[str, Table], tokenizer: Any, model: Any) -> None:
    """Raises DataError naming the first row with a token that the model has no embedding for."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # but a processor of images or recordings
        return
    embeddings = whole_shape(model.get_input_embeddings().weight)[0]
    if len(tokenizer) <= embeddings:
        return
    for table in tables.values():
        for row, sample in zip(table.samples.ids.tolist(), table.samples, strict=True):
            if (token := max(sample["input_ids"])) >= embeddings:
                raise DataError(
                    f"{table.name}: row {row} has token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), and the "
                    f"model has {embeddings} embeddings; resize them to the tokenizer's {len(tokenizer)} tokens "
                    "(model.resize_token_embeddings) and train them, or give the model's own tokenizer"
                )


def without_measured(tables: Mapping[str, Table]) -> dict[str, Table]:
    """Drop trusted rows whose input a validation or test row has too; a note counts them.

    Raises DataError if no trusted row remains.
    """
    measured = [tables[name] for name in MEASURED if name in tables]
    if "trusted" not in tables or not measured:
        return dict(tables)
    trusted = tables["trusted"]
    own, others = (
        np.fromiter((_input_number(row, table) for table in some for row in table), dtype=np.uint64)
        for some in ([trusted], measured)
    )
    # By sorting: numpy 2.0's table overflows at hashes from 2⁶³ on.
    seen = np.isin(own, others, kind="sort")
    if not seen.any():
        return dict(tables)
    if seen.all():
        raise DataError(
            f"{trusted.name}: the inputs of all rows are also in validation or test rows, so no trusted row remains; "
            "name other rows in data.trusted, or others in data.validation and data.test"
        )
    note = f"{seen.sum()} of {len(seen)} trusted rows are left out: validation or test rows have the same input"
    return {**tables, "trusted": replace(trusted, ids=trusted.ids[~seen]).noted(note, warn=False)}


def _input_number(row: Row, table: Table) -> int:
    """A number for a row's input, without its label: the text with its pair, the prompt, or a text without one."""
    if table.format is None:
        return int(row_hash(row.cells, replace(table.columns, label=None)), 16)
    chat = table.format.read(row, PLAINLY)
    before = chat.messages[:-1]
    # Answers to one system prompt alone would all have the same input.
    read = chat.messages if all(message.role == "system" for message in before) else before
    texts = "".join(message.content for message in read)
    written = texts if chat.plain else json.dumps([(message.role, message.content) for message in read])
    return int(sample_hash(written, "", ""), 16)


def resolve_max_length(setting: int | None, *, tokenizer_limit: int, positions: int | None) -> int:
    """Tokens of a sample: the setting, else the lesser of the tokenizer's and the model's limit.

    Raises SettingsError if the setting exceeds the model's positions, and if neither names a limit.
    """
    limits = [limit for limit in (positions, tokenizer_limit) if limit is not None and limit < 10**9]
    if setting is None:
        if not limits:
            raise SettingsError("neither the model nor its tokenizer has a maximal length; set data.max_length")
        return min(limits)
    if positions is not None and setting > positions:
        raise SettingsError(f"data.max_length {setting} is above the model's {positions} positions; lower it")
    return setting
