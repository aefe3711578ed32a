"""Read and write YAML 1.2 with ruamel.yaml: plain values only, within limits that no settings file reaches."""

import math
import re
from io import StringIO
from typing import Any

from ruamel.yaml import YAML, SafeConstructor, SafeRepresenter
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

MOST_BYTES = 1 << 16
"""Of a text: ruamel.yaml reads some 100 KB a second."""
_MOST_VALUES = 10_000
"""Of a document, counting the value of an alias each time."""
_DEEPEST = 30


class YamlProblem(ValueError):
    """An error in a text, with its line if known."""


def load_yaml(text: str | bytes) -> Any:
    """The value of a text.  Raises YamlProblem for text that is not YAML, runs code, or exceeds the limits."""
    if len(text) > MOST_BYTES:
        raise YamlProblem(f"more than {MOST_BYTES:,} bytes, which is too long for settings")
    try:
        text = text.decode() if isinstance(text, bytes) else text
        _require_limits(text)
        return _yaml().load(text)
    except MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise YamlProblem(f"{where}{str(error.problem).splitlines()[0]}") from None
    except UnicodeDecodeError:
        raise YamlProblem("not UTF-8 text") from None
    except (YAMLError, ValueError, OverflowError, TypeError) as error:
        raise YamlProblem(str(error).strip().splitlines()[0]) from None


def dump_yaml(value: object, *, inline: bool = False) -> str:
    """Text that `load_yaml` reads back to an equal value; with `inline` on one line.

    Raises YamlProblem for an object that YAML lacks.
    """
    yaml, text = _yaml(), StringIO()
    if inline:
        yaml.default_flow_style, yaml.width = True, math.inf
    try:
        yaml.dump(value, text)
    except YAMLError as error:
        raise YamlProblem(str(error)) from None
    return text.getvalue().removesuffix("...\n").strip() if inline else text.getvalue()


def _require_limits(text: str) -> None:
    """Raises YamlProblem for tags, deep nesting, half characters, and aliases that multiply without end."""
    count, open_nodes, sizes = 0, list[tuple[str | None, int]](), dict[str | None, int]()
    for event in _yaml().parse(text):
        if getattr(event, "tag", None) is not None:
            raise _problem(event, f"the tag {event.tag} is not supported; write the plain value")
        before = count
        if isinstance(event, CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes[anchor] = count - before
        elif isinstance(event, AliasEvent):
            if event.anchor not in sizes:
                raise _problem(event, f"alias {event.anchor!r} has no finished value before it")
            count += sizes[event.anchor]
        elif isinstance(event, CollectionStartEvent):
            count += 1
            open_nodes.append((event.anchor, before))
        elif isinstance(event, ScalarEvent):
            count += 1
            sizes[event.anchor] = 1
            if re.search("[\ud800-\udfff]", event.value):
                raise _problem(event, "half a surrogate pair (\\ud800 to \\udfff); write the character itself")
        if len(open_nodes) > _DEEPEST:
            raise _problem(event, f"nested more than {_DEEPEST} deep")
        if count > _MOST_VALUES:
            raise _problem(event, f"more than {_MOST_VALUES:,} values, counting aliases")


def _problem(event: Any, problem: str) -> YamlProblem:
    return YamlProblem(f"line {event.start_mark.line + 1}: {problem}")


class _Constructor(SafeConstructor):
    """Reads dates and a lone = as text, as YAML 1.2 does; refuses integers of more than 64 bits."""

    def construct_small_int(self, node: Any) -> int:
        value = self.construct_yaml_int(node)
        if not -(2**63) <= value < 2**63:
            raise MarkedYAMLError(problem="an integer of more than 64 bits", problem_mark=node.start_mark)
        return value


_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_small_int)
for _kind in ("timestamp", "value"):
    _Constructor.add_constructor(f"tag:yaml.org,2002:{_kind}", _Constructor.construct_yaml_str)


class _Representer(SafeRepresenter):
    def represent_text(self, text: str) -> Any:
        # Single quotes lose line breaks other than \n; in braces, a plain ?x is the key x, and :- is not a key.
        plain = text.isprintable() and not text.startswith(("?", ":"))
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Representer.add_representer(str, _Representer.represent_text)


def _yaml() -> Any:
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.Constructor, yaml.Representer = _Constructor, _Representer
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False
    return yaml
