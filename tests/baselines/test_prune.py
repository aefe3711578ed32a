import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from transformers import TrainerControl, TrainerState, TrainingArguments

from setups import STEPS, base, build, logits_of, trainer_of
from tsqlora.baselines.prune import PruneCallback
from tsqlora.baselines.svd import config_of, triplets_of


def test_kept_triplets_are_those_of_pefts_allocator_at_every_step(tmp_path: Path) -> None:
    ours, theirs = build("prune"), cast(PeftModel, build("adalora").model)
    (callback,) = (c for c in ours.callbacks if isinstance(c, PruneCallback))
    optimizer = torch.optim.AdamW([p for p in ours.model.parameters() if p.requires_grad])
    generator, decided = torch.Generator().manual_seed(0), 0
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    for step in range(STEPS):
        pairs = [
            (a, b)
            for x, y in zip(callback.layers.values(), triplets_of(theirs).values(), strict=True)
            for (a, _), (b, _) in zip(x.matrices(), y.matrices(), strict=True)
        ]
        final = callback.final
        if not final:
            for a, b in pairs:
                with torch.no_grad():
                    a.add_(torch.randn(a.shape, generator=generator), alpha=0.1)
                    b.copy_(a)
                a.grad = torch.randn(a.shape, generator=generator)
                b.grad = a.grad.clone()
        callback.on_optimizer_step(arguments, TrainerState(global_step=step), TrainerControl(), optimizer=optimizer)
        cast(Any, theirs.base_model).update_and_allocate(step)
        pattern = config_of(theirs).rank_pattern or {}
        assert {f"{name}.lora_E.default": mask for name, mask in callback.kept.items()} == pattern
        decided += bool(pattern)
        if not callback.final:
            assert all(torch.equal(a, b) for a, b in pairs)
    assert decided == STEPS - 10
    assert callback.final
    assert sum(ours.ranks().values()) == 4 * 7
    for name, triplets in triplets_of(theirs).items():
        kept = torch.tensor(callback.kept[name])
        assert torch.equal(callback.layers[name].lam, triplets.lam[kept])
        assert torch.equal(callback.layers[name].q, triplets.q[kept])
        assert torch.equal(callback.layers[name].p, triplets.p[:, kept])


def test_a_run_ends_at_the_ranks_of_adaloras_own(tmp_path: Path) -> None:
    ours, theirs = build("prune"), build("adalora")
    for built in (ours, theirs):
        trainer_of(built, tmp_path).train()
    assert ours.ranks() == theirs.ranks()
    assert ours.trainable() == theirs.trainable()


def test_dropping_what_is_masked_changes_nothing_that_the_model_computes() -> None:
    built = build("prune")
    (callback,) = (c for c in built.callbacks if isinstance(c, PruneCallback))
    optimizer = torch.optim.AdamW([p for p in built.model.parameters() if p.requires_grad])
    for triplets in callback.layers.values():
        torch.nn.init.normal_(triplets.lam, std=0.1)
        for matrix, _ in triplets.matrices():
            matrix.grad = torch.randn_like(matrix)
    callback.importance.update()
    callback._mask(9)
    masked = copy.deepcopy(built.model)
    callback._drop(optimizer)
    assert sum(built.ranks().values()) == 9
    torch.testing.assert_close(logits_of(built.model), logits_of(masked), rtol=0, atol=1e-6)


def test_a_layer_that_loses_every_triplet_goes_on_training(tmp_path: Path) -> None:
    built = build("prune", mean_rank=1)
    (callback,) = (c for c in built.callbacks if isinstance(c, PruneCallback))
    decide = callback._mask

    def all_of_one_layer(budget: int) -> None:
        decide(budget)
        if budget == callback.target:
            callback.kept = {name: [name == "bert.pooler.dense"] * len(kept) for name, kept in callback.kept.items()}

    callback._mask = all_of_one_layer  # type: ignore[method-assign]
    trainer_of(built, tmp_path).train()
    assert sorted(set(built.ranks().values())) == [0, 2]
    assert logits_of(built.model).isfinite().all()


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_a_pruned_adapter_loads_with_peft_alone(tmp_path: Path) -> None:
    built = build("prune")
    trainer_of(built, tmp_path).train()
    cast(PeftModel, built.model).save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(loaded), logits_of(built.model), rtol=0, atol=1e-5)
