"""run.json is written whole, and read back as it was."""

import json
from pathlib import Path

import pytest

from tsqlora.errors import DataError
from tsqlora.files import write_json
from tsqlora.record import RankEvent, RunRecord
from tsqlora.run_dir import RECORD_FILE


def record() -> RunRecord:
    made = RunRecord(status="finished", seed=3, task="t", labels=["a", "b"], data={"hash": "h"}, plan={"steps": 4})
    made.phase("training").add(seconds=1.5, forward=8, backward=8, tokens=90)
    made.rank_events = [RankEvent(2, "start", {"q": 1}, {"q": 1}, {"q": 1.0}, 0, 10, 12)]
    made.metrics = {"test": {"accuracy": 0.5}}
    made.history = [{"step": 2, "epoch": 0.5, "loss": 1.5}]
    return made


def test_a_record_reads_back_equal(tmp_path: Path) -> None:
    made = record()
    made.save(tmp_path)
    assert RunRecord.load(tmp_path) == made
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_FILE]
    old = json.loads((tmp_path / RECORD_FILE).read_text())
    del old["history"]  # which older records have not
    write_json(tmp_path / RECORD_FILE, old)
    assert RunRecord.load(tmp_path).history == []


def test_the_seconds_of_a_block_are_kept_also_after_an_error() -> None:
    made = record()
    with pytest.raises(ZeroDivisionError), made.timed("scoring"):
        raise ZeroDivisionError
    assert made.cost["scoring"].seconds > 0


def test_a_file_or_a_directory_without_a_record_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "tsq.yaml").write_text("")
    for path in (tmp_path / "tsq.yaml", tmp_path):
        with pytest.raises(DataError, match=f"{path} is not a run: it has no run.json"):
            RunRecord.load(path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"status": "finished"}', '{"cost": {}, "rank_events": []}', '{"cost": {}, "rank_events": [{}]}'],
)
def test_a_broken_record_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / RECORD_FILE).write_text(content)
    with pytest.raises(DataError, match=r"run\.json: not a run's record"):
        RunRecord.load(tmp_path)


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
