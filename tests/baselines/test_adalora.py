from pathlib import Path
from typing import cast

import pytest
import torch
from peft import PeftModel

from setups import base, build, logits_of, trainer_of
from tsqlora.baselines.triplets import AdaLoraCallback, config_of, triplets_of
from tsqlora.errors import SettingsError, UnsupportedError


def test_pefts_allocator_gets_the_phases_of_our_own_callback() -> None:
    config = config_of(cast(PeftModel, build("adalora", steps=500).model))
    assert (config.init_r, config.target_r, config.total_step) == (6, 4, 500)
    assert (config.tinit, config.tfinal, config.deltaT) == (50, 150, 25)
    assert (config.beta1, config.beta2) == (0.85, 0.85)


# PEFT warns so of every AdaLoRA adapter, and goes by the pattern nevertheless.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_are_allocated_when_due_sum_to_the_budget_and_are_saved(tmp_path: Path, accumulation: int) -> None:
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
    model = cast(PeftModel, built.model)
    for name, triplets in triplets_of(model).items():
        assert int((triplets.lam != 0).sum()) == ranks[name]
    trainable = built.trainable()
    model.save_pretrained(str(tmp_path / "adapter"))
    assert (built.ranks(), built.trainable()) == (ranks, trainable)
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=1e-5)


def test_four_steps_are_enough_and_three_are_not(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="adalora"):
        build("adalora", steps=3)
    built = build("adalora", steps=4)
    trainer_of(built, tmp_path, max_steps=4).train()
    assert sum(built.ranks().values()) == 4 * 7


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["adalora", "elalora"])
def test_label_smoothing_which_has_no_penalty_is_refused_before_the_first_step(name: str, tmp_path: Path) -> None:
    built = build(name)
    with pytest.raises(UnsupportedError, match=rf"training\.label_smoothing_factor .*{name}"):
        trainer_of(built, tmp_path, label_smoothing_factor=0.1).train()
