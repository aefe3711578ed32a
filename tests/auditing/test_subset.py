import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset as Table
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from tsqlora.auditing.draw.subset import QualitySubset, equals, hash_of, hash_of_some
from tsqlora.auditing.scores import Scores, from_terms
from tsqlora.errors import SettingsError

ROWS = st.integers(1, 60)
FRACTIONS = st.floats(0.02, 1)


def scored(n: int, seed: int = 0, stratified: bool = False) -> Scores:
    rng = np.random.default_rng(seed)
    return from_terms(
        {"loss": rng.normal(size=n)},
        labels=np.arange(n) % 2,
        stratified=stratified,
        weights={"loss": 1.0},
        temperature=1.0,
        record={},
    )


@given(ROWS, FRACTIONS, st.integers(0, 1000))
def test_warm_up_leaves_no_row_out_of_a_pass_and_takes_none_twice(n: int, fraction: float, seed: int) -> None:
    subset = QualitySubset(range(n), fraction, seed)
    epochs = -(-3 * n // len(subset))
    ordered = QualitySubset(range(n), fraction, seed, lengths=[1] * n, batch_size=n)
    drawn = [subset.draw(epoch) for epoch in range(epochs)]
    assert [len(rows) for rows in drawn] == [len(subset)] * epochs
    counts = np.zeros(n, dtype=int)
    for epoch, rows in enumerate(drawn):
        # After each epoch every row was seen as often as there were whole passes, or once more.
        counts += np.bincount(rows, minlength=n)
        passes = (epoch + 1) * len(subset) // n
        assert set(counts) <= {passes, passes + 1}
        np.testing.assert_array_equal(np.sort(rows), np.sort(ordered.draw(epoch)))


@given(ROWS, FRACTIONS, st.integers(0, 1000), st.integers(0, 5))
def test_every_epoch_has_as_many_rows(n: int, fraction: float, seed: int, epoch: int) -> None:
    subset = QualitySubset(range(n), fraction, seed)
    before = len(subset)
    subset.set_epoch(epoch)
    assert len(subset) == len(subset.indices) == before
    subset.use(scored(n), epoch)
    subset.set_epoch(epoch)
    assert len(subset) == len(subset.indices) == before
    assert len(set(subset.indices.tolist())) == before


def test_a_dropped_row_is_in_no_epoch_and_an_epoch_stays_as_long() -> None:
    subset = QualitySubset(range(40), 0.5, seed=1)
    subset.use(scored(40, stratified=True).drop(np.arange(40) < 12, "duplicate"), 0)
    for epoch in range(20):
        rows = subset.draw(epoch)
        assert len(rows) == len(subset)
        assert rows.min() >= 12


def evenly(n: int, dropped: int = 0, **options: Any) -> Scores:
    scores = from_terms(
        {"loss": np.arange(n, dtype=float)},
        labels=np.arange(n) % 2,
        stratified=True,
        weights={"loss": -1.0},
        temperature=1.0,
        even=True,
        record={},
    )
    return scores.drop(np.arange(n) < dropped, "confident negative") if dropped else scores


@given(st.integers(2, 60), FRACTIONS, st.integers(0, 1000), st.integers(0, 5))
def test_without_a_dropped_row_an_even_draw_is_the_controls(n: int, fraction: float, seed: int, epoch: int) -> None:
    subset, control = QualitySubset(range(n), fraction, seed), QualitySubset(range(n), fraction, seed)
    subset.use(evenly(n), 2)
    assert subset.draw(epoch).tolist() == control.draw(epoch).tolist()


@given(st.integers(4, 60), FRACTIONS, st.integers(0, 1000), st.data())
def test_an_even_draw_has_every_kept_row_as_often(n: int, fraction: float, seed: int, data: st.DataObject) -> None:
    dropped = data.draw(st.integers(1, n - 2))
    subset = QualitySubset(range(n), fraction, seed)
    subset.use(evenly(n, dropped), 0)
    drawn = np.concatenate([subset.draw(epoch) for epoch in range(6)])
    assert len(drawn) == 6 * len(subset)
    counts = np.bincount(drawn, minlength=n)
    assert counts[:dropped].sum() == 0
    assert np.ptp(counts[dropped:]) <= 1


def test_a_draw_is_a_function_of_scores_seed_and_epoch_alone() -> None:
    one, two = QualitySubset(range(40), 0.3, seed=1), QualitySubset(range(40), 0.3, seed=1)
    for epoch in range(6):
        one.set_epoch(epoch)
    for subset in (one, two):
        subset.use(scored(40), 2)
    for epoch in (5, 0, 3):
        np.testing.assert_array_equal(one.draw(epoch), two.draw(epoch))
    other = QualitySubset(range(40), 0.3, seed=2)
    other.use(scored(40), 2)
    assert other.draw(3).tolist() != one.draw(3).tolist()
    other = QualitySubset(range(40), 0.3, seed=1)
    other.use(scored(40, seed=1), 2)
    assert other.draw(3).tolist() != one.draw(3).tolist()


@pytest.mark.parametrize("scores", [None, scored(40), evenly(40, dropped=3)], ids=["none", "Q", "even"])
@pytest.mark.parametrize("resample", [True, False])
def test_each_epoch_is_a_new_draw_unless_the_draw_is_kept(resample: bool, scores: Scores | None) -> None:
    subset = QualitySubset(range(40), 0.3, resample=resample)
    if scores is not None:
        subset.use(scores, 1)
    draws = [np.sort(subset.draw(epoch)).tolist() for epoch in (1, 2, 5)]
    assert (draws[0] == draws[1] == draws[2]) == (not resample)
    assert subset.draw(1).tolist() != subset.draw(2).tolist()  # in another order


def test_a_kept_draw_waits_for_its_scores() -> None:
    subset = QualitySubset(range(40), 0.25, resample=False)
    subset.plan = subset.plan.unscored(awaits_scores=True)
    assert sorted(np.concatenate([subset.draw(epoch) for epoch in range(4)])) == list(range(40))


def test_mixed_in_trusted_rows_take_at_most_half_of_an_epoch_by_turns() -> None:
    subset = QualitySubset(range(100), 0.2, trusted=[{"input_ids": [j]} for j in range(25)])
    drawn = [subset.draw(epoch) for epoch in range(5)]
    assert [int((rows >= 100).sum()) for rows in drawn] == [10] * 5
    counts = np.bincount(np.concatenate(drawn), minlength=125)
    assert set(counts[100:]) == {2}
    assert counts[:100].sum() == 50


def test_an_epoch_repeats_rows_where_copies_of_trusted_rows_left_too_few() -> None:
    rows = [{"input_ids": [j]} for j in range(20)]
    subset = QualitySubset(rows, 1.0, trusted=rows[:4])
    subset.use(scored(20).drop(np.arange(20) < 4, "trusted row"), epoch=0)
    mixed = subset.draw(0)
    assert sorted(mixed) == list(range(4, 24))
    subset.plan = replace(subset.plan, asks=20)
    counts = np.bincount(subset.draw(0), minlength=24)
    assert counts[:4].sum() == counts[20:].sum() == 0
    assert set(counts[4:20]) == {1, 2}


def test_copies_in_another_integer_type_and_behind_a_random_transform_are_found() -> None:
    rows = [{"input_ids": [j, j + 1], "labels": j % 2} for j in range(40)]
    narrow = [{"input_ids": np.array(row["input_ids"], np.int32), "labels": 0} for row in rows[:20]]
    np.testing.assert_array_equal(np.flatnonzero(equals(rows, narrow)), np.arange(20))

    class Augmented(list[Any]):
        def __getitem__(self, j: Any) -> Any:
            return {"pixel_values": rows[j]["input_ids"][0] + np.random.random(3), "labels": 0}

    twins = QualitySubset(Augmented(range(40)), trusted=Augmented(range(20))).plan.excluded
    np.testing.assert_array_equal(np.flatnonzero(twins), np.arange(20))


def test_a_table_is_compared_without_its_transform() -> None:
    table = Table.from_dict({"text": [f"row {j}" for j in range(20)]})

    def noisy(rows: Any) -> Any:
        return {"input_ids": [np.random.default_rng().integers(9, size=3) for _ in rows["text"]]}

    whole = table.with_transform(noisy)
    twins = equals(whole, whole.select(range(4)))
    np.testing.assert_array_equal(np.flatnonzero(twins), np.arange(4))
    assert hash_of(whole) is None  # its own generator gives other rows at each reading


@given(st.integers(0, 60), st.integers(0, 3), st.booleans(), st.integers(0, 9))
def test_the_question_divides_an_epoch(place: int, first: int, contradicted: bool, seed: int) -> None:
    """Before it neither trusted nor held-out rows, behind it all that the answer says; epochs stay as long."""
    subset = QualitySubset([{"input_ids": [j]} for j in range(120)], 0.5, seed, trusted=[{"input_ids": [999]}] * 15)
    held = np.arange(120) % 10 == 0
    plan = replace(subset.plan, held_out=held, asks=first * 60 + place, contradicted=contradicted)
    subset.plan = plan
    drawn = np.concatenate([subset.draw(epoch) for epoch in range(6)])
    assert len(drawn) == 6 * 60
    at = first * 60 + place
    assert not held[drawn[:at]].any() if at else True
    assert (drawn[:at] < 120).all()
    if contradicted:
        counts = np.bincount(drawn[at:] - 120, minlength=15)
        assert counts.max() - counts.min() <= 1
    else:
        assert held[np.concatenate([drawn[at:][drawn[at:] < 120], [0]])].any()
    subset.plan = replace(plan, contradicted=not contradicted)
    np.testing.assert_array_equal(np.concatenate([subset.draw(epoch) for epoch in range(6)])[:at], drawn[:at])


def test_good_rows_come_more_often() -> None:
    subset, scores = QualitySubset(range(40), 0.3), scored(40)
    subset.use(scores, 0)
    often = np.bincount(np.concatenate([subset.draw(epoch) for epoch in range(200)]), minlength=40)
    assert np.corrcoef(often, scores.quality)[0, 1] > 0.7


def test_rows_of_like_length_stand_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=400).tolist()
    plain = QualitySubset(range(400), 0.5)
    sorted_ = QualitySubset(range(400), 0.5, lengths=lengths, batch_size=10)

    def padding(subset: QualitySubset) -> int:
        batches = np.array([lengths[row] for row in subset.draw(0)]).reshape(-1, 10)
        return int((batches.max(1, keepdims=True) - batches).sum())

    assert padding(sorted_) < 0.2 * padding(plain)
    assert sorted_.draw(0).tolist() != sorted_.draw(1).tolist()


