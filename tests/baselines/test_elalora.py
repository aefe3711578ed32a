import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

import tsqlora as tsq
from models import collate
from oracles import SlowTriplet, slow_elalora_run
from setups import STEPS, base, build, logits_of, trainer_of
from stock import moods
from tsqlora.baselines import Built
from tsqlora.baselines.elalora import ElaLoraCallback
from tsqlora.baselines.svd import BETA, SMALLEST, Importance, Triplets, change, triplets_of
from tsqlora.errors import UnsupportedError

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


def run(folder: Path) -> tuple[Built, Before, After]:
    built = build("elalora")
    before, after = Before(cast(PeftModel, built.model)), After(built)
    watched = Built(built.model, (before, *built.callbacks), built.trainable, built.ranks)
    trainer_of(watched, folder, after).train()
    return built, before, after


def callback_of(built: Built) -> ElaLoraCallback:
    (found,) = (c for c in built.callbacks if isinstance(c, ElaLoraCallback))
    return found


def test_ranks_are_those_of_the_literal_rule_on_recorded_importances(tmp_path: Path) -> None:
    built, before, after = run(tmp_path)
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
    for layer, found in callback_of(built).importance.scores().items():
        assert found == pytest.approx(scores[layer], rel=1e-3)
    assert callback_of(built).changes == {10: 4, 20: 3, 30: 1}
    assert len({tuple(ranks.values()) for ranks in after.ranks}) == 4
    assert {sum(ranks.values()) for ranks in after.ranks} == {4 * 7}
    # The optimizer's state stays, and its schedule goes on.
    assert len(set(after.kept)) == 1
    assert after.rates == [pytest.approx(0.02 * (1 - step / STEPS)) for step in range(STEPS)]


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
            for one, found in zip(slow[name], record.of(triplets), strict=True):
                one.take(found, BETA)
    for name, scores in importance.scores().items():
        assert scores == pytest.approx([one.score() for one in slow[name]], rel=1e-5)


def test_new_vectors_follow_the_seed() -> None:
    def row(seed: int) -> Tensor:
        model, optimizer = ready()
        change(triplets_of(model)[QUERY], remaining=[0], grown=1, optimizer=optimizer, seed=seed)
        return triplets_of(model)[QUERY].q[1].detach()

    assert torch.equal(row(3), row(3))
    assert not torch.equal(row(3), row(4))


def test_a_layer_may_have_more_triplets_than_directions() -> None:
    model, optimizer = ready()
    triplets = triplets_of(model)[QUERY]
    change(triplets, remaining=[0, 1, 2, 3], grown=14, optimizer=optimizer, seed=0)
    assert triplets.rank == 18
    assert triplets.q.isfinite().all()


@pytest.mark.parametrize("prepared", [False, True])
def test_kept_triplets_take_the_next_step_as_if_nothing_had_changed(prepared: bool) -> None:
    model, optimizer = ready()
    untouched, theirs = copy.deepcopy((model, optimizer))
    if prepared:
        optimizer = Accelerator(cpu=True).prepare_optimizer(optimizer)
    kept = [0, 2, 3]
    change(triplets_of(model)[QUERY], remaining=kept, grown=2, optimizer=optimizer, seed=0)
    generator = torch.Generator().manual_seed(1)
    for (a, dim), (b, _) in zip(
        triplets_of(model)[QUERY].matrices(), triplets_of(untouched)[QUERY].matrices(), strict=True
    ):
        b.grad = torch.randn(b.shape, generator=generator)
        new = torch.randn(a.shape, generator=generator).narrow(dim, 3, 2)
        a.grad = torch.cat([b.grad.index_select(dim, torch.tensor(kept)), new], dim)
    optimizer.step()
    theirs.step()
    for (a, dim), (b, _) in zip(
        triplets_of(model)[QUERY].matrices(), triplets_of(untouched)[QUERY].matrices(), strict=True
    ):
        assert torch.equal(a.detach().narrow(dim, 0, 3), b.detach().index_select(dim, torch.tensor(kept)))
        for moment in ("exp_avg", "exp_avg_sq"):
            ours = optimizer.state[a][moment].narrow(dim, 0, 3)
            assert torch.equal(ours, theirs.state[b][moment].index_select(dim, torch.tensor(kept)))
        assert optimizer.state[a]["step"] == theirs.state[b]["step"]


def test_moments_of_new_triplets_begin_at_zero_and_at_the_mean() -> None:
    model, optimizer = ready()
    triplets = triplets_of(model)[QUERY]
    change(triplets, remaining=[1, 2], grown=1, optimizer=optimizer, seed=0)
    for matrix, dim in triplets.matrices():
        state = optimizer.state[matrix]
        assert not state["exp_avg"].narrow(dim, 2, 1).any()
        mean = state["exp_avg_sq"].narrow(dim, 0, 2).mean(dim, keepdim=True)
        assert torch.equal(state["exp_avg_sq"].narrow(dim, 2, 1), mean)
        assert mean.any()


def test_the_penalty_is_a_tenth_of_the_mean_distance_from_orthonormal_and_in_training_only(tmp_path: Path) -> None:
    built = build("elalora")
    model = cast(PeftModel, built.model)
    seen: list[tuple[bool, float, float]] = []

    def compare(module: PeftModel, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        own = torch.nn.functional.cross_entropy(output.logits.float(), kwargs["labels"])
        seen.append((module.training, float((output.loss - own).detach()), expected_penalty(module)))

    model.register_forward_hook(compare, with_kwargs=True)
    trainer_of(
        built, tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=7, evaluate_on=moods(16)
    ).train()
    training = [(found, penalty) for is_training, found, penalty in seen if is_training]
    assert len(training) == 2 * STEPS
    assert all(found == pytest.approx(penalty, abs=1e-5) for found, penalty in training)
    assert min(penalty for _, penalty in training) > 0.05
    evaluation = [found for is_training, found, _ in seen if not is_training]
    assert evaluation
    assert evaluation == [pytest.approx(0, abs=1e-6)] * len(evaluation)


def expected_penalty(model: PeftModel) -> float:
    distances = []
    for triplets in triplets_of(model).values():
        for vectors in (triplets.q.detach(), triplets.p.detach().T):
            distances.append(float((vectors @ vectors.T - torch.eye(triplets.rank)).norm()))
    return 0.1 * sum(distances) / len(distances)


# PEFT warns so of every AdaLoRA adapter, of its own too, and goes by the pattern nevertheless.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_an_adapter_with_moved_ranks_loads_with_peft_alone(tmp_path: Path) -> None:
    built, _, _ = run(tmp_path)
    model = cast(PeftModel, built.model)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert len(set(built.ranks().values())) > 1
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=1e-5)


def test_a_run_that_ends_before_the_first_move_is_an_error(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 10

    with pytest.raises(tsq.TsqLoraError, match=r"after 10 steps.* step 11.*elalora"):
        trainer_of(build("elalora"), tmp_path, Stop()).train()


def test_a_run_is_not_resumed(tmp_path: Path) -> None:
    trainer_of(build("elalora"), tmp_path, save_strategy="steps", save_steps=8).train()
    with pytest.raises(UnsupportedError, match="elalora"):
        trainer_of(build("elalora"), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_layer_that_the_loss_does_not_reach_is_named(tmp_path: Path) -> None:
    built = build("elalora")
    cast(Any, built.model).base_model.model.bert.pooler.forward = lambda hidden: hidden[:, 0]
    with pytest.raises(UnsupportedError, match=r"bert\.pooler\.dense has no gradient"):
        trainer_of(built, tmp_path).train()
