"""Planted wrong labels come first, at their rate; probabilities hold; features without information give no evidence."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score
from transformers import Trainer, TrainingArguments

import tsqlora as tsq
from models import collate, samples, tiny_bert
from oracles import slow_contradictions
from tsqlora import paper
from tsqlora.auditing.labels import suspects as module
from tsqlora.auditing.labels.judge import judge_logits
from tsqlora.auditing.labels.suspects import Audit, audit_of, audit_of_judgement, audit_of_units
from tsqlora.errors import DataError, SettingsError
from tsqlora.model.units import Units

CLASSES, ROWS, WIDTH = 8, 1600, 24


def blobs(spread: float = 0.22) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Features around a centre for each class, and the classes."""
    rng = np.random.default_rng(0)
    true = rng.integers(CLASSES, size=ROWS)
    centres = rng.normal(size=(CLASSES, WIDTH)) / WIDTH**0.5
    return (centres[true] + spread * rng.normal(size=(ROWS, WIDTH))).astype(np.float32), true, rng


def flipped(true: np.ndarray, rate: float, rng: np.random.Generator, *, to_next: float = 0.0) -> np.ndarray:
    """Labels of which this share is another class: any, and `to_next` of them each class's next one."""
    step = np.where(rng.random(ROWS) < to_next, 1, rng.integers(1, CLASSES, size=ROWS))
    return np.where(rng.random(ROWS) < rate, (true + step) % CLASSES, true)


def wrong_of(audit: Audit, labels: np.ndarray, true: np.ndarray) -> np.ndarray:
    return (labels != true)[audit.ids]


@pytest.mark.parametrize("labels", [["a", None, "b", "a"], [0.0, np.nan, 1.0, 0.0]])
def test_a_missing_label_is_no_class(labels: list[Any]) -> None:
    with pytest.raises(DataError, match="row 1 has no label"):
        audit_of(np.eye(4), labels)


def test_a_column_of_classes_is_no_set_of_labels() -> None:
    features, true, rng = blobs()
    labels = flipped(true, 0.2, rng)
    assert audit_of(features, labels[:, None]).rate == audit_of(features, labels).rate


@pytest.mark.parametrize(("rate", "to_next"), [(0.3, 0.0), (0.2, 0.7)])
def test_planted_wrong_labels_come_first_with_probabilities_that_hold(rate: float, to_next: float) -> None:
    features, true, rng = blobs()
    labels = flipped(true, rate, rng, to_next=to_next)
    audit = audit_of(features, labels)
    wrong, p = wrong_of(audit, labels, true), audit.probability
    assert audit.evident
    assert np.all(np.diff(p[: audit.likely_wrong]) <= 0)
    assert np.all(np.diff(p[audit.likely_wrong :]) <= 0)
    assert average_precision_score(wrong, p) > 0.93
    assert audit.low - 0.02 <= wrong.mean() <= audit.high + 0.02
    assert p.mean() == pytest.approx(wrong.mean(), abs=0.03)
    bins = np.minimum((10 * p).astype(int), 9)
    off = [abs(p[bins == j].mean() - wrong[bins == j].mean()) * (bins == j).mean() for j in np.unique(bins)]
    assert sum(off) < 0.03, "90 % of the rows with a probability of 90 % are wrong"
    sure = p > 0.9
    assert (audit.suggested[sure] == true[audit.ids[sure]]).mean() > 0.9
    pair = audit.pairs[0]
    is_pair = (audit.labels == pair.label) & (audit.suggested == pair.suggested)
    assert pair.wrong == pytest.approx(wrong[is_pair].sum(), rel=0.25, abs=3)


