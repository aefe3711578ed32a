"""What strangers' files look like: random, damaged, malicious.  Tests draw a few cases, fuzz.py many."""

import json
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO, StringIO
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import peft  # noqa: F401  (first: the hook that checks shapes compiles again what is imported within ours)
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st
from rich.console import Console

from tables import cells_of, read_as
from tsqlora.adapter.doctor import examine
from tsqlora.adapter.files import CONFIG, WEIGHTS, read_adapter
from tsqlora.adapter.template import compare_template
from tsqlora.auditing.texts.command import prepared_set
from tsqlora.auditing.texts.prepared import sequences_of
from tsqlora.cli.display import show_doctor
from tsqlora.record import RunRecord
from tsqlora.rows.splits import read_data
from tsqlora.rows.write import WRITERS, write_rows
from tsqlora.run_dir import RECORD_FILE
from tsqlora.settings import Config, Section, dump_config, load_config, template


@dataclass(frozen=True)
class Case:
    """Files of a directory by name, links in it by name, and what a reader gets besides."""

    files: Mapping[str, bytes]
    links: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[Any, ...] = ()


def lay(case: Case, folder: Path) -> None:
    """Puts a case's files and links into a directory."""
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    for name, target in case.links.items():
        os.symlink(target, folder / name)


# ------------------------------------------------------------------------------- values

_TEXTS = (
    "", " ", "\0", "\r", "\u2028", "\u202etxt.exe", "\x1b[2J\x1b]0;owned\x07", "𝕳\u0301", "a" * 5000, "1" * 5000,
    "nan", "null", "=cmd|' /C calc'!A0", "@SUM(1+1)", "<script>alert(1)</script>", "[bold]", "{{7*7}}", "%s%n",
    "../../../etc/passwd", "/etc/passwd", "~nobody-of-this-name/x", "file:///etc/passwd",
    "(a+)+$", "(.*)*x", "(a|aa)+$",
)  # fmt: skip
_NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63) - 1, 2**64, 10**400, 0.0, -0.0, 5e-324, 1e308, float("inf"), float("nan"))

texts = st.one_of(st.sampled_from(_TEXTS), st.text(max_size=20))
scalars = st.one_of(st.none(), st.booleans(), st.sampled_from(_NUMBERS), st.integers(), st.floats(), texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
deep = st.builds(
    lambda depth, kind: kind[0] * depth + kind[1] * depth,
    st.sampled_from([50, 900, 5000]),
    st.sampled_from(["[]", ("{a: ", "}"), ('{"a":', "}"), ("- ", ""), ("? ", "")]),
)


@st.composite
def damaged(draw: st.DrawFn, sound: st.SearchStrategy[bytes]) -> bytes:
    """Sound bytes with pieces cut out, doubled, overwritten or put in."""
    content = draw(sound)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 1, 4, 8, 64])))
        piece = draw(st.one_of(st.binary(max_size=8), st.sampled_from(_PIECES), st.just(content[start:end] * 2)))
        content = content[:start] + piece + content[end:]
    return content


_WORD = re.compile(rb'"[^"\n]{0,200}"|-?\d+(?:\.\d+)?|true|false|null|[A-Za-z_]\w*')
_OTHERS: Mapping[bytes, Sequence[bytes]] = {
    b'"': (b'""', b'"\\u0000"', b'"(.*)*x"', b'"../x"', b'"=1+1"', b'"\\ud800"', b'"layers.1.q"', b'"F16"', b'"b"'),
    b"-0123456789": b"0 1 -1 2 3.5 8 1e999 NaN 99999999999999999999 9007199254740993".split(),
    b"": (b"null", b"true", b"[]", b"{}", b"[[1]]", b"x", b"0"),
}


