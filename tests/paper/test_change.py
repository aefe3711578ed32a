import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models import samples
from slotted import OPTIMIZERS, POOLER, QUERY, WIDE, assert_hidden_are_zero, backward, take_steps, trained, wrapped
from tsqlora import paper
from tsqlora.paper.change import Importance, change_ranks, new_row
from tsqlora.paper.slots import find_slots


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(rank=st.integers(0, 6), seed=st.integers(0, 99))
def test_a_new_row_is_where_most_of_what_the_rows_leave_of_the_sketch_is_at_their_mean_norm(
    rank: int, seed: int
) -> None:
    rows, sketch = normal(rank, 9, seed=seed), normal(4, 9, seed=seed + 1)
    row = new_row(rows, sketch, seed=seed)
    assert float(row.norm()) == pytest.approx(float(rows.norm(dim=1).mean()) if rank else 3**-0.5)
    left = sketch - sketch @ torch.linalg.pinv(rows) @ rows
    leading = torch.linalg.svd(left).Vh[0]
    assert float((row @ leading).abs() / row.norm()) == pytest.approx(1)


@pytest.mark.parametrize("sketch", ["none", "zero", "spanned"])
def test_a_new_row_is_random_where_the_sketch_leaves_nothing(sketch: str) -> None:
    rows = normal(3, 9)
    sketches = {"none": None, "zero": torch.zeros(4, 9), "spanned": (normal(4, 3, seed=1) @ rows).float()}
    first, same, other = (new_row(rows.float(), sketches[sketch], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    assert float((rows.float() @ first).abs().max()) < 1e-5
    assert float(first.norm()) == pytest.approx(float(rows.norm(dim=1).mean()), rel=1e-5)


def test_a_new_row_among_rows_that_span_everything_is_still_a_direction() -> None:
    row = new_row(normal(4, 4), normal(4, 4, seed=1), seed=0)
    assert bool(row.isfinite().all())
    assert float(row.norm()) > 0


def test_rows_that_are_zero_or_equal_take_nothing_away() -> None:
    rows = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 0]])
    row = new_row(rows, torch.tensor([[5.0, 2, 1]]), seed=0)
    torch.testing.assert_close(row / row.norm(), torch.tensor([0, 2.0, 1]) / 5**0.5)


def changed():  # type: ignore[no-untyped-def]
    """A model whose ranks were changed after two steps; in QUERY slots 0 and 2 matter least."""
    model = wrapped()
    made = OPTIMIZERS["adamw"](trained(model))
    layers = find_slots(model)
    with torch.no_grad():
        layers[QUERY].a[[0, 2]] *= 1e-3
        layers[QUERY].b[:, [0, 2]] *= 1e-3
    importance = Importance(layers)
    for step in range(2):
        take_steps(model, made, 1)
        backward(model, samples(6, 3, seed=step))
        importance.update()
    sketches = {name: normal(4, slots.shape[0], seed=j) for j, (name, slots) in enumerate(layers.items())}
    ranks = paper.active_ranks(model) | {QUERY: 2, WIDE: 7, POOLER: 0}
    before = {name: slots.a.detach().clone() for name, slots in layers.items()}
    scores = {name: importance.of(name).clone() for name in layers}
    moved = change_ranks(layers, ranks, importance=importance, sketches=sketches, optimizer=made, min_age=0, seed=0)
    return model, made, importance, ranks, before, scores, moved


def test_layers_come_to_their_ranks_and_records_with_them() -> None:
    model, optimizer, importance, ranks, before, scores, moved = changed()
    assert paper.active_ranks(model) == ranks
    assert moved == 2 + 4
    assert importance.ages(WIDE).tolist() == [2] * 4 + [0] * 3
    assert_hidden_are_zero(model, optimizer)
    assert torch.equal(find_slots(model)[QUERY].a.detach()[:2], before[QUERY][[1, 3]])
    assert torch.equal(importance.of(QUERY), scores[QUERY][[1, 3]])
    assert not any(table[importance.rows[POOLER]].any() for table in importance.tables().values())


def test_a_layer_that_grows_from_nothing_has_a_second_moment_to_start_from() -> None:
    model, optimizer, importance, ranks, *_ = changed()
    layers = find_slots(model)
    grown = ranks | {POOLER: 2}
    change_ranks(layers, grown, importance=importance, sketches={}, optimizer=optimizer, min_age=0, seed=0)
    for parameter, dim in layers[POOLER].matrices():
        assert bool((optimizer.state[parameter]["exp_avg_sq"].narrow(dim, 0, 2) > 0).all())


def test_several_new_rows_are_orthogonal_to_each_other() -> None:
    model, *_ = changed()
    rows = torch.nn.functional.normalize(find_slots(model)[WIDE].a.detach())
    products = rows[4:7] @ rows[:7].T
    assert float((products - torch.eye(7, dtype=torch.float64)[4:]).abs().max()) < 1e-9
