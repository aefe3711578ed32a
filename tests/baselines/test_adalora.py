from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

import tsqlora as tsq
from setups import STEPS, base, build, logits_of, trainer_of
from stock import moods
from tsqlora.baselines.adalora import AdaLoraCallback
from tsqlora.baselines.svd import config_of, triplets_of
from tsqlora.errors import SettingsError, UnsupportedError


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_pefts_allocator_gets_the_phases_of_our_own_callback() -> None:
    config = config_of(cast(PeftModel, build("adalora", steps=500).model))
    assert (config.init_r, config.target_r, config.total_step) == (6, 4, 500)
    assert (config.tinit, config.tfinal, config.deltaT) == (50, 150, 25)
    assert (config.beta1, config.beta2) == (0.85, 0.85)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_are_allocated_when_due_and_their_sum_is_the_budget(tmp_path: Path, accumulation: int) -> None:
    built = build("adalora")
    (callback,) = (c for c in built.callbacks if isinstance(c, AdaLoraCallback))
    before = built.trainable()
    trainer_of(built, tmp_path, gradient_accumulation_steps=accumulation).train()
    # Steps counted from 0: multiples of 10 after 5 and before 34, then the last at 34.
    assert callback.allocations == [10, 20, 30, 34]
    ranks = built.ranks()
    assert sum(ranks.values()) == 4 * 7
    assert len(set(ranks.values())) > 1
    assert built.trainable() < before
    # The mask is the last thing to touch λ in a step, so what is masked stays exactly zero.
    for name, triplets in triplets_of(cast(PeftModel, built.model)).items():
        assert int((triplets.lam != 0).sum()) == ranks[name]


def test_the_penalty_is_in_training_and_in_no_other_loss(tmp_path: Path) -> None:
    built = build("adalora")
    seen: list[tuple[bool, float]] = []

    def compare(module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        own = torch.nn.functional.cross_entropy(output.logits.float(), kwargs["labels"])
        seen.append((module.training, float((output.loss - own).detach())))

    built.model.register_forward_hook(compare, with_kwargs=True)
    trainer = trainer_of(
        built, tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=7, evaluate_on=moods(16)
    )
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    training = [penalty for is_training, penalty in seen if is_training]
    assert len(training) == 2 * STEPS
    assert min(training) > 0.05
    evaluation = [penalty for is_training, penalty in seen if not is_training]
    assert len(evaluation) > 8
    assert evaluation == [pytest.approx(0, abs=1e-6)] * len(evaluation)


# PEFT warns so of every AdaLoRA adapter, and goes by the pattern nevertheless.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_counts_are_the_same_once_the_adapter_is_saved_and_it_loads(tmp_path: Path) -> None:
    built = build("adalora")
    trainer_of(built, tmp_path).train()
    ranks, trainable = built.ranks(), built.trainable()
    cast(PeftModel, built.model).save_pretrained(str(tmp_path / "adapter"))
    assert (built.ranks(), built.trainable()) == (ranks, trainable)
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(loaded), logits_of(built.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ends", [8, 34])
def test_training_that_ends_before_ranks_are_final_is_an_error(ends: int, tmp_path: Path) -> None:
    with pytest.raises(tsq.TsqLoraError, match=rf"after {ends} steps.* step 35"):
        trainer_of(build("adalora"), tmp_path, Stop(ends)).train()


def test_training_that_ends_once_ranks_are_final_is_none(tmp_path: Path) -> None:
    built = build("adalora")
    trainer_of(built, tmp_path, Stop(35)).train()
    assert sum(built.ranks().values()) == 4 * 7


def test_a_run_without_room_for_a_phase_is_refused() -> None:
    with pytest.raises(SettingsError, match="adalora"):
        build("adalora", steps=3)


def test_a_run_of_four_steps_still_comes_to_its_budget(tmp_path: Path) -> None:
    built = build("adalora", steps=4)
    trainer_of(built, tmp_path, max_steps=4).train()
    assert sum(built.ranks().values()) == 4 * 7


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["adalora", "elalora"])
def test_label_smoothing_which_has_no_penalty_is_refused_before_the_first_step(name: str, tmp_path: Path) -> None:
    built = build(name)
    with pytest.raises(UnsupportedError, match=rf"training\.label_smoothing_factor .*{name}"):
        trainer_of(built, tmp_path, label_smoothing_factor=0.1).train()
