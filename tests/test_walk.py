"""From a command or an event to the first forward pass: few frames of ours, in few files (docs/architecture.md)."""

import re
import traceback
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForSequenceClassification

import tsqlora as tsq
from runs import set_up
from stock import make_trainer, moods, slotted_bert
from tsqlora.cli.runs import train

SOURCE = Path(tsq.__file__).parent
FRAMES, FILES = 12, 8
TABLES = (SOURCE.parents[1] / "docs" / "architecture.md").read_text().split("| file | function | what it does |")[1:]
DRAWN = [re.findall(r"^\| `([\w/]+\.py)` \| `(\w+)` \|", table.split("\n\n")[0], re.MULTILINE) for table in TABLES]
"""The walks of docs/architecture.md."""


class Arrived(Exception):
    pass


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """Our frames, (file, function), above each forward pass of the model; the first one of a look raises Arrived."""
    walks: list[list[tuple[str, str]]] = []
    forward = BertForSequenceClassification.forward

    def arrive(self: Any, *args: Any, **kwargs: Any) -> Any:
        stack = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
        ours = [(path, name) for path, name in stack if path.is_relative_to(SOURCE)]
        walks.append([(path.relative_to(SOURCE).as_posix(), name) for path, name in ours])
        if ("auditing/look.py", "look") in walks[-1]:
            raise Arrived
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", arrive)
    return walks


@pytest.mark.parametrize("walk", DRAWN)
def test_a_walk_is_short(walk: list[tuple[str, str]]) -> None:
    assert 0 < len(walk) <= FRAMES
    assert len({file for file, _ in walk}) <= FILES


def test_the_callback_soon_looks(walks: list[list[tuple[str, str]]], tmp_path: Path) -> None:
    data = tsq.QualitySubset(moods())
    trainer = make_trainer(slotted_bert(), data, tmp_path, [tsq.QualityCallback(data)])
    with pytest.raises(Arrived):
        trainer.train()
    assert walks[-1] == DRAWN[1]


def test_the_command_soon_looks(walks: list[list[tuple[str, str]]], tmp_path: Path) -> None:
    folder = set_up(tmp_path)
    with pytest.raises(Arrived):
        train(folder / "c.yaml", out=tmp_path / "run")
    assert walks[0] == DRAWN[0]
