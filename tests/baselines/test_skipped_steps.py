"""A skipped step does not count for ranks, and a move that was due with it comes with the next one."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback, Wav2Vec2ForSequenceClassification

from setups import STEPS, build, trainer_of
from stock import make_trainer
from tsqlora.baselines import Built
from tsqlora.baselines.triplets import AdaLoraCallback, ElaLoraCallback, step_was_skipped, triplets_of
from tsqlora.errors import UnsupportedError
from tsqlora.training.nonfinite import GuardCallback

MOVED: dict[int, list[int]] = {40: [10, 20, 30, 34], 10: [11, 20, 30, 34], 34: [10, 20, 30, 35]}
"""When ranks are decided where the step of the key, counted from 0, is skipped."""


class Spoil(TrainerCallback):
    """Makes a gradient NaN before some steps."""

    def __init__(self, model: Any, steps: set[int]) -> None:
        self.parameter, self.steps = next(p for p in model.parameters() if p.requires_grad), steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            cast(torch.Tensor, self.parameter.grad).fill_(torch.nan)


def trained(name: str, folder: Path, *skipped: int, steps: int = STEPS) -> Built:
    built = build(name, steps=steps)
    guard = GuardCallback()
    trainer_of(built, folder, Spoil(built.model, set(skipped)), guard, max_steps=steps).train()
    assert [result.step - 1 for result in guard.skipped] == list(skipped)
    return built


def callback_of(built: Built, kind: type) -> Any:
    (result,) = (c for c in built.callbacks if isinstance(c, kind))
    return result


@pytest.mark.parametrize("step", MOVED)
def test_adalora_decides_with_the_next_step_and_its_mask_stays(step: int, tmp_path: Path) -> None:
    built = trained("adalora", tmp_path, step)
    assert callback_of(built, AdaLoraCallback).allocations == MOVED[step]
    ranks = built.ranks()
    assert sum(ranks.values()) == 4 * 7
    for name, triplets in triplets_of(cast(PeftModel, built.model)).items():
        assert int((triplets.lam != 0).sum()) == ranks[name]


def test_elalora_moves_as_many_with_the_next_step(tmp_path: Path) -> None:
    assert callback_of(trained("elalora", tmp_path, 7), ElaLoraCallback).changes == {10: 4, 20: 3, 30: 1}
    assert callback_of(trained("elalora", tmp_path, 10, 11), ElaLoraCallback).changes == {12: 4, 20: 3, 30: 1}


def test_a_step_without_gradients_or_with_one_that_is_not_finite_is_skipped() -> None:
    model = cast(PeftModel, build("elalora").model)
    layers = triplets_of(model)
    assert step_was_skipped(model, layers)
    for triplets in layers.values():
        for matrix, _ in triplets.matrices():
            matrix.grad = torch.ones_like(matrix)
    assert not step_was_skipped(model, layers)
    one = next(iter(layers.values()))
    cast(torch.Tensor, one.q.grad)[0, 0] = torch.inf
    assert step_was_skipped(model, layers)
    one.lam.grad = None
    with pytest.raises(UnsupportedError, match=f"{one.name} has no gradient"):
        step_was_skipped(model, layers)


@pytest.mark.parametrize("name", ["adalora", "elalora"])
def test_a_step_that_skips_a_block_at_random_counts(name: str, tmp_path: Path) -> None:
    config = pytest.importorskip("made_media").wav2vec2_config(layerdrop=0.5, num_labels=2)
    torch.manual_seed(0)
    rows = [{"input_values": torch.randn(1600).tolist(), "labels": j % 2} for j in range(32)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}

    model = Wav2Vec2ForSequenceClassification(config)
    built = build(name, model, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(cast(Any, built.model), rows, tmp_path, [*built.callbacks], max_steps=STEPS)
    trainer.data_collator, trainer.loss_is_scaled_for_ga = collate, False
    trainer.train()
    assert sum(built.ranks().values()) == 4 * 4
    moved = callback_of(built, AdaLoraCallback if name == "adalora" else ElaLoraCallback)
    assert moved.allocations if name == "adalora" else moved.changes
