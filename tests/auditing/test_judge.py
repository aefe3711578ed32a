"""The judge finds wrong labels wherever they concentrate, and loses no clean row that a linear fit cannot fit."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.metrics import average_precision_score

from tsqlora.auditing.labels import judge as module
from tsqlora.auditing.labels import label_noise
from tsqlora.auditing.labels.judge import DOUBT, FEWEST, judge, judge_logits
from tsqlora.auditing.labels.suspects import audit_of_judgement
from tsqlora.errors import DataError


def table(
    seed: int, classes: int, rows: int, *, width: int = 48, spread: float = 0.25
) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Features around a centre of norm about 1 for each class, and the classes."""
    rng = np.random.default_rng(seed)
    true = rng.integers(classes, size=rows)
    centres = rng.normal(size=(classes, width)) / width**0.5
    return (centres[true] + spread * rng.normal(size=(rows, width))).astype(np.float32), true, rng


def moved(true: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Labels of which this share of all rows, of the other classes, is moved to class 0."""
    labels = true.copy()
    labels[rng.permutation(np.flatnonzero(true))[: round(share * len(true))]] = 0
    return labels


@pytest.mark.parametrize(("classes", "rows", "share"), [(6, 2_500, 0.105), (20, 3_000, 0.1)])
def test_labels_moved_into_one_class_are_left_out_also_of_rows_that_the_judge_has_not_seen(
    classes: int, rows: int, share: float
) -> None:
    features, true, rng = table(0, classes, rows + 800)
    labels = moved(true, share, rng)
    seen, new, wrong = slice(0, rows), slice(rows, None), labels != true
    judgement, together = judge(features[seen], labels[seen], classes), judge(features, labels, classes)
    assert judgement.evident
    assert judgement.low <= wrong[seen].mean() <= judgement.high
    np.testing.assert_allclose(judgement.p_wrong, 1 - judgement.p_true[np.arange(rows), labels[seen]])
    assert judgement.verdict is not None
    logits, p_wrong = judgement.verdict.of(features[new], labels[new])
    assert logits.shape == (800, classes)
    for part, listed in ((seen, judgement.left_out), (new, p_wrong > DOUBT)):
        assert wrong[part][listed].mean() >= 0.65
        assert listed[wrong[part]].mean() >= 0.6
        # A class that loses no label to another one keeps its rows.
        assert listed[labels[part] > 0].mean() < 0.02
    assert ((p_wrong > DOUBT) == together.left_out[new]).mean() > 0.98


def test_a_copy_defends_no_wrong_label_and_hides_no_evidence() -> None:
    features, true, rng = table(0, 5, 600)
    labels = moved(true, 0.08, rng)
    once, twice = judge(features, labels, 5), np.repeat(np.arange(600), 2)
    np.random.seed(5)
    np.testing.assert_array_equal(judge(features, labels, 5).p_wrong, once.p_wrong)
    noise = 1 + 1e-6 * rng.normal(size=(1_200, features.shape[1])).astype(np.float32)  # of another batch
    copied = judge(features[twice] * noise, labels[twice], 5)
    assert copied.evident
    assert (once.copies, copied.copies) == (0, 600)
    np.testing.assert_array_equal(copied.left_out, once.left_out[twice])
    # A copy with another label is another row.
    other = judge(np.repeat(features, 2, axis=0), np.stack([labels, (labels + 1) % 5], axis=1).reshape(-1), 5)
    assert other.copies == 0


@pytest.mark.parametrize(("different", "times"), [(4, 10), (8, 8)])
def test_a_few_rows_that_are_there_many_times_are_judged_without_evidence(different: int, times: int) -> None:
    features, labels, _ = table(0, 2, different)
    labels = np.arange(different) % 2
    judgement = judge(np.tile(features, (times, 1)), np.tile(labels, times), 2)
    assert not judgement.left_out.any()


def test_a_copy_of_a_row_with_several_labels_defends_none_of_them() -> None:
    features, true, rng = table(0, 10, 1_000)
    labels = moved(true, 0.08, rng)
    wrong, twice = labels != true, np.tile(np.arange(1_000), 2)
    rows = np.arange(1_000) // 2  # of two labels each, whose features differ as those of tokens do
    once = judge(features, labels, 10, groups=rows)
    copied = judge(features[twice], labels[twice], 10, groups=np.concatenate([rows, rows + 500]))
    assert once.left_out[wrong].mean() > 0.6
    assert copied.left_out[:1_000][wrong].mean() > 0.9 * once.left_out[wrong].mean()
    few = judge(features[[0] * 10], np.arange(10) % 2, 2, groups=np.arange(10))
    assert len(few.logits) == 10, "all rows are copies"


@pytest.mark.parametrize("minority", [0.5, 0.3, 0.1])
def test_a_clean_table_that_no_line_separates_loses_nothing(minority: float) -> None:
    # Two of the four corners are rare: a line fits the others, and is sure of its mistakes there.
    rng = np.random.default_rng(1)
    corners = np.stack([rng.random(3_000) < 0.5, rng.random(3_000) < minority], axis=1)
    labels = (corners[:, 0] != corners[:, 1]).astype(int)
    features = np.concatenate([2.0 * corners - 1, np.zeros((3_000, 14))], axis=1) + 0.3 * rng.normal(size=(3_000, 16))
    judgement = judge(features.astype(np.float32), labels, 2)
    assert not judgement.evident
    assert not judgement.left_out.any()


def test_evidence_needs_wrong_labels_to_differ_from_those_of_similar_rows() -> None:
    features, true, rng = table(0, 2, 2_000, spread=0.15)
    # A quarter of each class sits where a line sees the other one: hard rows, all alike.
    far = rng.random(2_000) < 0.15
    centres = np.stack([features[true == c].mean(axis=0) for c in range(2)])
    features[far] += 1.2 * (centres[1 - true[far]] - centres[true[far]])
    features[far, -1] += 0.3 * (1 - 2 * true[far])
    logits = 8 * np.stack([-np.square(features - centre).sum(axis=1) for centre in centres], axis=1)
    alone, near = judge_logits(logits, true), judge_logits(logits, true, features=features)
    assert alone.evident
    assert alone.left_out.mean() > 0.1
    assert not near.evident
    assert near.why_not
    assert not near.left_out.any()
    assert (near.rate, near.low, near.high) == (0, 0, 1)
    np.testing.assert_array_equal(near.p_wrong, alone.p_wrong)
    labels = np.where(rng.random(2_000) < 0.2, 1 - true, true)
    clean = table(0, 2, 2_000, spread=0.15)[0]
    assert judge_logits(logits, labels).evident
    assert judge(clean, labels, 2).evident


def test_a_label_of_the_same_row_judges_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each token of a row has the features of its row, and a tag at random: only the row gives the tag away.
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(200), 5)
    features = rng.normal(size=(200, 64)).astype(np.float32)[rows] + 0.01 * rng.normal(size=(1_000, 64)).astype(
        np.float32
    )
    tags = rng.integers(3, size=200)[rows]
    judgement = judge(features, tags, 3, groups=rows)
    assert (judgement.logits.argmax(axis=1) == tags).mean() < 0.45
    assert (judge(features, tags, 3).logits.argmax(axis=1) == tags).mean() > 0.55, "without groups it does"
    # Change all labels of one row: the logits of that row stay.
    other = np.where(rows == 17, (tags + 1) % 3, tags)
    monkeypatch.setattr(module, "fit_temperature", lambda *_: 1.0)
    before, after = (judge(features, y, 3, groups=rows).logits[rows == 17] for y in (tags, other))
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_excluded_classes_are_as_unlikely_as_the_least_likely_one() -> None:
    features, true, _ = table(0, 5, 800)
    excluded = np.zeros((800, 5), dtype=bool)
    excluded[np.arange(800), (true + 1) % 5] = True
    judgement = judge(features, true, 5, excluded=excluded)
    logits = judgement.logits
    np.testing.assert_allclose(logits[excluded], logits.min(axis=1), rtol=1e-5)


def test_classes_with_few_rows_are_not_judged_and_not_left_out() -> None:
    features, true, rng = table(0, 6, 1_200)
    labels = np.where(rng.random(1_200) < 0.5, rng.integers(6, size=1_200), true)
    labels[: FEWEST - 1] = 6
    judgement = judge(features, labels, 7)
    assert (~judgement.judged).nonzero()[0].tolist() == list(range(FEWEST - 1))
    assert judgement.rate > DOUBT
    assert not judgement.left_out[: FEWEST - 1].any()
    assert judgement.left_out.sum() > 200
    with pytest.raises(DataError, match=f"{FEWEST} rows"):
        judge_logits(np.zeros((8, 4)), np.arange(8) % 4)
    with pytest.raises(DataError, match="2 rows"):
        judge(features[:4], labels[:4], 7, groups=np.array([0, 0, 1, 1]))


def test_no_rare_class_is_left_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    # The fits sample rows: a class that they do not see would get no probability, and all its rows would look wrong.
    monkeypatch.setattr(module, "ROWS_TO_FIT", 2_500)
    monkeypatch.setattr(label_noise, "ROWS", 2_500)
    rng, rows = np.random.default_rng(0), 30_000
    rare = np.repeat(np.arange(10, 30), 8)
    true = rng.permutation(np.concatenate([rng.integers(10, size=rows - len(rare)), rare]))
    labels = np.where((true < 10) & (rng.random(rows) < 0.05), rng.integers(10, size=rows), true)
    logits = (rng.normal(size=(rows, 30)) + 9.0 * (np.arange(30) == true[:, None])).astype(np.float32)
    judgement, wrong = judge_logits(logits, labels), labels != true
    assert judgement.evident
    assert judgement.left_out[wrong].mean() > 0.9
    assert [judgement.left_out[labels == c].mean() < 0.2 for c in range(10, 30)] == [True] * 20


def test_where_many_labels_are_wrong_rows_whose_features_say_nothing_stay() -> None:
    # More than DOUBT of them are wrong, and so is each row of which nothing else is known.
    features, true, rng = table(0, 3, 4_000)
    silent = rng.random(4_000) < 0.3
    features[silent] = rng.normal(size=(int(silent.sum()), 48)) / 48**0.5
    labels = np.where(rng.random(4_000) < 0.4, (true + rng.integers(1, 3, size=4_000)) % 3, true)
    judgement, right = judge(features, labels, 3), labels == true
    assert judgement.evident
    for label in range(3):
        own = labels == label
        assert judgement.left_out[own].sum() <= round(judgement.p_wrong[own].sum())
        assert judgement.left_out[own & right].mean() < 0.2
    assert judgement.left_out[~silent & ~right].mean() > 0.85


@pytest.mark.parametrize(("classes", "share"), [(12, 0.01), (12, 0.1), (4, 0.03)])
@pytest.mark.parametrize("kind", ["uniform", "frequency", "one"])
def test_the_order_is_not_behind_that_of_the_loss_whatever_draws_the_wrong_labels(
    classes: int, share: float, kind: str
) -> None:
    # Classes of very different size, as intents are: wrong labels that are uniform are most of those of a rare class.
    rng = np.random.default_rng(0)
    true = rng.choice(classes, size=6_000, p=softmax(-np.arange(classes) * 6.0 / classes))
    logits = 2.0 * rng.normal(size=(6_000, classes)) + 8.0 * (np.arange(classes) == true[:, None])
    drawn = {"uniform": rng.integers(classes, size=6_000), "frequency": rng.permutation(true), "one": 1}[kind]
    labels = np.where(rng.random(6_000) < share, drawn, true)
    judgement, wrong = judge_logits(logits, labels), labels != true
    losses = -log_softmax(logits, axis=1)[np.arange(6_000), labels]
    order = audit_of_judgement(judgement, labels).ids
    place = np.empty(6_000)
    place[order] = np.arange(6_000)
    assert average_precision_score(wrong, -place) > average_precision_score(wrong, losses) - 0.01