def varied(case: Case, random: Random) -> Case:
    """The same files with a word, a byte or a piece of one of them changed, which is quick."""
    if not case.files:
        return case
    name = random.choice(sorted(case.files))
    content = case.files[name]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        words = list(_WORD.finditer(content, 0, 4000)) if random.random() < 0.8 else []
        if words:
            word = random.choice(words)
            start, end = word.span()
            alike = next(others for firsts, others in _OTHERS.items() if not firsts or word.group()[:1] in firsts)
            piece = random.choice((random.choice(words).group(), random.choice(alike), random.choice(alike)))
        else:
            start = random.randint(0, len(content))
            end = min(len(content), start + random.choice((0, 1, 1, 1, 4)))
            piece = random.choice(_PIECES) if random.random() < 0.4 else random.randbytes(random.randint(0, 2))
        content = content[:start] + piece + content[end:]
    return replace(case, files={**case.files, name: content})


_PIECES = (
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b",", b"\t", b"[" * 2000, b"9" * 5000, b"\xed\xa0\x80",
)  # fmt: skip


# --------------------------------------------------------------------------- settings


def _keys(section: type[Section] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            keys += _keys(info.annotation, f"{prefix}{name}.")
    return keys


def _multiplied(first: str, step: str) -> str:
    """Eight anchors, each of nine aliases to the one before it."""
    lines = [f"a: &a {first}"]
    for before, name in pairwise("abcdefgh"):
        lines.append(f"{name}: &{name} {step % ','.join([f'*{before}'] * 9)}")
    return "\n".join(lines)


_BOMBS = (
    _multiplied("[x, x]", "[%s]"),
    _multiplied("{k: 1}", "{<<: [%s]}"),
    "training: &a\n  logging_steps: *a\n",
    "training: {logging_steps: &a [*a]}\n",
    "model: !!python/object/apply:os.system ['touch /tmp/owned']\n",
    "model: {path: !!bool x}\n",
    "model: {path: !!int ''}\n",
    "model: {path: !!timestamp x}\n",
    "? !!str [a]\n: b\n",
    "? [a, b]\n: c\n",
    "training: {epochs: 0x" + "f" * 6000 + "}\n",
    "training: {epochs: " + "9" * 6000 + "}\n",
    "ranks: {mean: 1.0e+308}\n",
    "%YAML 9.9\n---\n",
    "--- a\n--- b\n",
    "\tmodel: x\n",
)
_KEYWORDS = ("<<", "&a", "*a", "!!str", "!!binary", "model", "path", "ranks", "mean", "0x", "1e9")
_WORDS = (*"[]{}:,-?!&*|>'\"%#@` \n", "  ", *_KEYWORDS)


@st.composite
def _nested(draw: st.DrawFn) -> bytes:
    """Known and unknown keys at hostile values."""
    tree: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    for _ in range(draw(st.integers(1, 3))):
        *sections, name = draw(st.sampled_from(_KEYS)).split(".")
        here = tree
        for section in sections:
            if not isinstance(here.get(section), dict):
                here[section] = {}
            here = here[section]
        here[draw(texts) if draw(st.integers(0, 9)) == 0 else name] = draw(values)
    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (ValueError, yaml.YAMLError):
        return json.dumps(tree).encode()


_KEYS = (*_keys(), "training.logging_steps", "training.hub_token", "training.optim", "training.output_dir")

_SOUND = b"""model: {path: m, dtype: float32}
data: {train: t.jsonl, text: text, max_length: 64}
quality: {fraction: 0.5, preset: paper}
ranks: {mean: 4.0, min: 0, max: 16}
adapter: {target_modules: [query, value], dropout: 0.1}
training: {epochs: 3, learning_rate: 5e-4, seed: 7, logging_steps: 10, optim: adamw_torch}
"""

settings_files = st.one_of(
    st.just(_SOUND),
    _nested(),
    damaged(st.just(template().encode())),
    st.lists(st.sampled_from(_WORDS), max_size=40).map(lambda words: "".join(words).encode()),
    st.sampled_from(_BOMBS).map(str.encode),
    deep.map(str.encode),
    st.binary(max_size=60),
)
overrides = st.lists(
    st.one_of(
        st.builds(lambda key, value: f"{key}={value}", st.sampled_from(_KEYS), texts),
        st.builds(lambda key, value: f"{key}={value}", st.sampled_from(_KEYS), deep),
        texts,
    ),
    max_size=2,
)


def read_settings(folder: Path, case: Case) -> None:
    config = load_config(folder / "tsq.yaml", case.extra)
    (folder / "again.yaml").write_text(dump_config(config))
    assert load_config(folder / "again.yaml").model_dump() == config.model_dump()


# ------------------------------------------------------------------------------- rows

_rows = st.lists(
    st.one_of(
        st.fixed_dictionaries({"text": texts, "label": st.one_of(st.integers(0, 2), texts)}),
        st.dictionaries(st.one_of(st.sampled_from(["text", "label", "text_pair"]), texts), values, max_size=4),
    ),
    max_size=8,
)


def _lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def _delimited(cells: list[list[str]], delimiter: str, end: str) -> bytes:
    quoted = [delimiter.join(f'"{cell}"' if len(cell) != 1 else cell for cell in row) for row in cells]
    return (f"text{delimiter}label{end}" + end.join(quoted)).encode("utf-8", "surrogatepass")


_LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\r", "\n\n"])
_sound_cells = st.tuples(st.sampled_from(["x", "y, z", "'=1", "=1+1"]), st.sampled_from("ab")).map(list)


def _table_files(delimiter: str) -> st.SearchStrategy[bytes]:
    sound = st.lists(_sound_cells, min_size=4, max_size=8)
    wild = st.lists(st.lists(texts, min_size=1, max_size=3), max_size=8)
    tables = st.builds(_delimited, st.one_of(sound, wild), st.just(delimiter), _LINE_ENDS)
    return st.one_of(tables, damaged(tables), st.binary(max_size=60))


_sound_rows = st.lists(
    st.fixed_dictionaries(
        {"text": texts.map(lambda text: text.strip() or "x"), "label": st.sampled_from(["a", "b"])},
        optional={"more": values},
    ),
    min_size=4,
    max_size=8,
)

_json_files = st.one_of(
    _sound_rows.map(_lines),
    _sound_rows.map(lambda rows: json.dumps(rows).encode()),
    damaged(_rows.map(_lines)),
    damaged(_rows.map(lambda rows: json.dumps(rows).encode())),
    deep.map(lambda text: f'{{"text": {text}, "label": 1}}'.encode()),
    values.map(lambda value: json.dumps(value).encode()),
    st.just(b'{"text": "a", "text": "b", "label": 1}\n{"text": "c", "label": 2}\n'),
    st.binary(max_size=60),
)
_TYPES = (
    pa.string(), pa.large_string(), pa.binary(), pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_(),
    pa.null(), pa.timestamp("us", "+99:99"),
    pa.date32(), pa.date64(), pa.time64("ns"), pa.timestamp("s"), pa.timestamp("ns", "Mars/Phobos"),
    pa.duration("ns"), pa.decimal128(38, 10), pa.list_(pa.int64()), pa.struct([("a", pa.string()), ("b", pa.int8())]),
    pa.map_(pa.string(), pa.int32()), pa.dictionary(pa.int8(), pa.string()),
)  # fmt: skip


@st.composite
def _parquet(draw: st.DrawFn) -> bytes:
    """Columns of any type; bits of the values are random."""
    count = draw(st.integers(0, 5))
    names, columns = [], []
    for name in draw(st.lists(st.one_of(st.sampled_from(["text", "label"]), texts), min_size=1, max_size=3)):
        kind = draw(st.sampled_from(_TYPES))
        width = kind.bit_width // 8 if pa.types.is_primitive(kind) and kind.bit_width >= 8 else 0
        if width:
            raw = draw(st.binary(min_size=width * count, max_size=width * count))
            column = pa.Array.from_buffers(kind, count, [None, pa.py_buffer(raw)])
        elif kind in (pa.string(), pa.binary()):
            raw = [draw(st.binary(max_size=6)) for _ in range(count)]
            column = pa.array(raw, pa.binary()).view(kind)
        else:
            column = pa.nulls(count, kind)
        names.append(name)
        columns.append(column)
    file = BytesIO()
    try:
        pq.write_table(pa.Table.from_arrays(columns, names=names), file)
    except (pa.ArrowException, ValueError, OverflowError):
        return b"PAR1"
    return file.getvalue()


def _sound_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = BytesIO()
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in ("text", "label")}), file)
    return file.getvalue()