def test_each_of_several_labels_is_judged_by_itself() -> None:
    features, true, rng = blobs()
    second = rng.integers(CLASSES, size=ROWS)
    centres = np.stack([features[true == c].mean(0) for c in range(CLASSES)])
    features = features + np.where((second != true)[:, None], centres[second], 0).astype(np.float32)
    sets = np.zeros((ROWS, CLASSES))
    sets[np.arange(ROWS), true] = sets[np.arange(ROWS), second] = 1
    wrong = rng.permutation(ROWS)[: ROWS // 5]
    labels = sets.copy()
    for row in wrong:
        labels[row, true[row]] = 0
        labels[row, rng.choice(np.flatnonzero(sets[row] == 0))] = 1
    audit = audit_of(features, labels)
    assert len(audit) == labels.sum()
    is_wrong = sets[audit.ids, audit.labels] == 0
    assert audit.evident
    assert average_precision_score(is_wrong, audit.probability) > 0.8
    assert not labels[audit.ids, audit.suggested].any(), "a row's other labels are no suggestion"
    sure = is_wrong & (audit.probability > 0.9)
    assert sets[audit.ids[sure], audit.suggested[sure]].mean() > 0.9
    assert audit_of(features, sets).likely_wrong <= 0.01 * len(audit)
    every = np.where(np.arange(ROWS)[:, None] < 40, 1, sets)
    of_all = audit_of(features, every)
    assert (of_all.suggested != of_all.labels).all(), "a row with all labels can only lose one"


def test_classes_that_lose_labels_to_a_certain_other_one_are_the_first_pairs_also_without_evidence() -> None:
    features, true, rng = blobs()
    labels = np.where((true < 4) & (rng.random(ROWS) < 0.3), true + 4, true)
    audit = audit_of(features, labels)
    assert {(pair.label, pair.suggested) for pair in audit.pairs[:4]} == {(4, 0), (5, 1), (6, 2), (7, 3)}


def test_without_evidence_rows_are_ordered_and_nothing_is_said_of_how_many_are_wrong() -> None:
    rng = np.random.default_rng(0)
    logits = 2.0 * rng.normal(size=(600, 4))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    judgement = judge_logits(logits, labels)
    audit = audit_of_judgement(judgement, labels)
    assert not audit.evident
    assert audit.why_not
    assert (audit.likely_wrong, audit.rate, audit.low, audit.high) == (0, 0, 0, 1)
    assert "rate" not in judgement.to_dict()
    assert len(np.unique(audit.probability)) > 500
    own = log_softmax(logits, axis=1)[audit.ids, audit.labels]
    assert np.corrcoef(rankdata(own), np.arange(600))[0, 1] > 0.95
    others = np.where(np.arange(4) == labels[:, None], -np.inf, logits)
    assert (audit.suggested == others.argmax(1)[audit.ids]).mean() > 0.95


def test_labels_may_be_texts_and_features_lists_and_other_shapes_are_refused() -> None:
    features, true, rng = blobs()
    labels = flipped(true, 0.2, rng)
    plain, named = audit_of(features, labels), audit_of(features.tolist(), [f"class {c}" for c in labels])
    assert named.columns()["label"].tolist() == [f"class {c}" for c in plain.labels]
    assert named.ids[: named.likely_wrong].tolist() == plain.ids[: plain.likely_wrong].tolist()
    for wrong, text in ((features[:5], "5"), (features[:, 0], "n × d"), (features * np.nan, "row 0 are not finite")):
        with pytest.raises(DataError, match=text):
            audit_of(wrong, labels)


def test_wrong_labels_of_two_classes_are_evident() -> None:
    features, true, rng = blobs()
    true = true % 2
    labels = np.where(rng.random(ROWS) < 0.2, 1 - true, true)
    audit = audit_of(features, labels)
    assert audit.evident
    assert audit.rate == pytest.approx(0.2, abs=0.03)
    listed = slice(audit.likely_wrong)
    assert wrong_of(audit, labels, true)[listed].mean() == pytest.approx(audit.probability[listed].mean(), abs=0.12)
    assert average_precision_score(wrong_of(audit, labels, true), audit.probability) > 0.8


@pytest.mark.parametrize("merged", [2, 4])
def test_classes_that_are_merged_into_two_are_no_evidence_of_wrong_labels(merged: int) -> None:
    features, true, _ = blobs(0.6)
    assert not audit_of(features, (true < merged).astype(int)).evident


@pytest.mark.parametrize(("rows_at_once", "most"), [(1_024, 1_000), (64, 1_000), (64, 20)])
def test_near_duplicates_with_different_labels_are_the_nearest_pairs_of_a_slow_twin(
    rows_at_once: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(60, 8))[rng.integers(60, size=300)] + 0.15 * rng.normal(size=(300, 8))).astype("f4")
    labels, ids = rng.integers(3, size=300), np.arange(300) * 2
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows_at_once)
    monkeypatch.setattr(module, "MOST_CONTRADICTIONS", most)
    slow = [(2 * a, 2 * b) for _, a, b in slow_contradictions(features, labels, module.NEAR)]
    result, uncompared = module.contradictions(features, labels, ids)
    assert len(slow) > 100
    assert [*result] == slow[:most]
    assert uncompared == 0


def test_near_duplicates_of_collapsed_rows_take_seconds_and_are_as_many_as_are_shown() -> None:
    rng, rows = np.random.default_rng(0), 8_000
    features = np.where(rng.random((rows, 1)) < 0.5, 1, -1) + 1e-3 * rng.normal(size=(rows, 64))
    features, labels, begun = features.astype(np.float32), rng.integers(5, size=rows), time.process_time()
    result, _ = module.contradictions(features, labels, np.arange(rows))
    assert time.process_time() - begun < 8
    assert len({*result}) == module.MOST_CONTRADICTIONS
    assert all(a < b and labels[a] != labels[b] for a, b in result)


