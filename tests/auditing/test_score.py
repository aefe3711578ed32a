"""Scores against the slow twin: one sample at a time, every parameter really stepped."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from transformers import BertForTokenClassification, Wav2Vec2ForSequenceClassification

from made_media import wav2vec2_config
from models import collate, lora, samples, tiny_bert
from oracles import slow_multi_label_loss, slow_scores, slow_token_loss
from scoring import (
    assert_agree,
    assert_unchanged,
    cross_entropy,
    fingerprint,
    logits_of,
    score_by,
    slow,
    slow_offsets,
    squared_error,
    teach,
    trainable,
)
from tsqlora import paper
from tsqlora.errors import SettingsError, TsqLoraError, UnsupportedError
from tsqlora.model.terms import TERMS, Term
from tsqlora.paper.slots import find_slots
from tsqlora.rows.batches import padded_labels
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.multi_label import MultiLabel

Rows = list[dict[str, Any]]
N = 14
REFERENCE = [0, 3, 4, 6, 8, 9, 12]
ALL_TERMS = ("gradient_norm", "loss_reduction", "convergence")


def adapted(build: Callable[..., Any] = tiny_bert, **options: Any) -> tuple[PeftModel, Rows]:
    """A LoRA model with a trained head, and rows that it has learned."""
    labels = options.get("num_labels", 3)
    model = lora(build(**options))
    rows = samples(N, labels, regression=labels == 1)
    teach(model, rows)
    return model, rows


def slotted(dtype: torch.dtype = torch.float64) -> tuple[PeftModel, Rows]:
    """A model of `wrap` whose layers have ranks 0 to 4, at capacity 6."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = paper.wrap(tiny_bert(dtype=dtype), mean_rank=3, dropout=0.1, modules_to_save=["classifier"])
        for j, slots in enumerate(find_slots(model).values()):
            with torch.no_grad():
                slots.b.normal_(std=0.1)
                slots.a[j % 5 :] = 0
                slots.b[:, j % 5 :] = 0
            slots.set_rank(j % 5)
    rows = samples(N, 3)
    teach(model, rows)
    return model, rows


def score(model: nn.Module, rows: Rows, **options: Any) -> paper.Scores:
    """With the head that the model has: it is what the twins are given."""
    return score_by(model, rows, collate, **{"reference": REFERENCE, "batch_size": 7, "head_start": False} | options)


# --- the twin -----------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", [True, False])
@pytest.mark.parametrize("make", [adapted, slotted])
def test_scores_of_a_classifier_are_the_twins(make: Callable[[], tuple[PeftModel, Rows]], calibration: bool) -> None:
    model, rows = make()
    offsets = slow_offsets(model, [rows[j] for j in REFERENCE]) if calibration else None

    scores = score(model, rows, calibration=calibration)

    assert_agree(scores, slow(model, rows, REFERENCE, offsets=offsets))
    if offsets is None:
        assert scores.record.offsets is None
    else:
        np.testing.assert_allclose(scores.record.offsets, offsets, atol=1e-6)


@pytest.mark.parametrize("calibration", [True, False])
def test_scores_of_a_regression_are_the_twins(calibration: bool) -> None:
    model, rows = adapted(num_labels=1)
    labels = torch.tensor([rows[j]["labels"] for j in REFERENCE], dtype=torch.float32)
    lean = (labels.double() - logits_of(model, [rows[j] for j in REFERENCE])[:, 0]).mean().reshape(1)

    scores = score(model, rows, calibration=calibration)

    offsets = lean if calibration else None
    assert_agree(scores, slow(model, rows, REFERENCE, offsets=offsets, loss=squared_error))
    assert scores.record.offsets == (pytest.approx(lean.tolist()) if calibration else None)
    assert scores.strata is None


@pytest.mark.parametrize("calibration", [True, False])
def test_scores_of_several_labels_are_the_twins(calibration: bool) -> None:
    model, rows = adapted(num_labels=4, problem_type="multi_label_classification")
    logits = logits_of(model, rows)
    for row, z in zip(rows, logits, strict=True):
        row["labels"] = (z > 0).double().tolist()
    labels = torch.tensor([row["labels"] for row in rows])
    offsets = MultiLabel().offsets(logits[REFERENCE], labels[REFERENCE]) if calibration else None

    scores = score(model, rows, calibration=calibration)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return slow_multi_label_loss(z[0], y[0]).reshape(1)

    assert_agree(scores, slow(model, rows, REFERENCE, offsets=offsets, loss=loss))
    assert scores.strata is None
    np.testing.assert_array_equal(scores.labels, labels)
    p = torch.sigmoid(logits if offsets is None else logits + offsets)
    np.testing.assert_allclose(scores.terms["el2n"], (p - labels).norm(dim=1), rtol=1e-5)