_parquet_files = st.one_of(_sound_rows.map(_sound_parquet), _parquet(), damaged(_parquet()))


def read_file_of_rows(folder: Path, case: Case) -> None:
    """As `train` reads it, and as `predict` writes it again."""
    name, classes, suffix = case.extra
    write_rows(folder / f"out{suffix}", cells_of(folder / name))
    read_data(
        str(folder / name), None, None, **read_as("class" if classes else "number"), validation_fraction=0.25, seed=0,
    )  # fmt: skip


def _row_case(suffix: str, content: bytes, classes: bool, out: str) -> Case:
    return Case({f"train{suffix}": content}, extra=(f"train{suffix}", classes, out))


def _row_cases(suffixes: list[str], contents: st.SearchStrategy[bytes]) -> st.SearchStrategy[Case]:
    return st.builds(
        _row_case,
        st.sampled_from(suffixes),
        contents,
        st.sampled_from([True, True, False]),
        st.sampled_from(list(WRITERS)),
    )


# ---------------------------------------------------------------------------- adapters

_MODULES = ("layers.0.q", "layers.1.q", "layers.0.wte", "q", "layers.10.conv", "1" * 5000, "layers.999.q", "a.0.b.1.c")
_SLOTS = (
    "lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "weight",
    "base_layer.weight",
)  # fmt: skip
_SIZES = {8: ("F64", "I64", "C64"), 4: ("F32",), 2: ("F16", "BF16", "U16"), 1: ("BOOL", "F8_E4M3", "F8_E5M2")}
_DTYPES = {name: size for size, names in _SIZES.items() for name in names} | {"X": 4}


