"""What is told while a run trains: every step, with speed, loss and moves; and run.json as it is at that step."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState, TrainingArguments

from runs import make_rows, save_checkpoint, write_config, write_jsonl
from tsqlora.progress import Pulse
from tsqlora.run import train as pipeline
from tsqlora.run.config import load_config
from tsqlora.training import record_callback
from tsqlora.training.live import SPAN, Pace
from tsqlora.training.record import RunRecord


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 999)), min_size=1, max_size=3 * SPAN))
def test_speed_is_what_the_last_steps_did_in_their_time(steps: list[tuple[int, int]]) -> None:
    times = iter(range(0, 10_000, 2))
    pace = Pace(lambda: float(next(times)))
    found = [pace.add("training", rows, tokens) for rows, tokens in steps][-1]
    last = steps[-(SPAN - 1) :] if len(steps) >= SPAN else steps[1:]
    if not last:
        assert found == (None, None)
        return
    assert found[0] == pytest.approx(sum(rows for rows, _ in last) / (2 * len(last)))
    tokens = sum(tokens for _, tokens in last)
    assert found[1] == (pytest.approx(tokens / (2 * len(last))) if tokens else None)


def test_a_pause_between_two_phases_is_no_part_of_a_speed() -> None:
    times = iter((0.0, 1.0, 1000.0, 1001.0))
    pace = Pace(lambda: next(times))
    assert [pace.add(phase, 8, 0)[0] for phase in ("look", "look", "training", "training")] == [None, 8, None, 8]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run with all that it told, and run.json as it was at every step."""
    place = tmp_path_factory.mktemp("live")
    data = write_jsonl(place / "train.jsonl", make_rows(80))
    config = write_config(
        place / "c.yaml",
        save_checkpoint(place / "model"),
        data,
        training={"logging_strategy": "steps", "logging_steps": 2, "epochs": 8, "learning_rate": 0.02, "batch_size": 8},
    )
    told: list[tuple[str, int, int, Pulse]] = []
    records: list[dict[str, Any]] = []
    run = place / "run"

    def progress(phase: str, done: int, total: int, pulse: Pulse | None = None, /) -> None:
        if pulse is not None:
            told.append((phase, done, total, pulse))
            records.append(json.loads((run / "run.json").read_text()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_callback, "EVERY", 0.0)
        patch.setattr(record_callback, "SHARE", float("inf"))
        record = pipeline.train(load_config(config, ["data.max_length=16"]), run, progress=progress)
    return {"told": told, "records": records, "record": record, "run": run}


def test_every_step_is_told_with_what_is_known_of_it(watched: dict[str, Any]) -> None:
    told, record = watched["told"], watched["record"]
    assert len(told) == record.plan["steps"]
    assert {phase for phase, *_ in told} == {"training"}
    assert told[-1][1] == told[-1][2]
    assert told[0][3].loss is None
    losses = [entry["loss"] for entry in record.history if "loss" in entry]
    assert told[-2][3].loss in losses
    rates = [pulse.learning_rate for *_, pulse in told]
    assert rates[0] > rates[-1] >= 0
    assert told[-1][3].moved == sum(event.moved for event in record.rank_events)
    for place, (phase, _, _, pulse) in enumerate(told):
        assert pulse.memory > 2**20
        new = place == 0 or told[place - 1][0] != phase
        assert (pulse.rows_a_second is None, pulse.tokens_a_second is None) == (new, new)


def test_the_record_says_how_far_the_run_is_while_it_trains(watched: dict[str, Any]) -> None:
    records, final = watched["records"], watched["record"]
    # RecordCallback comes before TellProgress: at a step its record is there.
    assert all(record["status"] == "running" for record in records)
    assert [record["now"].get("step") for record in records] == [*range(1, len(records) + 1)]
    assert [len(record["history"]) for record in records] == sorted(len(record["history"]) for record in records)
    late = records[-1]
    whole = final.to_dict()
    assert late["history"] == whole["history"][: len(late["history"])] != []
    assert late["rank_events"] == whole["rank_events"] != []
    assert late["quality"] == whole["quality"]
    assert late["ranks"] == whole["ranks"]
    assert set(late["cost"]) == {"look", "ranks", "training"}
    for phase, cost in late["cost"].items():
        assert 0 < cost["seconds"] <= whole["cost"][phase]["seconds"]
    assert records[0]["quality"]["used"] is True


def test_a_finished_record_says_nothing_of_now(watched: dict[str, Any]) -> None:
    assert watched["record"].now == {}
    assert RunRecord.load(watched["run"]).now == {}


def test_writing_the_record_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    written: list[float] = []

    made = RunRecord("running", 0, "t", None, {}, {"steps": 1000})
    keep = record_callback.RecordCallback(made, [], [None] * 8, tmp_path)
    state, args = TrainerState(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")

    def save(run: Path) -> None:
        written.append(clock[0])
        clock[0] += 2.0

    monkeypatch.setattr(record_callback.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(keep, "save", lambda: save(tmp_path))
    for state.global_step in range(1, 1001):
        keep.on_step_end(args, state, TrainerControl())
        clock[0] += 1.0
    assert len(written) * 2.0 / clock[0] < 0.03
