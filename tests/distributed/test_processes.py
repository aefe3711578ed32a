"""What two and three processes do together is what one does alone: DDP, FSDP2, sharded scoring."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slotted import QUERY, WIDE
from training.test_question import ROWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, done once: starting processes takes longer than what they do."""
    place = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("processes.py")
    run = subprocess.run(
        [sys.executable, str(script), str(place)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    return place


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[dict[str, Any]]:
    """Of the first of two processes, of the second, and of the one that was alone."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1, 2)]


def assert_close(left: Any, right: Any, *, error: float) -> None:
    for name, value in left.items():
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(right[name]), rtol=error, atol=error)


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[name])), name


def assert_same_events(left: list[dict[str, Any]], right: list[dict[str, Any]], *, error: float = 1e-5) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert_close(one["sensitivity"], other["sensitivity"], error=error)
        assert one | {"sensitivity": None} == other | {"sensitivity": None}


# --- sensitivities and changes ------------------------------------------------------------


def test_sensitivities_of_rows_in_two_processes_are_those_of_one(reports: list[dict[str, Any]]) -> None:
    first, second, alone = (of["measured"] for of in reports)
    assert first == second == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("place", [0, 1], ids=["of different size", "of one process"])
def test_batches_count_as_in_one_process_one_after_the_other(place: int, reports: list[dict[str, Any]]) -> None:
    (first, sketches), (second, _), (alone, expected) = (of["measured in training"][place] for of in reports)
    assert first == second == pytest.approx(alone, rel=1e-9)
    assert_close(sketches, expected, error=1e-9)


def test_processes_with_gradients_of_their_own_agree_on_ranks_and_weights(reports: list[dict[str, Any]]) -> None:
    (ranks, weights), (others, other_weights), _ = (of["changed"] for of in reports)
    assert ranks == others
    assert (ranks[QUERY], ranks[WIDE]) == (2, 6)
    assert_equal(weights, other_weights)


def test_processes_with_different_ranks_are_an_error_in_each(reports: list[dict[str, Any]]) -> None:
    assert all(re.match("TsqLoraError: the 2 processes .* ranks", of["other ranks"]) for of in reports[:2])


# --- DDP ----------------------------------------------------------------------------------


def test_two_processes_under_the_trainer_are_one(reports: list[dict[str, Any]]) -> None:
    first, second, alone = (of["trainer"] for of in reports)
    assert len(alone["events"]) > 3
    assert any(event["moved"] for event in alone["events"])
    assert first["events"] == second["events"]
    assert_same_events(first["events"], alone["events"])
    assert_equal(first["weights"], second["weights"])
    assert_close(first["weights"], alone["weights"], error=1e-5)
    assert first["drawn"] == second["drawn"] == alone["drawn"]


def test_two_processes_ask_the_pool_as_one_does_and_then_train_on_trusted_rows_alone(
    reports: list[dict[str, Any]],
) -> None:
    first, second, alone = (of["questioned"][0] for of in reports)
    together = {step: sorted(rows + second["steps"][step]) for step, rows in first["steps"].items()}
    assert together == {step: sorted(rows) for step, rows in alone["steps"].items()}
    question = first["question"]
    assert question["contradicted"]
    assert question == second["question"] == pytest.approx(alone["question"], rel=1e-5)
    assert first["notes"] == second["notes"]
    assert question["step"] < question["from_step"] == 15
    assert [min(together[step]) >= ROWS for step in range(20)] == [False] * 14 + [True] * 6
    assert max(row for step in range(14) for row in together[step]) < ROWS
    np.testing.assert_array_equal(first["kept"], alone["kept"])
    assert_equal(first["weights"], second["weights"])
    assert_close(first["weights"], alone["weights"], error=1e-5)


def test_two_processes_resumed_behind_the_question_keep_its_answer(reports: list[dict[str, Any]]) -> None:
    for whole, resumed in (of["questioned"] for of in reports):
        assert resumed["question"] == whole["question"]
        assert resumed["steps"] == {step: whole["steps"][step] for step in (18, 19)}
        assert_equal(resumed["weights"], whole["weights"])


def test_scores_between_two_epochs_are_those_of_one_process(reports: list[dict[str, Any]]) -> None:
    first, second, alone = (of["trainer"] for of in reports)
    np.testing.assert_array_equal(first["quality"], second["quality"])
    np.testing.assert_allclose(first["quality"], alone["quality"], rtol=1e-5, atol=1e-8)
    assert {"gradient_norm", "loss"} <= first["terms"].keys()
    for name, values in first["terms"].items():
        np.testing.assert_array_equal(values, second["terms"][name])
        np.testing.assert_allclose(values, alone["terms"][name], rtol=1e-5, atol=1e-8)


def test_importance_is_the_same_in_every_process(reports: list[dict[str, Any]]) -> None:
    first, second, alone = (of["trainer"]["importance"] for of in reports)
    assert_equal(first, second)
    assert_close(first, alone, error=1e-5)


# --- scoring ------------------------------------------------------------------------------


def test_arrays_travel_as_they_are(reports: list[dict[str, Any]]) -> None:
    first, second, alone = (of["exchanged"] for of in reports)
    own = alone["gathered"][0]  # of a process with the first one's number
    for result in (first, second):
        assert [value["name"] for value in result["gathered"]] == [0, 1]
        for value in (result["gathered"][0], result["shared"]):
            for name, array in own.items():
                np.testing.assert_array_equal(value[name], array, strict=name != "name")
    assert [value[0]["name"] for value in first["first"]] == [0, 1]
    for name, array in second["gathered"][1].items():
        np.testing.assert_array_equal(first["first"][1][0][name], array)
    assert second["first"] == []
    assert first["gathered"][1]["matrix"].shape == (80, 500)


@pytest.mark.parametrize("rule", ["default", "gradients", "cut off", "text"])
def test_the_score_file_is_the_same_for_one_two_and_three_processes(
    rule: str, folder: Path, reports: list[dict[str, Any]]
) -> None:
    three = [torch.load(folder / f"three-{rank}.pt", weights_only=False) for rank in (0, 1, 2)]
    files = [of["scored"][rule] for of in reports] + [of[rule] for of in three]
    assert len({content for content, _ in files}) == 1
    if rule == "default":  # rows that each process collated, each row once
        assert [rows for _, rows in files] == [12, 14, 26, 8, 10, 8]


def test_two_processes_that_look_at_answers_are_one(reports: list[dict[str, Any]]) -> None:
    first, second, alone = (of["answers"] for of in reports)
    assert alone["foreign_answer"][2]
    for name, (score, rate, rows) in alone.items():
        for other in (first, second):
            np.testing.assert_allclose(other[name][0], score, rtol=1e-6)
            assert other[name][1:] == (rate, rows)


def test_an_error_of_one_process_is_told_in_all(reports: list[dict[str, Any]]) -> None:
    first, second = (of["refused"] for of in reports[:2])
    for name in ("reference", "pass"):
        assert first[name] == "TsqLoraError: process 1: ValueError: a broken row"
        assert second[name] == "ValueError: a broken row"


# --- FSDP2 --------------------------------------------------------------------------------


def test_a_loop_over_weights_in_parts_is_that_of_one_process(reports: list[dict[str, Any]]) -> None:
    first, second, alone = (of["looped"] for of in reports)
    assert sum(event["moved"] for event in alone["events"]) > 3
    assert len({tuple(event["ranks"].values()) for event in alone["events"]}) > 1
    assert first["events"] == second["events"]
    assert_same_events(first["events"], alone["events"])
    assert_equal(first["importance"], second["importance"])
    assert_close(first["importance"], alone["importance"], error=1e-5)
    assert first["state"].keys() == alone["state"].keys()
    assert_close(first["state"], alone["state"], error=1e-5)


def test_what_is_saved_of_weights_in_parts_loads_as_a_plain_adapter(reports: list[dict[str, Any]]) -> None:
    in_parts, plain = reports[0]["looped"]["logits"]
    torch.testing.assert_close(plain, in_parts, rtol=0, atol=1e-12)
    torch.testing.assert_close(in_parts, reports[2]["looped"]["logits"], rtol=1e-5, atol=1e-5)


def test_what_weights_in_parts_cannot_do_is_refused_by_name(reports: list[dict[str, Any]]) -> None:
    for of in reports[:2]:
        assert re.match("UnsupportedError: .*FSDP.*finalize_model=False", of["looped"]["finalize"])
        assert re.match("UnsupportedError: .*FSDP", of["looped"]["score"])


def test_slots_in_parts_move_bit_for_bit_with_their_moments(reports: list[dict[str, Any]]) -> None:
    first, second, alone = (of["moved"] for of in reports)
    for one, other, expected in zip(*(of["after"] for of in (first, second, alone)), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-12)
    # Weight, gradient, first and second moment, of A and of B.
    for place, (before, after) in enumerate(zip(first["before"], first["after"], strict=True)):
        assert torch.equal(after[:2], before[[0, 2]])
        assert not after[3:].any()
        assert torch.equal(after[2], begun(place, before, after))
    assert_equal(first["importance"], second["importance"])
    assert_close(first["importance"], alone["importance"], error=1e-5)


def begun(place: int, before: Tensor, after: Tensor) -> Tensor:
    """What a new slot begins as: A's row as it was given, second moments at the mean, all else at zero."""
    if place == 0:
        return torch.arange(16.0).double()
    return before[[0, 2]].mean(0) if place in (3, 7) else torch.zeros_like(after[2])


def test_a_layer_in_parts_grows_from_nothing_as_in_one_process(reports: list[dict[str, Any]]) -> None:
    first, _, alone = (of["moved"]["regrown"] for of in reports)
    for one, expected in zip(first, alone, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-12)
    assert bool((first[3][:2] > 0).all())
