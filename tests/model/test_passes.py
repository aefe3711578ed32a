"""A scoring that was cut off goes on where it was, gives the same bits, and takes no other's parts."""

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from models import collate, lora, samples, tiny_bert
from scoring import assert_unchanged, fingerprint, logits_of, score_by, teach
from tsqlora import paper
from tsqlora.errors import SettingsError
from tsqlora.model import passes
from tsqlora.model.passes import empty
from tsqlora.paper.terms import PAPER_TERMS

N = 14
HASHES = [f"h{j}" for j in range(N)]


class Stop(Exception):
    """The process ends."""


class Collate:
    """`collate` that counts its calls, and ends the process at one of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.stop_at:
            raise Stop
        return collate(rows)


@pytest.fixture
def learned() -> tuple[PeftModel, list[dict[str, Any]]]:
    model, rows = lora(tiny_bert(dtype=torch.float32)), samples(N, 3)
    teach(model, rows)
    return model, rows


@pytest.fixture(autouse=True)
def _no_work_may_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "FLUSH_SECONDS", 0.0)


def score(learned: tuple[PeftModel, list[dict[str, Any]]], collate: Any, folder: Path | None, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "reference": [0, 3, 4, 6, 8, 9, 12],
        "batch_size": 2,
        "hashes": HASHES,
        "parts": folder,
    } | options
    return score_by(*learned, collate, **arguments)


def same_bytes(one: paper.Scores, other: paper.Scores, folder: Path) -> bool:
    one.save(folder / "one.parquet")
    other.save(folder / "other.parquet")
    return (folder / "one.parquet").read_bytes() == (folder / "other.parquet").read_bytes()


@pytest.mark.parametrize(
    ("before_end", "head_start"), [*zip([1, 2, 6, 7, 8, 12, 16, 18, 20, 24], cycle([True, True, False]), strict=False)]
)
def test_a_scoring_that_was_cut_off_gives_the_same_file(
    learned: Any, before_end: int, head_start: bool, tmp_path: Path
) -> None:
    every, rest = Collate(), Collate()
    undisturbed = score(learned, every, tmp_path / "whole", head_start=head_start)
    before = fingerprint(learned[0])
    with pytest.raises(Stop):
        score(learned, Collate(every.calls - before_end + 1), tmp_path / "j", head_start=head_start)
    assert_unchanged(before, learned[0])
    resumed = score(learned, rest, tmp_path / "j", head_start=head_start)
    assert same_bytes(undisturbed, resumed, tmp_path)
    # Of 14 batches of the rows; a trial, one to find the head, and what the reference settles come again.
    measured = min(7, every.calls - before_end - 1) + max(0, 7 - before_end)
    assert rest.calls == every.calls - measured + (every.calls - before_end > 1)


def test_it_may_be_cut_off_again_and_again(learned: Any, tmp_path: Path) -> None:
    for stop_at in (6, 6, 5, 10, 8, 7):
        with pytest.raises(Stop):
            score(learned, Collate(stop_at), tmp_path / "j")
    assert same_bytes(score(learned, Collate(), None), score(learned, Collate(), tmp_path / "j"), tmp_path)


@pytest.mark.parametrize("before_end", [1, 4, 8])
def test_a_scoring_with_trusted_rows_may_be_cut_off_in_each_pass(learned: Any, before_end: int, tmp_path: Path) -> None:
    trusted = samples(60, 3, seed=1)
    for row, label in zip(trusted, logits_of(learned[0], trusted).argmax(1).tolist(), strict=True):
        row["labels"] = label
    options: dict[str, Any] = {"terms": PAPER_TERMS, "trusted": trusted}
    every = Collate()
    undisturbed = score(learned, every, None, **options)
    before = fingerprint(learned[0])
    with pytest.raises(Stop):
        score(learned, Collate(every.calls - before_end), tmp_path / "j", **options)
    assert_unchanged(before, learned[0])
    rest = Collate()
    assert same_bytes(undisturbed, score(learned, rest, tmp_path / "j", **options), tmp_path)
    assert rest.calls < every.calls


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 3},
        {"seed": 1},
        {"terms": ["gradient_norm"]},
        {"calibration": False},
        {"reference": [0, 3, 4, 6, 8, 9, 13]},
        {"hashes": HASHES[::-1]},
        {},
    ],
)
def test_the_parts_of_another_scoring_are_not_taken(learned: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        score(learned, Collate(22), tmp_path / "j")
    if not changes:
        with torch.no_grad():
            next(p for p in learned[0].parameters() if p.requires_grad).mul_(1.5)
    expected = score(learned, Collate(), None, **changes)
    assert same_bytes(expected, score(learned, Collate(), tmp_path / "j", **changes), tmp_path)


def test_a_temperature_may_change_since_nothing_measured_depends_on_it(learned: Any, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        score(learned, Collate(7), tmp_path / "j")
    resumed = score(learned, Collate(), tmp_path / "j", weights={"convergence": 1.0}, temperature=2.0)
    np.testing.assert_array_equal(
        resumed.quality, score(learned, Collate(), None, weights={"convergence": 1.0}).quality
    )


def test_behind_a_lost_part_rows_are_measured_again(learned: Any, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        score(learned, Collate(8), tmp_path / "j")
    sorted((tmp_path / "j").glob("*/*.safetensors"))[1].unlink()
    assert same_bytes(score(learned, Collate(), None), score(learned, Collate(), tmp_path / "j"), tmp_path)


def test_features_that_the_disk_cannot_hold_are_refused_before_the_pass() -> None:
    with pytest.raises(SettingsError, match="TMPDIR"):
        empty((10**9, 10**6), np.dtype(np.float32))
