"""Only tasks/ asks which task it has: others call it, or read what holds of it."""

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import tsqlora
from tsqlora.tasks import TASKS, Reading, get_task

SOURCE = Path(tsqlora.__file__).parent
CLASSES = {type(part).__name__ for name in TASKS for part in (get_task(name), get_task(name).reading)}
CLASSES |= {"Task", "Answers", "Reading", "LabelKind"}
FLAGS = {field.name for field in fields(Reading) if field.type in ("bool", bool)}
FLAGS |= {"label", "media", "problem_type", "answers", "writer", "stratified", "by_token", "has_reference"}
"""What holds of a task, its rows and their labels: methods of `Reading` and functions of tasks/ depend on it alone."""
OWNERS = ("task", "reading")
SETTINGS_ONLY = {"settings/file.py": "config.task.causal"}
"""Read before torch is loaded, so that the command line stays quick."""


def questions(code: str) -> Iterator[str]:
    """Tests on the class, name, answer or type of a task or of its kind of label."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            named = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.MatchClass):
            named = {name.id for name in ast.walk(node.cls) if isinstance(name, ast.Name)}
        else:
            named = set[str]()
        compares = isinstance(node, ast.Compare) and any(map(names_a_task, ast.walk(node)))
        attribute = isinstance(node, ast.Attribute) and (answer_of_a_task(node) or flag_of_a_task(node))
        if named & CLASSES or compares or attribute:
            yield ast.unparse(node)


def flag_of_a_task(node: ast.Attribute) -> bool:
    """`task.reading.causal`, `reading.media`, `get_task(name).reading.label`."""
    return node.attr in FLAGS and ast.unparse(node.value).split(".")[-1] in OWNERS


def names_a_task(node: ast.AST) -> bool:
    """`task.name`, `config.task.type`, `label.name`, `classes.kind.name`."""
    owners = {"name": ("task", "label", "kind"), "type": ("task",)}
    return isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in owners.get(node.attr, ())


def answer_of_a_task(node: ast.Attribute) -> bool:
    return node.attr == "answer" and ast.unparse(node.value).split(".")[-1] in (
        "task",
        "labels",
        "classes",
        "label_map",
    )


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(job.task, Generation | Preference)",
        "match task:\n    case Classification(): pass",
        "x = task.name == 'seq2seq'",
        "x = config.task.type in MEDIA",
        "x = labels.answer",
        "x = table.classes.kind.name == 'tags'",
        "if job.task.reading.causal: pass",
        "x = task.writer is not None",
        "x = get_task(name).reading.label",
        "reading = task.reading\nif reading.media: pass",
    ],
)
def test_a_question_is_seen(code: str) -> None:
    assert [*questions(code)]


def test_nobody_outside_of_tasks_asks_which_task_it_has() -> None:
    files = [path for path in SOURCE.rglob("*.py") if path.parent.name != "tasks"]
    assert len(files) > 100
    questioned = {str(path.relative_to(SOURCE)): named for path in files if (named := [*questions(path.read_text())])}
    assert questioned == {name: [flag] for name, flag in SETTINGS_ONLY.items()}
