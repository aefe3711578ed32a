"""Turn pydantic's errors into one line: the key, its value, the cure."""

from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tsqlora.compat.yaml import dump_yaml
from tsqlora.errors import SettingsError, nearest
from tsqlora.run.config.settings import Config, Section, section_of

_UNION_MEMBERS = ("str", "list[str]")
"""pydantic appends to a key which member of a union it tried."""


def explain(error: ValidationError) -> str:
    """The most useful problem of a failed validation, with its dotted key.

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
    whys = dict.fromkeys(problem["msg"] for problem in problems if _key(problem) == _key(first))
    why = " or ".join(whys)
    return f"{_key(first) or 'the file'} is {dump_yaml(first['input'], inline=True)}; {why[:1].lower()}{why[1:]}"


def _key(problem: ErrorDetails) -> str:
    return ".".join(str(part) for part in problem["loc"] if part not in _UNION_MEMBERS)


def _unknown_key(loc: Sequence[int | str]) -> str:
    *sections, name = map(str, loc)
    section: type[Section] = Config
    for part in sections:
        section = section_of(section.model_fields[part]) or section
    return f"unknown key {'.'.join(map(str, loc))!r}; {nearest(name, section.model_fields)}"
