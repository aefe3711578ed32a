import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from models import collate
from oracles import SlowTriplet, slow_elalora_rule, slow_elalora_run
from setups import STEPS, base, build, logits_of, trainer_of
from stock import moods
from tsqlora.adapter.change import BETA
from tsqlora.baselines import Built
from tsqlora.baselines.setup import change_phase
from tsqlora.baselines.triplets import (
    SMALLEST,
    ElaLoraCallback,
    Importance,
    Triplets,
    change,
    change_steps,
    exchange,
    triplets_of,
)
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.ranks.moves import default_interval

# Few values, so that many are equal.
VALUES = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1))
SCORES = st.dictionaries(st.sampled_from("abcdef"), st.lists(VALUES, min_size=1, max_size=6), min_size=1)

QUERY = "bert.encoder.layer.0.attention.self.query"


class Before(TrainerCallback):
    """What there is after each optimizer step, before the method sees it: |p·∇p| of every triplet."""

    def __init__(self, model: PeftModel) -> None:
        self.layers = triplets_of(model)
        self.importances: list[dict[str, list[list[list[float]]]]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.importances.append({name: self.of(t) for name, t in self.layers.items()})

    def of(self, triplets: Triplets) -> list[list[list[float]]]:
        q, p, lam = ((m.detach() * cast(Tensor, m.grad)).abs() for m, _ in triplets.matrices())
        return [[lam[j].tolist(), q[j].tolist(), p[:, j].tolist()] for j in range(triplets.rank)]


class After(TrainerCallback):
    """What there is at the end of each optimizer step."""

    def __init__(self, built: Built) -> None:
        self.built, self.ranks = built, list[dict[str, int]]()
        self.rates, self.kept = list[float](), list[int]()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ranks.append(self.built.ranks())
        self.kept.append(len(kwargs["optimizer"].state))


def callback_of(built: Built) -> ElaLoraCallback:
    (result,) = (c for c in built.callbacks if isinstance(c, ElaLoraCallback))
    return result


# PEFT warns so of every AdaLoRA adapter, of its own too, and goes by the pattern nevertheless.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_ranks_are_those_of_the_literal_rule_on_recorded_importances_and_are_saved(tmp_path: Path) -> None:
    built = build("elalora")
    model = cast(PeftModel, built.model)
    before, after = Before(model), After(built)
    watched = Built(model, (before, *built.callbacks), built.trainable, built.ranks)
    trainer_of(watched, tmp_path, after).train()
    expected, scores = slow_elalora_run(
        before.importances,
        {n: (t.q.shape[1], t.p.shape[0]) for n, t in before.layers.items()},
        first=5,
        last=34,
        interval=10,
        b0=4,
        k=2,
        beta=BETA,
    )
    assert after.ranks == expected
    for layer, result in callback_of(built).importance.scores().items():
        assert result == pytest.approx(scores[layer], rel=1e-3)
    assert callback_of(built).changes == {10: 4, 20: 3, 30: 1}
    assert len({tuple(ranks.values()) for ranks in after.ranks}) == 4
    assert {sum(ranks.values()) for ranks in after.ranks} == {4 * 7}
    # The optimizer's state stays, and its schedule goes on.
    assert len(set(after.kept)) == 1
    assert after.rates == [pytest.approx(0.02 * (1 - step / STEPS)) for step in range(STEPS)]
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=1e-5)


