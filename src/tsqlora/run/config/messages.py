"""What is said of settings: what each takes, and what is wrong with a given one."""

import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tsqlora.compat.yaml12 import inline_yaml
from tsqlora.errors import SettingsError, nearest
from tsqlora.run.config.settings import Config, Section


def explain(errors: Sequence[ErrorDetails], raw: Mapping[str, Any]) -> str:
    """What is most worth telling of a failed validation, with its dotted key.

    A mistyped key comes first: it is often why another is missing.
    """
    for error in errors:
        if error["type"] == "extra_forbidden":
            return _unknown_key(error["loc"])
    missing = [".".join(map(str, error["loc"])) for error in errors if error["type"] == "missing"]
    if missing:
        return f"{' and '.join(missing)} must be set; 'tsqlora init' prints an example"
    raised = errors[0].get("ctx", {}).get("error")
    if isinstance(raised, SettingsError):
        return str(raised)
    return _wrong_value(*_field_at(errors[0]["loc"]), raw)


def _unknown_key(loc: Sequence[int | str]) -> str:
    *sections, name = map(str, loc)
    section: type[Section] = Config
    for part in sections:
        section = _section_of(section.model_fields[part])
    return f"unknown key {'.'.join([*sections, name])!r}; {nearest(name, section.model_fields)}"


def _wrong_value(key: str, field: FieldInfo, raw: Mapping[str, Any]) -> str:
    value: Any = raw
    for part in key.split("."):
        value = value[part]
    shown = repr(value) if isinstance(value, str) else inline_yaml(value)
    if _is_section(field):
        return f"{key} is {shown}; it takes settings under it: {', '.join(_section_of(field).model_fields)}"
    unquoted = isinstance(value, int | float) and str in _members(field.annotation)
    hint = ", in quotes" if unquoted else ", not empty" if value in ("", []) else ""
    return f"{key} is {shown}; it takes {allowed(field)}{hint}"


def _field_at(loc: Sequence[int | str]) -> tuple[str, FieldInfo]:
    """The setting that an error is about; pydantic appends union members and list positions."""
    names = [str(loc[0])]
    field = Config.model_fields[names[0]]
    for part in map(str, loc[1:]):
        if not _is_section(field):
            break
        names.append(part)
        field = _section_of(field).model_fields[part]
    return ".".join(names), field


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _section_of(field: FieldInfo) -> type[Section]:
    assert isinstance(field.annotation, type)
    assert issubclass(field.annotation, Section)
    return field.annotation


_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[str]: "a list of texts",
    types.NoneType: "null",
}
_BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", ">="), Lt: ("lt", "<"), Le: ("le", "<=")}


def allowed(field: FieldInfo) -> str:
    """What a setting takes, in words: 'a number > 0 and <= 1, or null'."""
    first, *others = [_in_words(member) for member in _members(field.annotation)]
    bounds = [
        f"{symbol} {getattr(bound, attribute)}"
        for kind, (attribute, symbol) in _BOUNDS.items()
        for bound in field.metadata
        if isinstance(bound, kind)
    ]
    first = " ".join([first, " and ".join(bounds)]).strip()
    return ", or ".join([first, *others])


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _in_words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    return _WORDS[annotation]
