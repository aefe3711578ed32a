"""A scoring that was cut off goes on where it was, gives the same bits, and takes no other's journal."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

import tsqlora as tsq
from models import collate, lora, samples, tiny_bert
from scoring import assert_unchanged, fingerprint, logits_of, score_by, teach
from tsqlora.errors import SettingsError
from tsqlora.quality import gradient_pass as gradient_module
from tsqlora.quality import passes as journal_module
from tsqlora.quality.passes import bind, empty
from tsqlora.quality.rule import PAPER_TERMS
from tsqlora.quality.trusted import Trusted

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
    monkeypatch.setattr(journal_module, "FLUSH_SECONDS", 0.0)


def score(learned: tuple[PeftModel, list[dict[str, Any]]], collate: Any, folder: Path | None, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "reference": [0, 3, 4, 6, 8, 9, 12],
        "batch_size": 2,
        "hashes": HASHES,
        "journal": folder,
    } | options
    return score_by(*learned, collate, **arguments)


def _measured_again(*_: Any, **__: Any) -> None:
    pytest.fail("measured again")


def same_bytes(one: tsq.Scores, other: tsq.Scores, folder: Path) -> bool:
    one.save(folder / "one.parquet")
    other.save(folder / "other.parquet")
    return (folder / "one.parquet").read_bytes() == (folder / "other.parquet").read_bytes()


# A trial, seven batches of the rows, the first of which finds the head; four of the reference, seven of the rows.
LAST = 1 + 7 + 4 + 7


@pytest.mark.parametrize("head_start", [True, False])
@pytest.mark.parametrize("stop_at", [2, 3, 8, 9, 12, 13, 14, LAST])
def test_a_scoring_that_was_cut_off_gives_the_same_file(
    learned: Any, stop_at: int, head_start: bool, tmp_path: Path
) -> None:
    undisturbed = score(learned, Collate(), None, head_start=head_start)
    before = fingerprint(learned[0])
    with pytest.raises(Stop):
        score(learned, Collate(stop_at), tmp_path / "j", head_start=head_start)
    assert_unchanged(before, learned[0])
    rest = Collate()
    resumed = score(learned, rest, tmp_path / "j", head_start=head_start)
    assert same_bytes(undisturbed, resumed, tmp_path)
    measured = min(7, stop_at - 2)
    finds_the_head_again = measured > 0
    assert rest.calls == LAST - measured + finds_the_head_again - max(0, stop_at - 13)


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
    options: dict[str, Any] = {"terms": PAPER_TERMS, "trusted": Trusted(trusted, learning_rate=1e-3)}
    every = Collate()
    undisturbed = score(learned, every, None, **options)
    before = fingerprint(learned[0])
    with pytest.raises(Stop):
        score(learned, Collate(every.calls - before_end), tmp_path / "j", **options)
    assert_unchanged(before, learned[0])
    rest = Collate()
    assert same_bytes(undisturbed, score(learned, rest, tmp_path / "j", **options), tmp_path)
    assert rest.calls < every.calls


def test_the_reference_is_that_of_the_journal(learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stop):
        score(learned, Collate(14), tmp_path / "j")
    for name in ("calibrate", "measure_reference", "require_exact"):
        monkeypatch.setattr(gradient_module, name, _measured_again)
    score(learned, Collate(), tmp_path / "j")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 3}, "forward .* settings"),
        ({"seed": 1}, "terms .* settings"),
        ({"terms": ["gradient_norm"]}, "terms .* settings"),
        ({"calibration": False}, "terms .* settings"),
        ({"reference": [0, 3, 4, 6, 8, 9, 13]}, "terms .* reference rows, settings"),
        ({"hashes": HASHES[::-1]}, "forward .* rows"),
        ({}, "forward .* weights"),
    ],
)
def test_the_journal_of_another_scoring_is_refused(
    learned: Any, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        score(learned, Collate(15), tmp_path / "j")
    if not changes:
        with torch.no_grad():
            next(learned[0].parameters()).flatten()[0] += 1e-6
    with pytest.raises(SettingsError, match=f"j/{named}; delete it, or name"):
        score(learned, Collate(), tmp_path / "j", **changes)


def test_a_temperature_may_change_since_nothing_measured_depends_on_it(learned: Any, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        score(learned, Collate(7), tmp_path / "j")
    resumed = score(learned, Collate(), tmp_path / "j", weights={"convergence": 1.0}, temperature=2.0)
    np.testing.assert_array_equal(
        resumed.quality, score(learned, Collate(), None, weights={"convergence": 1.0}).quality
    )


def test_a_lost_part_is_noticed(learned: Any, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        score(learned, Collate(8), tmp_path / "j")
    min((tmp_path / "j" / "forward").glob("batches-*")).unlink()
    with pytest.raises(SettingsError, match="does not follow batch 0; delete"):
        score(learned, Collate(), tmp_path / "j")


def test_what_is_half_written_does_not_count(tmp_path: Path) -> None:
    bind(tmp_path, {"a": [1]})
    (tmp_path / "manifest.tmp").write_text("{")
    bind(tmp_path, {"a": (1,)})
    with pytest.raises(SettingsError, match="with other a"):
        bind(tmp_path, {"a": [2]})


def test_features_that_the_disk_cannot_hold_are_refused_before_the_pass() -> None:
    with pytest.raises(SettingsError, match="TMPDIR"):
        empty((10**9, 10**6), np.dtype(np.float32))
