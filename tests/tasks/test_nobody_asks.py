"""Only tasks/ asks which task it has: others call it, or read what holds of it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tsqlora
from tsqlora.tasks import TASKS, get_task

SOURCE = Path(tsqlora.__file__).parent
CLASSES = {type(part).__name__ for name in TASKS for part in (get_task(name), get_task(name).reading)}
CLASSES |= {"Task", "Answers", "Reading", "Writer", "LabelKind"}


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
        if named & CLASSES or compares or (isinstance(node, ast.Attribute) and answer_of_a_task(node)):
            yield ast.unparse(node)


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
    ],
)
def test_a_question_is_seen(code: str) -> None:
    assert [*questions(code)]


def test_nobody_outside_of_tasks_asks_which_task_it_has() -> None:
    files = [path for path in SOURCE.rglob("*.py") if path.parent.name != "tasks"]
    assert len(files) > 100
    assert {str(path): named for path in files if (named := [*questions(path.read_text())])} == {}
