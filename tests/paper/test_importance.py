import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tsqlora as tsq
from oracles import slow_importance
from slotted import QUERY, WIDE, backward, wrapped
from tsqlora.paper.change import BETA, Importance, drop_slots, grow_slot, slot_products
from tsqlora.paper.slots import Slots, find_slots


def set_products(layers: dict[str, Slots], products: dict[str, list[float]]) -> None:
    """Gradients such that |Σ θ·∇θ| of each layer's slots are these numbers."""
    for name, slots in layers.items():
        slots.a.grad, slots.b.grad = torch.zeros_like(slots.a), torch.zeros_like(slots.b)
        for j, product in enumerate(products[name]):
            slots.a.grad[j, 0] = product / slots.a.detach()[j, 0]


def begun() -> tuple[dict[str, Slots], Importance]:
    layers = find_slots(wrapped())
    return layers, Importance(layers)


def test_a_slots_product_is_that_of_its_row_and_column_with_their_gradients() -> None:
    a, b = torch.randn(3, 5), torch.randn(4, 3)
    grad_a, grad_b = torch.randn(3, 5), torch.randn(4, 3)
    result = slot_products(a, grad_a, b, grad_b)
    for j in range(3):
        expected = abs(float(a[j] @ grad_a[j] + b[:, j] @ grad_b[:, j]))
        assert float(result[j]) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=8)
@given(steps=st.integers(1, 8), seed=st.integers(0, 99))
def test_importance_agrees_with_the_slow_twin(steps: int, seed: int) -> None:
    layers = find_slots(MODEL)
    importance = Importance(layers)
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(steps):
        drawn = torch.rand(len(layers), 4, generator=generator)
        set_products(layers, {name: row.tolist() for name, row in zip(layers, drawn, strict=True)})
        assert importance.update()
        seen.append((drawn / drawn.sum()).flatten())
    expected = slow_importance(seen, BETA).view(len(layers), 4)
    for name, row in zip(layers, expected, strict=True):
        torch.testing.assert_close(importance.of(name), row, rtol=1e-4, atol=1e-9)
        assert importance.ages(name).tolist() == [steps] * 4


def test_clipping_and_loss_scaling_drop_out() -> None:
    plain, scaled = Importance(find_slots(MODEL)), Importance(find_slots(MODEL))
    for _ in range(3):
        backward(MODEL)
        plain.update()
        for slots in find_slots(MODEL).values():
            for parameter, _ in slots.matrices():
                parameter.grad.mul_(1024.0)
        scaled.update()
    torch.testing.assert_close(plain.mean, scaled.mean)
    torch.testing.assert_close(plain.spread, scaled.spread)


@pytest.mark.parametrize(("bad", "others"), [(torch.inf, False), (torch.nan, False), (torch.inf, True)])
def test_what_is_not_finite_changes_nothing_also_in_the_norm_of_other_gradients(bad: float, others: bool) -> None:
    importance = Importance(find_slots(MODEL))
    backward(MODEL)
    assert importance.update()
    before = {name: table.clone() for name, table in importance.tables().items()}
    backward(MODEL)
    if not others:
        find_slots(MODEL)[QUERY].a.grad[1, 2] = bad  # type: ignore[index]
    assert not importance.update(torch.tensor(bad) if others else None)
    assert all(torch.equal(table, before[name]) for name, table in importance.tables().items())


def test_records_are_saved_and_move_with_the_slots() -> None:
    layers, importance = begun()
    for steps in (1, 2, 3):
        set_products(layers, {name: [0.1 * steps, 0.2, 0.3 / steps, 0.4] for name in layers})
        importance.update()
    before, saved = importance.of(QUERY), Importance(layers)
    saved.restore({name: table.clone() for name, table in importance.tables().items()})
    assert torch.equal(saved.of(QUERY), before)
    importance.dropped(QUERY, [0, 2])
    drop_slots(layers[QUERY], [0, 2], None)
    assert torch.equal(importance.of(QUERY), before[[1, 3]])
    grow_slot(layers[QUERY], torch.ones(16), None)
    assert importance.ages(QUERY).tolist() == [3, 3, 0]
    assert importance.of(QUERY)[2] == 0
    assert not importance.mean[importance.rows[QUERY], 3:].any()


def test_a_slot_is_corrected_by_its_own_age() -> None:
    layers, importance = begun()
    for step in range(5):
        if step == 3:
            grow_slot(layers[QUERY], torch.ones(16, dtype=torch.float64), None)
        share = 1.0 if step < 3 else 0.5  # so that shares add up to one over the model in the end too
        set_products(layers, {n: [share] * s.rank if n == QUERY else [0.0] * 4 for n, s in layers.items()})
        importance.update()
    row = importance.rows[QUERY]
    old, new = (importance.mean[row] / importance._correction()[row])[[0, 4]]
    assert importance.ages(QUERY).tolist() == [5, 5, 5, 5, 2]
    assert float(new) == pytest.approx(0.2)
    assert 0.2 < float(old) < 0.25


def test_the_least_important_go_first_and_a_young_slot_never() -> None:
    layers, importance = begun()
    for step in range(4):
        if step == 2:
            grow_slot(layers[WIDE], torch.ones(16, dtype=torch.float64), None)
        products = {name: [0.4, 0.1, 0.3, 0.2, 0.0][: slots.rank] for name, slots in layers.items()}
        set_products(layers, {n: [p * (1 + step % 2) for p in products[n]] for n in layers})
        importance.update()
    assert importance.least(QUERY, 3, min_age=3) == [1, 3, 2]
    assert importance.least(WIDE, 2, min_age=3) == [1, 3]
    assert importance.least(WIDE, 1, min_age=2) == [4]
    with pytest.raises(AssertionError):
        importance.least(WIDE, 5, min_age=3)


def test_before_any_step_the_smallest_go_first() -> None:
    """An adapter that is trained already may have its largest direction in its first slot."""
    layers, importance = begun()
    with torch.no_grad():
        layers[QUERY].a[:4] = torch.ones_like(layers[QUERY].a[:4])
        layers[QUERY].b[:, :4] = torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert importance.least(QUERY, 3, min_age=0) == [1, 3, 2]


def test_layers_on_several_devices_are_brought_to_one() -> None:
    model = wrapped()
    backward(model)
    first = next(iter(find_slots(model)))
    # A second device that every machine has; to it tensors can be moved, from it none.
    model.get_base_model().get_submodule(first).to("meta")
    for parameter, _ in find_slots(model)[first].matrices():
        parameter.grad = torch.empty_like(parameter)
    importance = Importance(find_slots(model))
    assert importance.update().device == importance.mean.device == torch.device("meta")


def test_gradients_that_cannot_be_seen_are_refused() -> None:
    model = wrapped()
    with pytest.raises(tsq.UnsupportedError, match=r"no LoRA weight has a gradient.*leave out RankCallback"):
        Importance(find_slots(model)).update()


MODEL = wrapped()