def ready() -> tuple[PeftModel, torch.optim.Optimizer]:
    """A model some steps into training, so that λ and moments are not zero."""
    model = cast(PeftModel, build("elalora").model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(5):
        model.zero_grad()
        model(**collate(moods(8, seed=step))).loss.backward()
        optimizer.step()
    return model, optimizer


def updates(model: PeftModel) -> dict[str, Tensor]:
    layers = triplets_of(model).items()
    return {name: cast(Any, t.layer).get_delta_weight("default").detach().clone() for name, t in layers}


def test_a_change_takes_what_is_pruned_from_the_update_and_adds_next_to_nothing() -> None:
    model, optimizer = ready()
    triplets, before = triplets_of(model)[QUERY], updates(model)
    scale = triplets.layer.scaling["default"] / (triplets.layer.ranknum["default"] + 1e-5)
    gone = (triplets.p[:, [1]] * triplets.lam[1] @ triplets.q[[1]] * scale).detach()
    assert gone.abs().max() > 1e-4
    change(triplets, remaining=[0, 2, 3], grown=2, optimizer=optimizer, seed=0)
    after = updates(model)
    assert triplets.rank == triplets.layer.r["default"] == 5
    torch.testing.assert_close(after.pop(QUERY), before.pop(QUERY) - gone, rtol=0, atol=1e-8)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_new_triplet_is_of_unit_vectors_at_right_angles_to_those_there() -> None:
    model, optimizer = ready()
    triplets = triplets_of(model)[QUERY]
    change(triplets, remaining=[0, 1, 3], grown=2, optimizer=optimizer, seed=0)
    for vectors in (triplets.q.detach(), triplets.p.detach().T):
        products = vectors @ vectors.T
        torch.testing.assert_close(products[3:, 3:], torch.eye(2), rtol=0, atol=1e-6)
        torch.testing.assert_close(products[3:, :3], torch.zeros(2, 3), rtol=0, atol=1e-6)
    assert triplets.lam[3:].flatten().tolist() == [pytest.approx(SMALLEST)] * 2
    with torch.no_grad():
        triplets.lam[0] = 1e-20
    change(triplets, remaining=[0, 1, 2], grown=1, optimizer=optimizer, seed=0)
    assert float(triplets.lam[3].detach()) == pytest.approx(1e-20)
    # More triplets than directions.
    change(triplets, remaining=[0, 1, 2, 3], grown=14, optimizer=optimizer, seed=0)
    assert triplets.rank == 18
    assert triplets.q.isfinite().all()


def test_scores_are_those_of_the_literal_transcription_number_by_number() -> None:
    model = cast(PeftModel, build("elalora").model)
    layers = triplets_of(model)
    importance, record = Importance(layers), Before(model)
    slow = {n: [SlowTriplet.new(t.q.shape[1], t.p.shape[0]) for _ in range(4)] for n, t in layers.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for triplets in layers.values():
            for matrix, _ in triplets.matrices():
                torch.nn.init.normal_(matrix, generator=generator)
                matrix.grad = torch.randn(matrix.shape, generator=generator)
        importance.update()
        for name, triplets in layers.items():
            for one, result in zip(slow[name], record.of(triplets), strict=True):
                one.take(result, BETA)
    for name, scores in importance.scores().items():
        assert scores == pytest.approx([one.score() for one in slow[name]], rel=1e-5)


@pytest.mark.parametrize("prepared", [False, True])
def test_remaining_triplets_step_as_if_nothing_had_changed_and_new_ones_begin_at_the_mean(
    prepared: bool,
) -> None:
    model, optimizer = ready()
    untouched, theirs = copy.deepcopy((model, optimizer))
    if prepared:
        optimizer = Accelerator(cpu=True).prepare_optimizer(optimizer)
    retained = [0, 2, 3]
    change(triplets_of(model)[QUERY], remaining=retained, grown=2, optimizer=optimizer, seed=0)
    generator = torch.Generator().manual_seed(1)
    pairs = list(zip(triplets_of(model)[QUERY].matrices(), triplets_of(untouched)[QUERY].matrices(), strict=True))
    for (a, dim), (b, _) in pairs:
        moments = optimizer.state[a]
        assert not moments["exp_avg"].narrow(dim, 3, 2).any()
        mean = moments["exp_avg_sq"].narrow(dim, 0, 3).mean(dim, keepdim=True)
        assert mean.any()
        assert torch.equal(moments["exp_avg_sq"].narrow(dim, 3, 1), mean)
        b.grad = torch.randn(b.shape, generator=generator)
        new = torch.randn(a.shape, generator=generator).narrow(dim, 3, 2)
        a.grad = torch.cat([b.grad.index_select(dim, torch.tensor(retained)), new], dim)
    optimizer.step()
    theirs.step()
    for (a, dim), (b, _) in pairs:
        assert torch.equal(a.detach().narrow(dim, 0, 3), b.detach().index_select(dim, torch.tensor(retained)))
        for moment in ("exp_avg", "exp_avg_sq"):
            ours = optimizer.state[a][moment].narrow(dim, 0, 3)
            assert torch.equal(ours, theirs.state[b][moment].index_select(dim, torch.tensor(retained)))
        assert optimizer.state[a]["step"] == theirs.state[b]["step"]


@pytest.mark.parametrize(("name", "weight"), [("adalora", 0.5), ("elalora", 0.1)])
def test_the_penalty_is_the_mean_distance_from_orthonormal_and_in_training_only(
    name: str, weight: float, tmp_path: Path
) -> None:
    built = build(name)
    model = cast(PeftModel, built.model)
    seen: list[tuple[bool, float, float]] = []

    def compare(module: PeftModel, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        own = torch.nn.functional.cross_entropy(output.logits.float(), kwargs["labels"])
        seen.append((module.training, float((output.loss - own).detach()), weight * distance(module)))

    model.register_forward_hook(compare, with_kwargs=True)
    trainer_of(
        built, tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=7, evaluate_on=moods(16)
    ).train()
    training = [(result, penalty) for is_training, result, penalty in seen if is_training]
    assert len(training) == 2 * STEPS
    assert all(result == pytest.approx(penalty, abs=1e-5) for result, penalty in training)
    assert min(penalty for _, penalty in training) > 0.01
    evaluation = [result for is_training, result, _ in seen if not is_training]
    assert len(evaluation) > 8
    assert evaluation == [pytest.approx(0, abs=1e-6)] * len(evaluation)


def distance(model: PeftModel) -> float:
    """Mean Frobenius norm of QQᵀ - 1 and PᵀP - 1."""
    distances = []
    for triplets in triplets_of(model).values():
        for vectors in (triplets.q.detach(), triplets.p.detach().T):
            distances.append(float((vectors @ vectors.T - torch.eye(triplets.rank)).norm()))
    return sum(distances) / len(distances)


def test_a_layer_that_the_loss_does_not_reach_is_named(tmp_path: Path) -> None:
    built = build("elalora")
    cast(Any, built.model).base_model.model.bert.pooler.forward = lambda hidden: hidden[:, 0]
    with pytest.raises(UnsupportedError, match=r"bert\.pooler\.dense has no gradient"):
        trainer_of(built, tmp_path).train()


@given(SCORES, st.integers(0, 8), st.integers(0, 4))
def test_ranks_move_as_in_the_literal_transcription_of_the_rule(scores: dict[str, list[float]], b: int, k: int) -> None:
    drops, grows = exchange(scores, moves=b, offered=k)
    pruned, expanded = slow_elalora_rule(scores, b=b, k=k)
    assert {(layer, j) for layer, which in drops.items() for j in which} == set(pruned)
    assert grows == {layer: expanded.count(layer) for layer in expanded}
    counts = {layer: len(set(which)) for layer, which in drops.items()}
    assert sum(counts.values()) == sum(grows.values()) <= b
    assert all(count <= min(k, len(scores[layer]) - 1) for layer, count in counts.items())
    assert not {layer for layer, values in scores.items() if len(values) == 1} & {*drops, *grows}


def test_where_the_pool_is_small_the_same_triplet_may_go_and_name_its_layer() -> None:
    assert exchange({"a": [1.0, 2.0]}, moves=4) == ({"a": [0]}, {"a": 1})


@given(st.integers(4, 3000))
def test_ranks_move_strictly_within_the_phase(steps: int) -> None:
    phase = change_phase(steps, method="elalora")
    due = [t for t in range(steps) if phase.start < t < phase.stop and t % default_interval(steps) == 0]
    if due:
        assert change_steps(steps) == due
    else:
        with pytest.raises(SettingsError, match=f"{steps} optimizer steps.*elalora"):
            change_steps(steps)