def test_scores_of_tags_are_the_twins() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = BertForTokenClassification(tiny_bert(num_labels=3).config).double()
    model, rows = lora(base), samples(N, 3)
    for row in rows:
        row["labels"] = [-100, *[token % 3 for token in row["input_ids"][1:]]]

    def padded(batch: Rows) -> dict[str, Tensor]:
        made = collate([{**row, "labels": 0} for row in batch])
        made["labels"] = torch.from_numpy(padded_labels([r["labels"] for r in batch], made["input_ids"].shape[1]))
        return made

    scores = score_by(model, rows, padded, reference=REFERENCE, batch_size=7, head_start=False)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return slow_token_loss(z[0], y[0]).reshape(1)

    ones = [padded([row]) for row in rows]
    assert_agree(scores, slow_scores(model, ones, sample_loss=loss, theta=trainable(model), reference=REFERENCE))
    assert scores.labels.tolist() == [len(row["labels"]) - 1 for row in rows]


@torch.no_grad()
def learn(model: nn.Module, rows: Rows, collate: Callable[[Rows], dict[str, Tensor]]) -> None:
    """Makes the head surer of itself, and its predictions the labels of the rows."""
    head = {n: p for n, p in trainable(model).items() if "classifier" in n}
    z = torch.cat([model.eval()(**collate([row])).logits for row in rows])
    factor = 3 / float((z - z.mean(0)).std())
    for name, parameter in head.items():
        parameter.mul_(factor)
        if name.endswith("bias"):
            parameter.sub_(factor * z.mean(0))
    for row, label in zip(rows, (z - z.mean(0)).argmax(1), strict=True):
        row["labels"] = label
    model.train()


def test_scores_of_recordings_are_the_twins() -> None:
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Wav2Vec2ForSequenceClassification(wav2vec2_config(num_labels=3)).double()
    waves = [torch.from_numpy(rng.normal(size=rng.integers(800, 1600))) for _ in range(N)]
    rows = [{"input_values": wave, "attention_mask": torch.ones(len(wave), dtype=torch.long)} for wave in waves]
    model = lora(base)

    def padded(batch: Rows) -> dict[str, Tensor]:
        parts = {name: [row[name] for row in batch] for name in batch[0]}
        return {name: pad_sequence(x, batch_first=True) if x[0].dim() else torch.stack(x) for name, x in parts.items()}

    learn(model, rows, padded)
    options = {"reference": REFERENCE, "batch_size": 4, "calibration": False, "head_start": False}
    scores = score_by(model, rows, padded, **options)
    ones = [padded([row]) for row in rows]
    twin = slow_scores(model, ones, sample_loss=cross_entropy, theta=trainable(model), reference=REFERENCE)
    assert_agree(scores, twin)


def test_a_row_outside_the_reference_keeps_the_whole_mean_and_one_inside_does_not() -> None:
    model, rows = adapted()
    # The same to the model, and other rows all the same.
    others = [{**rows[j], "from": "elsewhere"} for j in REFERENCE]
    inside, outside = score(model, rows), score(model, rows, reference=others)
    rest = [j for j in range(N) if j not in REFERENCE]

    np.testing.assert_allclose(inside.terms["convergence"][rest], outside.terms["convergence"][rest], rtol=1e-9)
    m = len(REFERENCE)
    dot = outside.terms["convergence"][REFERENCE] * outside.record.reference_norm
    own = (dot - outside.terms["gradient_norm"][REFERENCE] ** 2 / m) * m / (m - 1)
    np.testing.assert_allclose(inside.terms["convergence"][REFERENCE], own / outside.record.reference_norm, rtol=1e-9)
    assert inside.record.reference == REFERENCE
    assert outside.record.reference == []


def test_a_custom_term_is_a_column_and_may_have_a_weight() -> None:
    def halved(m: Any) -> torch.Tensor:
        return m.loss / 2

    model, rows = adapted()
    scores = score(model, rows, terms=[halved], weights={"halved": 1.0})
    assert set(scores.terms) == {"halved", "loss", "el2n"}
    np.testing.assert_allclose(scores.terms["halved"], scores.terms["loss"] / 2)
    assert scores.probability.argmax() in np.flatnonzero(scores.quality == scores.quality.max())


@pytest.mark.parametrize("equal", [False, True], ids=["the same objects", "equal ones"])
def test_samples_of_the_data_set_given_as_reference_do_not_vouch_for_themselves(equal: bool) -> None:
    model, rows = adapted()
    arguments = [dict(rows[j]) if equal else rows[j] for j in REFERENCE]
    by_place, by_sample = score(model, rows), score(model, rows, reference=arguments)
    assert_equal_scores(by_place, by_sample)
    assert by_sample.record.reference == REFERENCE