def safetensors_bytes(tensors: Mapping[str, tuple[str, list[int], bytes]], **lies: Any) -> bytes:
    """A file in safetensors' format; `lies` overwrite a tensor's entry in the header."""
    header: dict[str, Any] = {}
    body = b""
    for name, (dtype, shape, content) in tensors.items():
        about = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
        header[name] = about | lies
        body += content
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + body


def _mostly(usual: Any, other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 15).flatmap(lambda n: other if n == 0 else st.just(usual))


def _bytes_of(draw: st.DrawFn, dtype: str, shape: list[int]) -> bytes:
    size = _DTYPES[dtype]
    for length in shape:
        size *= length
    kind = draw(st.sampled_from(["zeros", "random", "random", "nan"]))
    if size > 1 << 16 or kind == "zeros":
        return bytes(min(size, 1 << 16))
    if kind == "nan":
        return b"\xff" * size
    return draw(st.binary(min_size=min(size, 64), max_size=64)).ljust(size, b"\x3c")[:size]


@st.composite
def _weights(draw: st.DrawFn) -> tuple[int, bytes]:
    rank = draw(_mostly(2, st.sampled_from([1, 8, 0])))
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    for module in draw(st.lists(st.sampled_from(_MODULES), min_size=1, max_size=4, unique=True)):
        inputs, outputs = draw(_mostly((4, 3), st.sampled_from([(1, 1), (8, 8), (2**40, 0), (0, 4)])))
        dtype = draw(_mostly("F32", st.sampled_from(list(_DTYPES))))
        for slot, shape in (("lora_A.weight", [rank, inputs]), ("lora_B.weight", [outputs, rank])):
            content = _bytes_of(draw, dtype, shape)
            tensors[f"base_model.model.{module}.{slot}"] = (dtype, shape, content)
    for _ in range(draw(_mostly(0, st.integers(1, 2)))):
        name = f"base_model.model.{draw(st.sampled_from(_MODULES))}.{draw(st.sampled_from(_SLOTS))}"
        dtype = draw(st.sampled_from(list(_DTYPES)))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 2**40]), max_size=3))
        tensors[draw(st.sampled_from([name, draw(texts)]))] = (dtype, shape, _bytes_of(draw, dtype, shape))
    lies = draw(_mostly({}, _lies))
    return rank, safetensors_bytes(tensors, **lies)


