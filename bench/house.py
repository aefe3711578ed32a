"""The size of the house: statements, nodes, lines and files, the shape of functions, and what a door reaches.

    python bench/house.py             # lines that each door reaches, file by file; tests/test_budget.py prints the rest

A door reaches a definition (a top-level function, class or value) if its code names it, directly or through others, by
an import of the file or of a function: lazy imports count. A class counts whole, whichever of its methods is called.
"""

import ast
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "tsqlora"
Name = tuple[str, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(slots=True)
class Module:
    """A file: its top-level definitions, and what its names mean."""

    name: str
    tree: ast.Module
    lines: int
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imported: dict[str, Name] = field(default_factory=dict)
    """(module, name) of each name that an import anywhere in the file binds; the name is "" for a module."""


def modules() -> dict[str, Module]:
    made = {}
    for path in sorted(SRC.rglob("*.py")):
        text, parts = path.read_text(encoding="utf-8"), path.relative_to(SRC.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        made[name] = Module(name, ast.parse(text), len(text.splitlines()))
    for module in made.values():
        _bind(module, made)
    return made


def _bind(module: Module, others: Mapping[str, Module]) -> None:
    for node in module.tree.body:
        if isinstance(node, Function | ast.ClassDef):
            module.definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    module.definitions[target.id] = node
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tsqlora"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                target = (whole, "") if whole in others else (str(node.module), alias.name)
                module.imported[alias.asname or alias.name] = target


def names_in(module: Module, node: ast.AST, all_of: Mapping[str, Module]) -> Iterator[Name]:
    """The definitions of the package that a piece of code names, once for each time."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            if part.id in module.definitions:
                yield module.name, part.id
            elif (target := module.imported.get(part.id)) and target[1]:
                yield _home(target, all_of)
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            target = module.imported.get(part.value.id)
            if target and not target[1]:
                yield _home((target[0], part.attr), all_of)


def _home(name: Name, all_of: Mapping[str, Module]) -> Name:
    """Where a name is defined that a package may import from elsewhere."""
    module = all_of.get(name[0])
    if module and name[1] not in module.definitions and name[1] in module.imported:
        return _home(module.imported[name[1]], all_of)
    return name


def reached(roots: list[Name], all_of: Mapping[str, Module]) -> dict[Name, int]:
    """Lines of each definition that the roots reach."""
    lines_of, todo = dict[Name, int](), [_home(root, all_of) for root in roots]
    while todo:
        name = todo.pop()
        module = all_of.get(name[0])
        node = module.definitions.get(name[1]) if module else None
        if name in lines_of or node is None or module is None:
            continue
        first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
        lines_of[name] = int(node.end_lineno or node.lineno) - first + 1
        todo += names_in(module, node, all_of)
    return lines_of


def where(name: str, all_of: Mapping[str, Module]) -> Name:
    """The one place where a class or function of this name is defined."""
    (place,) = (module.name for module in all_of.values() if name in module.definitions)
    return place, name


def statements(tree: ast.AST) -> int:
    """Count the statements of a module but for its texts: docstrings, also those of attributes.

    >>> statements(ast.parse("'''Say.'''\\nx: int = 1\\n'''What.'''\\nif x:\\n    print(x)"))
    3
    """
    return sum(isinstance(node, ast.stmt) and not _is_text(node) for node in ast.walk(tree))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def shape(all_of: Mapping[str, Module]) -> dict[str, float]:
    """Median lines of a function without its docstring, the share that is one return, and how many are named once."""
    functions = [node for module in all_of.values() for node in ast.walk(module.tree) if isinstance(node, Function)]
    bodies = [[one for one in node.body if not _is_text(one)] for node in functions]
    lengths = [
        sum(int(one.end_lineno or 0) - one.lineno + 1 for one in body) + _head(node)
        for node, body in zip(functions, bodies, strict=True)
        if body
    ]
    named = Counter(name for module in all_of.values() for name in names_in(module, module.tree, all_of))
    named.update(_home(name, all_of) for module in all_of.values() for name in module.imported.values())
    top = [
        (m.name, name) for m in all_of.values() for name, node in m.definitions.items() if isinstance(node, Function)
    ]
    return {
        "median_function": statistics.median(lengths),
        "one_return_percent": 100 * sum(len(b) == 1 and isinstance(b[0], ast.Return) for b in bodies) / len(bodies),
        "named_once": sum(named[name] == 1 for name in top),
    }


def _head(node: Function) -> int:
    """Lines of a function's head: decorators do not count."""
    first = node.body[0]
    return max(1, first.lineno - node.lineno)


def sizes(all_of: Mapping[str, Module]) -> dict[str, int]:
    return {
        "statements": sum(statements(module.tree) for module in all_of.values()),
        "nodes": sum(1 for module in all_of.values() for _ in ast.walk(module.tree)),
        "lines": sum(module.lines for module in all_of.values()),
        "files": len(all_of),
    }


def wings(all_of: Mapping[str, Module]) -> dict[str, int]:
    """Statements of each package; files beside the packages are `root`."""
    counts = defaultdict[str, int](int)
    for module in all_of.values():
        parts = module.name.split(".")[1:]
        inside = bool(parts) and (SRC / parts[0]).is_dir()
        counts[parts[0] if inside else "root"] += statements(module.tree)
    return dict(counts)


def doors(all_of: Mapping[str, Module]) -> dict[str, list[Name]]:
    """What a user calls: `tsqlora audit` of labels, `tsqlora doctor`, the callback of a Trainer."""
    homes = ast.literal_eval(all_of["tsqlora"].definitions["_HOMES"].value)
    callback = next(f"tsqlora.{home}" for home, names in homes.items() if "QualityCallback" in names)
    return {
        "reach_audit": [where("run_audit", all_of)],
        "reach_doctor": [where("examine", all_of)],
        "reach_callback": [(callback, "QualityCallback")],
    }


def main() -> None:
    all_of = modules()
    for door, roots in doors(all_of).items():
        by_file = Counter[str]()
        for (module, _), lines in reached(roots, all_of).items():
            by_file[module] += lines
        print(f"{door}: {by_file.total():,} lines", *(f"  {n:5,} {one}" for one, n in by_file.most_common()), sep="\n")


if __name__ == "__main__":
    main()
