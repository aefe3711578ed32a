"""bench/elalora.py follows the literal rule, and a change leaves what stays as it was."""

import copy
import importlib
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import TrainerCallback

from models import collate
from oracles import slow_elalora_rule, slow_elalora_run
from stock import base_bert, make_trainer, moods
from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.paper.change import BETA

sys.path.append(str(Path(__file__).parents[2] / "bench"))
elalora: Any = importlib.import_module("elalora")

# Few values, so that many are equal.
VALUES = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1))
SCORES = st.dictionaries(st.sampled_from("abcdef"), st.lists(VALUES, min_size=1, max_size=6), min_size=1)
QUERY, STEPS, PHASE = "bert.encoder.layer.0.attention.self.query", 48, range(5, 34)


def model_of(rank: int = 4) -> PeftModel:
    torch.manual_seed(0)
    shared: dict[str, Any] = {"target_modules": "all-linear", "task_type": TaskType.SEQ_CLS}
    config = AdaLoraConfig(init_r=rank, target_r=rank, lora_alpha=16, total_step=STEPS, orth_reg_weight=0.1, **shared)
    return cast(PeftModel, get_peft_model(base_bert(), config))


class Recorded(TrainerCallback):
    """|p·∇p| of every triplet before the method sees a step, and the ranks behind it."""

    def __init__(self, model: PeftModel) -> None:
        self.layers, self.before, self.after = elalora.triplets_of(model), list[Any](), list[Any]()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before.append({name: self.of(triplets) for name, triplets in self.layers.items()})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append({name: triplets.rank for name, triplets in self.layers.items()})

    def of(self, triplets: Any) -> list[list[list[float]]]:
        q, p, lam = ((m.detach() * cast(Tensor, m.grad)).abs() for m, _ in triplets.matrices())
        return [[lam[j].tolist(), q[j].tolist(), p[:, j].tolist()] for j in range(triplets.rank)]


def logits_of(model: PeftModel) -> Tensor:
    batch = collate(moods(16, seed=3))
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


# PEFT warns so of every AdaLoRA adapter, of its own too, and goes by the pattern nevertheless.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_ranks_are_those_of_the_literal_rule_on_recorded_importances_and_are_saved(tmp_path: Path) -> None:
    model = model_of()
    recorded, method = Recorded(model), elalora.ElaLora(model, PHASE, STEPS, seed=0)
    make_trainer(model, moods(), tmp_path, [recorded, method], max_steps=STEPS, learning_rate=0.02).train()
    shapes = {n: (q.shape[1], p.shape[0]) for n, t in recorded.layers.items() for (q, _), (p, _), _ in [t.matrices()]}
    how: dict[str, Any] = {"first": PHASE.start, "last": PHASE.stop, "interval": 10, "b0": 4, "k": 2, "beta": BETA}
    expected, scores = slow_elalora_run(recorded.before, shapes, **how)
    assert recorded.after == expected
    for layer, result in method.importance.scores().items():
        assert result == pytest.approx(scores[layer], rel=1e-3)
    assert len({tuple(ranks.values()) for ranks in expected}) == 4
    assert {sum(ranks.values()) for ranks in expected} == {4 * 7}
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base_bert(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(cast(PeftModel, loaded)), logits_of(model), rtol=0, atol=1e-5)


@given(SCORES, st.integers(0, 8), st.integers(0, 4))
def test_ranks_move_as_in_the_literal_transcription_of_the_rule(scores: dict[str, list[float]], b: int, k: int) -> None:
    drops, grows = elalora.exchange(scores, moves=b, offered=k)
    pruned, expanded = slow_elalora_rule(scores, b=b, k=k)
    assert {(layer, j) for layer, which in drops.items() for j in which} == set(pruned)
    assert grows == {layer: expanded.count(layer) for layer in expanded}


def ready() -> tuple[PeftModel, torch.optim.Optimizer]:
    """A model some steps into training, so that λ and moments are not zero."""
    model = model_of()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(5):
        model.zero_grad()
        model(**collate(moods(8, seed=step))).loss.backward()
        optimizer.step()
    return model, optimizer


def test_a_change_takes_what_is_pruned_from_the_update_and_adds_next_to_nothing() -> None:
    model, optimizer = ready()
    triplets = elalora.triplets_of(model)[QUERY]
    (q, _), (p, _), (lam, _) = triplets.matrices()
    before, scale = triplets.layer.get_delta_weight("default").detach().clone(), triplets.layer.scaling["default"] / 4
    gone = (p[:, [1]] * lam[1] @ q[[1]] * scale).detach()
    assert gone.abs().max() > 1e-4
    elalora.change(triplets, remaining=[0, 2, 3], grown=2, optimizer=optimizer, seed=0)
    torch.testing.assert_close(triplets.layer.get_delta_weight("default"), before - gone, rtol=0, atol=1e-6)
    for vectors in (q.detach(), p.detach().T):  # a new one is of unit vectors at right angles to those there
        products = vectors @ vectors.T
        torch.testing.assert_close(products[3:, 3:], torch.eye(2), rtol=0, atol=1e-6)
        torch.testing.assert_close(products[3:, :3], torch.zeros(2, 3), rtol=0, atol=1e-6)


def test_remaining_triplets_step_as_if_nothing_had_changed_and_new_ones_begin_at_the_mean() -> None:
    model, optimizer = ready()
    untouched, theirs = copy.deepcopy((model, optimizer))
    retained = [0, 2, 3]
    elalora.change(elalora.triplets_of(model)[QUERY], remaining=retained, grown=2, optimizer=optimizer, seed=0)
    generator = torch.Generator().manual_seed(1)
    both = (elalora.triplets_of(one)[QUERY].matrices() for one in (model, untouched))
    pairs = list(zip(*both, strict=True))
    for (a, dim), (b, _) in pairs:
        moments = optimizer.state[a]
        assert not moments["exp_avg"].narrow(dim, 3, 2).any()
        mean = moments["exp_avg_sq"].narrow(dim, 0, 3).mean(dim, keepdim=True)
        assert torch.equal(moments["exp_avg_sq"].narrow(dim, 3, 1), mean)
        b.grad = torch.randn(b.shape, generator=generator)
        new = torch.randn(a.shape, generator=generator).narrow(dim, 3, 2)
        a.grad = torch.cat([b.grad.index_select(dim, torch.tensor(retained)), new], dim)
    optimizer.step()
    theirs.step()
    for (a, dim), (b, _) in pairs:
        assert torch.equal(a.detach().narrow(dim, 0, 3), b.detach().index_select(dim, torch.tensor(retained)))


def test_a_run_without_a_move_and_a_step_without_gradients_are_refused() -> None:
    model = model_of()
    with pytest.raises(SettingsError, match="9 optimizer steps"):
        elalora.ElaLora(model, range(1, 6), 9, seed=0)
    with pytest.raises(TsqLoraError, match="step 3"):
        elalora.require_gradients(elalora.triplets_of(model), 3)
