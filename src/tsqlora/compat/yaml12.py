"""YAML 1.2's plain values -> text and back: no tags, no code, nothing that is small on disk and endless in memory."""

import math
import re
from typing import Any

import yaml

MOST_BYTES = 1 << 18
"""Of a text: PyYAML reads some 100 KB a second."""
_MOST_NODES = 10_000
"""Of a document, what stands behind an alias counted each time."""
_DEEPEST = 30


class YamlProblem(ValueError):
    """What is wrong with a text, with its line where it has one."""


def load_yaml(text: str | bytes) -> Any:
    """The value of a text.  Raises YamlProblem for what is not YAML, and for what settings have no use for."""
    if len(text) > MOST_BYTES:
        raise YamlProblem(f"more than {MOST_BYTES:,} bytes, which is no file of settings")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise YamlProblem(f"{where}{error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # \\UFFFFFFFF is no character
        raise YamlProblem(str(error).splitlines()[0]) from None


def dump_yaml(value: object, **options: Any) -> str:
    """Text that `load_yaml` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options)


def inline_yaml(value: object) -> str:
    """A value as YAML on one line."""
    return dump_yaml(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


class _Loader(yaml.SafeLoader):
    """Safe YAML whose mappings have text keys, each once, and whose aliases do not multiply without end."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.depth = self.count = 0
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        before = self.count
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self.sizes:
                raise _problem(f"{event.anchor!r} stands inside of itself", event)
            self.count += self.sizes[id(node)]
        else:
            if event.tag is not None:
                raise _problem(f"the tag {event.tag!r} is not taken; write the plain value", event)
            if self.depth == _DEEPEST:
                raise _problem(f"nested more than {_DEEPEST} deep", event)
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            if isinstance(node, yaml.ScalarNode) and re.search("[\ud800-\udfff]", node.value):
                raise _problem("half a surrogate pair (\\ud800 to \\udfff); write the character itself", event)
            self.count += 1
            self.sizes[id(node)] = self.count - before
        if self.count > _MOST_NODES:
            raise _problem(f"more than {_MOST_NODES:,} values, aliases counted", event)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert node is not None
        seen: set[str] = set()
        for key, _ in node.value:
            problem = None
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                problem = "a key is not text; put it in quotes"
            elif key.value in seen:
                problem = f"key {key.value!r} is there twice; keep one"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def construct_whole_number(self, node: Any) -> int:
        value = self.construct_yaml_int(node)
        if not -(2**63) <= value < 2**63:
            raise yaml.MarkedYAMLError(problem="a whole number of more than 64 bits", problem_mark=node.start_mark)
        return value


def _problem(problem: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader` would not read as the same text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Single quotes, PyYAML's choice, lose line breaks other than \n.
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


_CORE_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


def _use_core_scalars(cls: type[_Loader] | type[_Dumper]) -> None:
    """YAML 1.2's scalars: 5e-4 is a number; `no` (as in `eval_strategy: no`) and 2026-01-31 are text.

    YAML 1.1, which PyYAML follows, has it the other way round.
    """
    cls.yaml_implicit_resolvers = {}
    for name, (pattern, firsts) in _CORE_SCALARS.items():
        cls.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), firsts)


_use_core_scalars(_Loader)
_use_core_scalars(_Dumper)