def test_rows_too_many_to_be_compared_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = np.zeros((100, 4), np.float32), np.arange(100)
    features[:, 0] = np.arange(100) < 50
    monkeypatch.setattr(module, "MOST_PRODUCTS", 50**2 * 4 / 2)
    result, uncompared = module.contradictions(features, labels, np.arange(100))
    assert uncompared == 50
    rows = {row for pair in result for row in pair}
    assert len(rows) == 50
    assert {0, 99} <= rows, "the others are evenly spaced"


def test_a_model_or_its_trainer_is_audited_by_one_pass_that_leaves_it_as_it_was(tmp_path: Path) -> None:
    model, rows = tiny_bert(2), samples(40, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    audit = tsq.audit(model, rows, collate, classes=["no", "yes"], rows=paper.RowNames(ids=np.arange(40) + 100))
    assert sorted(audit.ids) == list(range(100, 140))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    columns = audit.columns()
    assert {len(column) for column in columns.values()} == {40}
    assert set(columns["label"]) == {"no", "yes"}
    assert np.all(columns["label"] != columns["suggested_label"])

    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=rows, data_collator=collate)
    ours = tsq.audit(trainer)
    assert (ours.ids + 100).tolist() == audit.ids.tolist()
    assert repr(ours) == f"Audit(40 labels, none called wrong: {ours.why_not})"
    unbounded = repr(replace(ours, evident=True, rate=0.065))
    assert unbounded.endswith("6.5% of all wrong)"), "bounds of 0 and 1 are none"
    trainer.train_dataset = tsq.QualitySubset(rows, fraction=0.5)
    assert tsq.audit(trainer).ids.tolist() == ours.ids.tolist()
    with pytest.raises(SettingsError, match="evaluation"):
        tsq.audit(trainer, evaluation=rows)


def test_mean_hidden_states_ignore_padding() -> None:
    from tsqlora.model.forward import mean_state

    state, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    mean = mean_state([state], mask)
    assert mean is not None
    torch.testing.assert_close(mean[0], state[0, :2].mean(0))
    torch.testing.assert_close(mean[1], state[1].mean(0))


def test_rows_of_a_class_with_few_others_are_not_judged_and_make_no_evidence() -> None:
    features, true, rng = blobs(0.3)
    rare = CLASSES + rng.permutation(30)  # each the only row of its class
    labels = np.concatenate([rare, true[30:]])
    audit = audit_of(features, labels, classes=range(CLASSES + 30))
    assert audit.unjudged == 30
    assert audit.likely_wrong <= 0.01 * ROWS
    assert not set(range(30)) & set(audit.ids[:100].tolist()), "nothing says that these are wrong"


def test_wrong_tags_are_found_by_fits_on_other_rows() -> None:
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(120), 5)
    true = rng.integers(0, 4, 600)
    features = np.eye(8)[true].astype(np.float32) * 3 + rng.normal(0, 0.5, (600, 8)).astype(np.float32)
    entities = np.flatnonzero(true < 3)
    wrong = rng.permutation(entities)[:40]
    tags = true.copy()
    tags[wrong] = (tags[wrong] + rng.integers(1, 3, 40)) % 3
    some = (each[entities] for each in (features, tags, rows))
    tokens = Units(*some, width=4, count=120, numbers=entities % 5)
    result = audit_of_units(tokens, classes=("B-a", "B-b", "B-c", "O"), ids=np.arange(120) + 1000)
    assert result.tokens is not None
    assert result.evident
    assert result.rate == pytest.approx(40 / len(entities), abs=0.04)
    places = (result.ids - 1000) * 5 + result.tokens
    assert len({*places[:40]} & {*wrong}) >= 36
    assert (true[places[:20]] == result.suggested[:20]).all()
    assert set(result.columns()) == {"row", "token", "label", "suggested_label", "wrong_probability"}


@pytest.mark.parametrize(
    ("teacher", "classes"),
    [("softmax", 2), ("softmax", 12), ("two layers", 3), ("merged clusters", 2), ("merged clusters", 12)],
)
def test_labels_that_a_known_model_draws_are_hardly_ever_called_wrong(teacher: str, classes: int) -> None:
    rng = np.random.default_rng(classes)
    features, chance = rng.normal(size=(2000, 24)).astype(np.float32), rng.gumbel(size=(2000, classes))
    if teacher == "softmax":
        true = (2 * features @ rng.normal(size=(24, classes)) / 24**0.5 + chance).argmax(1)
    elif teacher == "two layers":
        hidden = np.tanh(features @ rng.normal(size=(24, 32)) / 24**0.5)
        true = (hidden @ rng.normal(size=(32, classes)) + 0.3 * chance).argmax(1)
    else:
        clusters = rng.integers(40, size=2000)
        features, true = features + 3 * rng.normal(size=(40, 24)).astype(np.float32)[clusters], clusters % classes
    result = audit_of(features, np.eye(classes)[true])
    assert result.likely_wrong <= 0.02 * len(result)