_lies = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), values, max_size=2)

_SETTINGS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "task_type", "auto_mapping", "bias", "peft_type",
    "base_model_name_or_path", "target_modules", "modules_to_save", "init_lora_weights", "layer_replication",
    "use_dora", "fan_in_fan_out", "megatron_config", "revision", "target_parameters", "trainable_token_indices",
)  # fmt: skip


def _mapping(keys: list[str], inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.one_of(st.sampled_from(keys), texts), inner, max_size=2)


_FITTING: Mapping[str, st.SearchStrategy[Any]] = {
    "rank_pattern": _mapping(["q", "layers.*", "(.*)*x", "^q", "(1|11)+$"], st.integers(-1, 9)),
    "alpha_pattern": _mapping(["q", "(.+)+y", ".*0.*"], scalars),
    "base_model_name_or_path": st.one_of(texts, st.sampled_from(["/etc", ".", "..", "src", "org/model", "a/b/c"])),
    "auto_mapping": _mapping(["base_model_class"], st.one_of(texts, st.sampled_from(["pipeline", "logging", "os"]))),
    "task_type": st.one_of(st.sampled_from(["SEQ_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION"]), values),
}


@st.composite
def adapters(draw: st.DrawFn) -> Case:
    rank, weights = draw(_weights())
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank or 4, "lora_alpha": 16, "base_model_name_or_path": None}
    for name in draw(st.lists(st.sampled_from(_SETTINGS), max_size=2)):
        config[name] = draw(st.one_of(_FITTING.get(name, values), values))
    content = json.dumps(config).encode()
    if draw(st.integers(0, 7)) == 0:
        content = draw(st.one_of(damaged(st.just(content)), deep.map(str.encode), st.binary(max_size=40)))
    if draw(st.integers(0, 7)) == 0:
        weights = draw(damaged(st.just(weights)))
    files, links = {CONFIG: content, WEIGHTS: weights}, {}
    match draw(st.integers(0, 31)):
        case 0:
            files["adapter_model.bin"] = files.pop(WEIGHTS)
        case 1:
            del files[CONFIG]
            links[CONFIG] = draw(st.sampled_from(["/etc/passwd", "/dev/zero", CONFIG, "../x", "."]))
        case 2:
            files[draw(st.sampled_from(["evil.pkl", "x.PT", "README.md"]))] = b"cos\nsystem\n(S'exit 1'\ntR."
    return Case(files, links)


def read_one_adapter(folder: Path, case: Case) -> None:
    read_adapter(folder)


def ask_the_doctor(folder: Path, case: Case) -> None:
    """As `tsqlora doctor` prints it, in both forms."""
    report = examine(folder)
    json.dumps(report)
    show_doctor(Console(file=StringIO(), width=80), report)


# ------------------------------------------------------------------------------- runs

_RECORD = {
    "status": "finished", "seed": 0, "task": "sequence-classification", "labels": ["a", "b"],
    "data": {"hash": "0", "columns": {"text": "text", "text_pair": None, "label": "label"}, "max_length": 8},
    "plan": {"rows": {"train": 1}, "bf16": False}, "versions": {}, "cost": {}, "quality": {}, "ranks": {"l.0.q": 2},
    "rank_events": [], "parameters": {}, "metrics": {"test": {"accuracy": 0.5}}, "notes": [], "history": [],
}  # fmt: skip


@st.composite
def records(draw: st.DrawFn) -> Case:
    record: dict[str, Any] = dict(_RECORD)
    for name in draw(st.lists(st.sampled_from([*_RECORD, "further"]), max_size=2)):
        record[name] = draw(values)
    content = json.dumps(record).encode()
    if draw(st.integers(0, 3)) == 0:
        content = draw(
            st.one_of(damaged(st.just(content)), deep.map(str.encode), values.map(lambda v: json.dumps(v).encode()))
        )
    return Case({RECORD_FILE: content, "config.yaml": b"model: {path: m}\ndata: {train: t.jsonl}\n"})