def test_a_data_loader_reads_it_in_its_own_order() -> None:
    subset = QualitySubset([10 * j for j in range(20)], 0.5)
    read = [int(value) for batch in DataLoader(subset, batch_size=4) for value in batch]
    assert read == [10 * j for j in subset.indices.tolist()]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"dataset": []}, "no rows"),
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"lengths": [1] * 10}, "batch_size"),
        ({"batch_size": 4}, "lengths"),
        ({"lengths": [1] * 9, "batch_size": 4}, "9 lengths"),
    ],
)
def test_invalid_settings_are_refused(options: dict[str, Any], names: str) -> None:
    with pytest.raises(SettingsError, match=names):
        QualitySubset(**{"dataset": range(10)} | options)
    with pytest.raises(SettingsError, match="9 scores"):
        QualitySubset(range(10)).use(scored(9), 0)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        yield from range(3)


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (Stream(), "a Stream"),
        ({"train": [1, 2], "test": [3]}, r"a dict of train, test; .*data\['train'\]"),
    ],
)
def test_data_without_rows_by_number_is_refused_with_the_cure(data: Any, names: str) -> None:
    with pytest.raises(SettingsError, match=names):
        QualitySubset(data, 0.5)


def test_rows_that_differ_in_their_number_alone_are_twins() -> None:
    trusted = [{"text": "a", "label": 1, "idx": 9}]
    rows = [{"text": "a", "label": 0, "idx": 3}, {"text": "b", "label": 1, "idx": 9}]
    assert np.array_equal(equals(rows, trusted), [True, False])
    rows = [{"id": 1, "label": 0}, {"id": 2, "label": 0}]
    assert np.array_equal(equals(rows, [{"id": 2, "label": 1}]), [False, True])


