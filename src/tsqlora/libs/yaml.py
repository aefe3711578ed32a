"""Read and write YAML with PyYAML: plain values as in YAML 1.2, within limits that no settings file reaches."""

import math
import re
from typing import Any, ClassVar

import yaml

MOST_BYTES = 1 << 16
"""Of a text: PyYAML reads some 100 KB a second."""
_MOST_VALUES = 10_000
"""Of a document, counting the value of an alias each time."""
_DEEPEST = 30

_PLAIN = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "float": r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
    "int": r"[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)",
    "null": r"~|null|Null|NULL|",
    "merge": r"<<",
}
"""What a text without quotes is by YAML 1.2: yes, off, 12:30 and dates are texts."""


class YamlProblem(ValueError):
    """An error in a text, with its line if known."""


class _Loader(yaml.SafeLoader):
    """Refuses tags, half characters, a key that comes twice, deep nesting, and aliases that multiply without end."""

    yaml_implicit_resolvers: ClassVar[Any] = {}  # not YAML 1.1's

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.count, self.depth, self.sizes = 0, 0, dict[int, int]()

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _problem(event, f"the tag {event.tag} is not supported; write the plain value")
        if re.search("[\ud800-\udfff]", getattr(event, "value", "")):
            raise _problem(event, "half a surrogate pair (\\ud800 to \\udfff); write the character itself")
        if self.depth > _DEEPEST:
            raise _problem(event, f"nested more than {_DEEPEST} deep")
        before, self.depth = self.count, self.depth + 1
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self.sizes:
                raise _problem(event, f"alias {event.anchor!r} has no finished value before it")
            self.count += self.sizes[id(node)]
        else:
            self.count += 1
            self.sizes[id(node)] = self.count - before
        if self.count > _MOST_VALUES:
            raise _problem(event, f"more than {_MOST_VALUES:,} values, counting aliases")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node: Any = super().compose_mapping_node(anchor)
        seen = set[tuple[str, Any]]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise _problem(key, f"the key {key.value!r} comes twice")
            seen.add((key.tag, key.value))
        return node

    def construct_integer(self, node: Any) -> int:
        text = node.value.replace("_", "")
        value = int(text, 0 if re.match("[-+]?0[box]", text) else 10)
        if not -(2**63) <= value < 2**63:
            raise _problem(node, "an integer of more than 64 bits")
        return value


class _Dumper(yaml.SafeDumper):
    def represent_text(self, text: str) -> Any:
        # Single quotes lose line breaks other than \n; in braces, a plain ?x is the key x, and :- is not a key.
        plain = text.isprintable() and not text.startswith(("?", ":"))
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
_Dumper.add_representer(str, _Dumper.represent_text)
for _kind, _pattern in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), None)
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def load_yaml(text: str | bytes) -> Any:
    """The value of a text.  Raises YamlProblem for text that is not YAML, runs code, or exceeds the limits."""
    if len(text) > MOST_BYTES:
        raise YamlProblem(f"more than {MOST_BYTES:,} bytes, which is too long for settings")
    try:
        return _Loader(text.decode() if isinstance(text, bytes) else text).get_single_data()
    except UnicodeDecodeError:
        raise YamlProblem("not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise YamlProblem(f"{where}{str(error.problem).splitlines()[0]}") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
        raise YamlProblem(str(error).strip().splitlines()[0]) from None


def dump_yaml(value: object, *, inline: bool = False) -> str:
    """Text that `load_yaml` reads back to an equal value; with `inline` on one line.

    Raises YamlProblem for an object that YAML lacks.
    """
    width: Any = math.inf if inline else None
    how = {"default_flow_style": inline, "allow_unicode": True, "sort_keys": False, "width": width}
    try:
        text: str = yaml.dump(value, Dumper=_Dumper, **how)
    except yaml.YAMLError as error:
        raise YamlProblem(str(error)) from None
    return text.removesuffix("...\n").strip() if inline else text


def _problem(place: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)
