"""One line after a Trainer was built does what its callbacks and a QualitySubset do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import tsqlora as tsq
from models import collate
from stock import make_trainer, moods, slotted_bert
from tsqlora.errors import SettingsError

ROWS, TRUSTED = moods(96), moods(24, seed=1)


def built(folder: Path, data: Any = ROWS, callbacks: Any = (), **options: Any) -> Trainer:
    return make_trainer(slotted_bert(), data, folder, [*callbacks], num_train_epochs=2, **options)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    model: Any = trainer.model
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_it_is_a_subset_and_a_callback(tmp_path: Path) -> None:
    data = tsq.QualitySubset(ROWS, fraction=0.5, seed=1, trusted=TRUSTED)
    by_hand = built(tmp_path / "a", data, [tsq.QualityCallback(data)])
    by_hand.train()
    trainer = built(tmp_path / "b")
    callback = tsq.attach(trainer, fraction=0.5, seed=1, trusted=TRUSTED)
    trainer.train()
    assert callback.data.indices.tolist() == data.indices.tolist()
    one, other = weights(by_hand), weights(trainer)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_head_of_a_look_is_in_the_model_before_it_trains(tmp_path: Path) -> None:
    look = tsq.look(slotted_bert(), ROWS, collate, out=tmp_path / "LOOK")
    trainer = built(tmp_path / "run")
    tsq.attach(trainer, look=tmp_path / "LOOK")
    head = next(t for name, t in weights(trainer).items() if name.endswith("modules_to_save.default.weight"))
    torch.testing.assert_close(head, look.head["classifier.weight"], rtol=0, atol=0)
    trainer.train()


@pytest.mark.parametrize(
    ("data", "options", "line"),
    [(iter([1]), {}, "from_list"), (ROWS, {"trusted": [{"input_ids": [1], "label": 0}]}, "alike")],
)
def test_what_cannot_be_attached_is_refused_with_a_line(
    data: Any, options: dict[str, Any], line: str, tmp_path: Path
) -> None:
    trainer = built(tmp_path)
    trainer.train_dataset = data
    with pytest.raises(SettingsError, match=line):
        tsq.attach(trainer, **options)


def test_two_of_a_kind_are_refused(tmp_path: Path) -> None:
    trainer = built(tmp_path)
    tsq.attach(trainer)
    with pytest.raises(SettingsError, match="already"):
        tsq.attach(trainer)
