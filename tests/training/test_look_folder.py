"""QualityCallback with a look that lies in a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tsqlora as tsq
from models import collate
from stock import make_trainer, moods, slotted_bert
from tsqlora import paper
from tsqlora.auditing.saved_look import SavedLook
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.model.request import ScoringRule

ROWS = moods(96)
RULE = ScoringRule(look_again=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("look") / "LOOK"
    tsq.look(slotted_bert(), ROWS, collate, out=place, compute=paper.Compute(8))
    return place


def run(folder: Path, callback: dict[str, Any], **options: Any) -> tuple[tsq.QualityCallback, dict[str, torch.Tensor]]:
    data = tsq.QualitySubset(ROWS, fraction=0.5, seed=0)
    quality = tsq.QualityCallback(data, **callback)
    model = slotted_bert()
    make_trainer(model, data, folder, [quality], num_train_epochs=2, **options).train()
    return quality, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_no_look_is_taken_and_none_follows(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError

    for name in ("look", "start_head", "require_scorable"):
        monkeypatch.setattr(f"tsqlora.training.quality_callback.{name}", fail)
    quality, _ = run(tmp_path, {"look": saved})
    assert len(quality.looks) == 1


def test_the_control_takes_the_head_and_draws_evenly(saved: Path, tmp_path: Path) -> None:
    quality, _ = run(tmp_path, {"look": saved, "rule": ScoringRule(select=False)})
    assert quality.data.scores is None
    assert quality.looks[0]["head_start"]["replaced"]


def test_a_model_that_comes_later_gets_the_head_too(saved: Path, tmp_path: Path) -> None:
    data = tsq.QualitySubset(ROWS, fraction=0.5, seed=0)
    model = slotted_bert()
    trainer = make_trainer(model, data, tmp_path, [], max_steps=1, learning_rate=0.0)
    trainer.add_callback(tsq.QualityCallback(data, look=saved))  # after on_init_end
    trainer.train()
    written = SavedLook.load(saved).head["classifier.weight"]
    torch.testing.assert_close(head(model).detach(), written, rtol=0, atol=0)


def head(model: nn.Module) -> torch.Tensor:
    return next(p for n, p in model.named_parameters() if n.endswith("classifier.modules_to_save.default.weight"))


def test_what_an_engine_has_wrapped_is_refused_with_the_line_to_write(saved: Path, tmp_path: Path) -> None:
    data = tsq.QualitySubset(ROWS, fraction=0.5, seed=0)
    trainer = make_trainer(slotted_bert(), data, tmp_path, [])
    trainer.add_callback(tsq.QualityCallback(data, look=saved))
    trainer.args.deepspeed_plugin = object()
    with pytest.raises(UnsupportedError, match=r"write_head\(trainer\.model\)"):
        trainer.train()


def test_resuming_needs_the_same_look(saved: Path, tmp_path: Path) -> None:
    _, weights = run(tmp_path / "whole", {"look": saved}, save_strategy="steps", save_steps=6)
    data = tsq.QualitySubset(ROWS, fraction=0.5, seed=0)
    model = slotted_bert()
    checkpoint = str(tmp_path / "whole" / "checkpoint-6")
    trainer = make_trainer(model, data, tmp_path / "whole", [tsq.QualityCallback(data, look=saved)], num_train_epochs=2)
    trainer.train(resume_from_checkpoint=checkpoint)
    resumed = model.state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())
    trainer = make_trainer(
        slotted_bert(), data, tmp_path / "whole", [tsq.QualityCallback(data, rule=RULE)], num_train_epochs=2
    )
    with pytest.raises(SettingsError, match="look"):
        trainer.train(resume_from_checkpoint=checkpoint)