def test_rows_with_the_same_tokens_and_other_pictures_or_places_are_no_twins() -> None:
    def row(pixels: float, left: int, source: str, seed: float) -> dict[str, Any]:
        image = np.full((2, 2), pixels, np.float32)
        mask = [1, 1]
        return {"input_ids": [5, 6], "attention_mask": mask, "pixel_values": image, "bbox": [[left, 0, 1, 1]] * 2} | {
            "source": source, "weight": seed, "labels": int(seed > 1)
        }  # fmt: skip

    rows = [row(0, 0, "web", 2), row(1, 0, "web", 1), row(0, 7, "web", 1)]
    assert np.array_equal(equals(rows, [row(0, 0, "book", 1)]), [True, False, False])


def test_a_row_of_an_encoder_and_a_decoder_is_a_twin_by_its_answer_where_a_prompt_has_several() -> None:
    def row(answer: int) -> dict[str, Any]:
        return {"input_ids": [5, 6, 7, 1], "labels": [answer, 1]}

    rows = [*map(row, range(20, 24)), {"input_ids": [9, 1], "labels": [20, 1]}]
    assert np.array_equal(equals(rows, [row(20), row(21)]), [True, True, False, False, False])
    assert np.array_equal(equals(rows, [row(20)]), [True] * 4 + [False])
    several = [{"input_ids": [5, 1, 1, 1], "labels": [int(k == j) for k in range(3)]} for j in range(3)]
    assert np.array_equal(equals(several, several[:2]), [True] * 3), "these are classes"