def test_a_reference_of_other_samples_is_the_twins() -> None:
    model, rows = adapted()
    retained, other = rows[:7], rows[7:]
    offsets = slow_offsets(model, other)

    scores = score(model, retained, reference=other)

    assert_agree(scores, slow(model, rows, range(7, N), offsets=offsets), rows=7)


@pytest.mark.parametrize("make", [partial(adapted, dtype=torch.float32), partial(slotted, torch.float32)])
def test_scores_in_float32_are_the_twins_to_three_digits(make: Callable[[], tuple[PeftModel, Rows]]) -> None:
    model, rows = make()
    scores = score(model, rows, calibration=False)
    assert_agree(scores, slow(model, rows, REFERENCE), rtol=1e-3)


def test_scores_under_bfloat16_autocast_are_the_twins_under_it_to_two_digits() -> None:
    model, rows = adapted(dtype=torch.float32)
    scores = score(model, rows, terms=ALL_TERMS[::2], calibration=False, autocast=torch.bfloat16)
    # With the attention that scoring uses for short samples: the fused one differs by more than two digits here.
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), sdpa_kernel(SDPBackend.MATH):
        twin = slow(model, rows, REFERENCE)
    for name in ("loss", "gradient_norm", "convergence"):
        target = getattr(twin, name)
        np.testing.assert_allclose(scores.terms[name], target, atol=0.02 * target.abs().max(), err_msg=name)
    assert scores.record.autocast == "bfloat16"
    with pytest.raises(SettingsError, match="loss_reduction"):
        score(model, rows, autocast=torch.bfloat16)


def test_the_loss_is_that_of_training_with_class_weights_and_smoothing() -> None:
    model, rows = adapted()
    weights = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        smooth = -0.8 * logits.log_softmax(1)[range(len(labels)), labels] - 0.2 * logits.log_softmax(1).mean(1)
        return weights[labels] * smooth

    task = Classification(label_smoothing=0.2, class_weights=weights)
    scores = score(model, rows, task=task, calibration=False)
    assert_agree(scores, slow(model, rows, REFERENCE, loss=loss))


# --- what a score may not depend on -------------------------------------------------------


def assert_equal_scores(left: paper.Scores, right: paper.Scores, order: Any = slice(None)) -> None:
    assert left.terms.keys() == right.terms.keys()
    for name, values in left.terms.items():
        atol = 1e-9 * np.abs(values).max()
        np.testing.assert_allclose(right.terms[name], values[order], rtol=1e-8, atol=atol, err_msg=name)
    np.testing.assert_allclose(right.quality, left.quality[order], atol=1e-6)


def test_scores_depend_on_neither_batch_nor_padding() -> None:
    model, rows = adapted(layers=1)
    expected = score(model, rows, batch_size=1)
    for size in (3, N):
        assert_equal_scores(expected, score(model, rows, batch_size=size))
    padded = score_by(model, rows, partial(collate, pad_to=40), reference=REFERENCE, batch_size=5)
    assert_equal_scores(expected, padded)


def test_scores_follow_their_rows_into_another_order() -> None:
    model, rows = adapted(layers=1)
    order = np.random.default_rng(0).permutation(N)
    places = [int(np.flatnonzero(order == j)[0]) for j in REFERENCE]
    moved = score(model, [rows[j] for j in order], reference=places)
    assert_equal_scores(score(model, rows), moved, order)


def test_scores_depend_on_neither_dropout_nor_mode_nor_gradients_of_inputs() -> None:
    model, rows = adapted(layers=1)
    expected = score(model, rows)
    model.eval()
    assert_equal_scores(expected, score(model, rows))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    assert_equal_scores(expected, score(model, rows))
    model.enable_input_require_grads()
    assert_equal_scores(expected, score(model, rows))