def read_record(folder: Path, case: Case) -> None:
    RunRecord.load(folder)


# ---------------------------------------------------------------- prepared sets and templates

_ids = _mostly([1, 2, 3], st.one_of(st.lists(st.integers(-2, 9), max_size=4), values))
_prepared_rows = st.lists(
    st.fixed_dictionaries(
        {"input_ids": _ids},
        optional={
            name: st.one_of(_ids, st.just([0, 1, 1]))
            for name in ("labels", "attention_mask", "completion_mask", "position_ids", "seq_lengths")
        },
    ),
    min_size=1,
    max_size=4,
)
_prepared_pairs = st.lists(
    st.fixed_dictionaries({"prompt_ids": _ids, "chosen_ids": _ids}, optional={"rejected_ids": _ids}), min_size=1
)


def _arrow(rows: list[dict[str, Any]]) -> bytes:
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        table = pa.table({"input_ids": [[1, 2]]})
    file = BytesIO()
    with pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return file.getvalue()


@st.composite
def prepared_sets(draw: st.DrawFn) -> Case:
    """What `save_to_disk` writes."""
    rows = draw(st.one_of(_prepared_rows, _prepared_rows, _prepared_pairs))
    state: dict[str, Any] = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "0", "_split": "train"}
    state |= {"_format_type": None, "_format_columns": None, "_format_kwargs": {}, "_output_all_columns": False}
    state |= draw(_mostly({}, _mapping(list(state), values)))
    files = {
        "data.arrow": draw(_mostly(_arrow(rows), damaged(st.just(_arrow(rows))))),
        "state.json": json.dumps(state).encode(),
        "dataset_info.json": json.dumps(draw(_mostly({}, values))).encode(),
    }
    return Case(files)


def read_prepared_set(folder: Path, case: Case) -> None:
    for one in sequences_of(prepared_set(folder)):
        assert len(one.ids) == len(one.targets)


_TEMPLATES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}",
    "{% generation %}{{ messages[0]['content'] | tojson }}{% endgeneration %}{{ strftime_now('%Y') }}",
    "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}", "{% for a in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}", "{{",
)  # fmt: skip
_contract_parts = {
    "base": "m", "template": "", "special_tokens": {"eos_token": "</s>"}, "stop_tokens": ["</s>"],
    "stops_trained": True, "prompts": [{"messages": [{"role": "user", "content": "a"}], "text": "a", "ids": [1]}],
}  # fmt: skip


@st.composite
def contracts(draw: st.DrawFn) -> Case:
    contract = _contract_parts | draw(_mostly({}, _mapping(list(_contract_parts), values)))
    content = json.dumps(contract).encode()
    return Case(
        {
            "template.json": draw(_mostly(content, damaged(st.just(content)))),
            "other.jinja": draw(st.one_of(st.sampled_from(_TEMPLATES), texts)).encode("utf-8", "surrogatepass"),
        }
    )


def compare_with_contract(folder: Path, case: Case) -> None:
    """As `tsqlora doctor RUN --template FILE` does."""
    compare_template(folder, folder / "other.jinja")


# ------------------------------------------------------------------------------ targets

Target = tuple[st.SearchStrategy[Case], Callable[[Path, Case], None]]

TARGETS: Mapping[str, Target] = {
    "settings": (
        st.builds(lambda content, more: Case({"tsq.yaml": content}, extra=tuple(more)), settings_files, overrides),
        read_settings,
    ),
    "JSON": (_row_cases([".jsonl", ".json"], _json_files), read_file_of_rows),
    "CSV": (_row_cases([".csv"], _table_files(",")), read_file_of_rows),
    "TSV": (_row_cases([".tsv"], _table_files("\t")), read_file_of_rows),
    "Parquet": (_row_cases([".parquet"], _parquet_files), read_file_of_rows),
    "adapter": (adapters(), read_one_adapter),
    "doctor": (adapters(), ask_the_doctor),
    "record": (records(), read_record),
    "prepared": (prepared_sets(), read_prepared_set),
    "template": (contracts(), compare_with_contract),
}