class Flipping:
    """Rows that change, or not, each time they are read."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, j: int) -> dict[str, Any]:
        return {"x": np.random.default_rng().integers(2, size=1), "labels": j}


def test_the_hash_of_some_rows_is_of_their_content_and_order_unless_they_are_random() -> None:
    rows = [{"text": str(j), "label": j % 2} for j in range(100)]
    assert hash_of_some(rows) == hash_of_some([dict(row) for row in rows]) is not None
    assert hash_of_some(rows[::-1]) not in (hash_of_some(rows), None)
    assert hash_of_some(rows[:1]) is not None
    files = [[{"file": f"{folder}/{j}.png", "content": f"{j}"} for j in range(3)] for folder in ("here", "there")]
    assert hash_of_some(files[0]) == hash_of_some(files[1]) is not None
    mixed: list[Any] = [*rows[:-1], object()]
    assert hash_of_some(mixed) == hash_of_some([*rows[:-1], object()])
    assert hash_of_some(Flipping()) is hash_of_some([object()]) is None


class Augmented(list[dict[str, Any]]):
    """Rows that a random transform changes at every read."""

    def __getitem__(self, index: Any) -> Any:
        noise = [float(torch.rand(1)), float(np.random.rand()), random.random()]
        return {**super().__getitem__(index), "pixel_values": noise}


def test_a_random_transform_leaves_the_hash_of_trusted_rows() -> None:
    rows = Augmented({"labels": j % 2} for j in range(4))
    hashes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = torch.random.get_rng_state(), random.getstate()
        hashes.append(hash_of(rows))
        assert torch.equal(torch.random.get_rng_state(), states[0])
        assert random.getstate() == states[1]
    assert hashes[0] == hashes[1] != hash_of(Augmented({"labels": 1} for _ in range(4)))