def test_scores_are_the_same_under_gradient_checkpointing() -> None:
    model, rows = adapted(layers=1)
    expected = score(model, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name changed in transformers 5
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    layer = model.get_base_model().bert.encoder.layer[0]
    calls: list[bool] = []
    # Before, not after: recomputation ends as soon as it has what it needs.
    layer.attention.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    before = fingerprint(model)

    assert_equal_scores(expected, score(model, rows))

    assert_unchanged(before, model)
    passes = 2 + 1 + 1 + 1  # data set, reference, and two trials of one batch
    assert sum(calls) > passes, "no layer was called again: nothing was checkpointed"


# --- the model is left as it was ----------------------------------------------------------


class Breaks(Exception):
    pass


@pytest.fixture
def in_training() -> tuple[PeftModel, Rows]:
    """Gradients half accumulated, modes mixed, a hook of the user's."""
    model, rows = adapted(layers=1)
    for j, parameter in enumerate(model.parameters()):
        if parameter.requires_grad and j % 2:
            parameter.grad = torch.randn_like(parameter)
    for j, module in enumerate(model.modules()):
        module.training = j % 3 > 0
    model.get_base_model().bert.pooler.register_forward_hook(lambda *_: None)
    return model, rows


def test_the_model_is_left_as_it_was_when_a_forward_raises(in_training: tuple[PeftModel, Rows]) -> None:
    model, rows = in_training
    total = 0

    def count(*_: Any) -> None:
        nonlocal total
        total += 1

    counting = model.get_base_model().bert.encoder.layer[0].register_forward_pre_hook(count)
    score(model, rows)
    counting.remove()
    # The last forward is a stepped one; the one before it has a backward.
    for at in (1, total - 1, total):
        calls = 0

        def breaks(*_: Any, at: int = at) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Breaks

        handle = model.get_base_model().bert.encoder.layer[0].register_forward_pre_hook(breaks)
        before = fingerprint(model)
        with pytest.raises(Breaks):
            score(model, rows)
        assert_unchanged(before, model)
        handle.remove()


# --- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize("head_start", [True, False])
def test_a_model_at_chance_with_any_head_gives_even_scores_and_warns(head_start: bool) -> None:
    model, rows = lora(tiny_bert(layers=1)), samples(40, 3)
    before = fingerprint(model)
    with pytest.warns(UserWarning, match="no terms of gradients: the model's loss on 40 rows is"):
        scores = score_by(model, rows, collate, head_start=head_start, weights={"convergence": 1.0}, temperature=2.0)
    assert_unchanged(before, model)
    assert scores.record.not_ready
    assert scores.terms.keys() == {"loss", "el2n"}
    assert scores.even
    np.testing.assert_allclose(scores.probability, 1 / 40)


@pytest.mark.parametrize("head_start", [True, False])
def test_a_model_with_broken_weights_is_refused(head_start: bool) -> None:
    model, rows = adapted(layers=1)
    with torch.no_grad():
        model.get_base_model().bert.pooler.dense.base_layer.weight[0, 0] = torch.nan
    with pytest.raises(TsqLoraError, match="not finite"):
        score(model, rows, head_start=head_start)


def test_another_loss_than_the_models_own_is_noticed() -> None:
    model, rows = adapted(num_labels=1, layers=1)

    def another(_model: nn.Module, _args: Any, output: Any) -> None:
        output.loss = torch.tensor(1e3)

    model.get_base_model().register_forward_hook(another)
    with pytest.raises(UnsupportedError, match=r"1000.0000.*regression"):
        score(model, rows)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"reference": [1]}, "reference"),
        ({"reference": [1, 1]}, "reference"),
        ({"reference": [1, 14]}, "reference"),
        ({"reference": [-1, 2]}, "reference"),
        ({"terms": ("los",)}, "'los'"),
        ({"weights": {"gradient_nrm": 1.0}}, "'gradient_nrm'; did you mean 'gradient_norm'"),
        ({"weights": {"loss": -1.0}, "temperature": 0.0}, "temperature is 0.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"weights": {"loss": float("nan")}}, "'loss' is nan"),
        ({"hashes": ["a"]}, "1 hashes"),
        ({"ids": np.arange(3)}, "3 ids"),
    ],
)
def test_invalid_settings_are_refused_before_anything_is_computed(options: dict[str, Any], names: str) -> None:
    model = lora(tiny_bert(layers=1))
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    with pytest.raises(SettingsError, match=names):
        score(model, samples(N, 3), **options)
    with pytest.raises(SettingsError, match="no rows"):
        score(model, [])


# --- extension, defaults, record ----------------------------------------------------------


def test_a_term_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TERMS, "mean_loss", Term(lambda m: m.loss.mean()))
    model, rows = adapted(layers=1)
    with pytest.raises(SettingsError, match="'mean_loss'"):
        score(model, rows, weights={"mean_loss": 1.0})


def test_only_a_term_that_looks_ahead_costs_another_forward() -> None:
    model, rows = adapted(layers=1)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_pre_hook(count)
    counts = []
    for terms in (ALL_TERMS, ("gradient_norm", "convergence")):
        calls = 0
        assert ("loss_reduction" in score(model, rows, terms=terms).terms) == (terms == ALL_TERMS)
        counts.append(calls)
    assert counts[0] - counts[1] == 2
