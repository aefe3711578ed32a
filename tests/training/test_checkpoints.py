"""A checkpoint counts once all of it is on the disk, and no longer once any of it has changed."""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer
from transformers.trainer_utils import HPSearchBackend

import tsqlora as tsq
from scoring import quality_by
from stock import At, fails_at, make_trainer, moods, slotted_bert
from tsqlora import distributed, paper
from tsqlora.training.checkpoints import MANIFEST_FILE, fault, newest_complete, write_manifest

DATA = moods()
OURS = {"tsqlora.json", "tsqlora.safetensors", "tsqlora_quality.json"}
ORDERS = pytest.mark.parametrize("order", [(2, 1, 0), (0, 2, 1)])


def trainer(folder: Path, order: tuple[int, ...] = (0, 1), fail: int = 0, **further: Any) -> Trainer:
    """Five epochs of four steps, looks before the first and the third; `order` is of quality, ranks and the crash."""
    subset = tsq.QualitySubset(DATA, 0.5, seed=0)
    quality = quality_by(subset, reference=40, weights={"loss": -1.0})
    callbacks = (
        quality,
        paper.RankCallback(interval=3, samples=16, schedule=paper.RankSchedule(moves=3, freeze=0.2)),
        # The Trainer's files are there, and ours unless one of our callbacks comes before this one.
        fails_at("save", fail, KeyboardInterrupt),
    )
    options = {"save_strategy": "epoch", "num_train_epochs": 5} | further
    return make_trainer(slotted_bert(), subset, folder, [callbacks[j] for j in order], **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a whole run."""
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder, (1, 0)).train()
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """Two of them, to be damaged."""
    for step in (8, 12):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    for scores in whole.glob("scores*.parquet"):
        shutil.copy(scores, tmp_path)
    return tmp_path


def files(checkpoint: Path) -> Iterator[Path]:
    return (path for path in sorted(checkpoint.rglob("*")) if path.is_file())


def test_a_manifest_has_every_file_and_nothing_unfinished_is_left(whole: Path) -> None:
    checkpoints = sorted(whole.glob("checkpoint-*"))
    assert len(checkpoints) == 5
    for checkpoint in checkpoints:
        named = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
        assert {*named, MANIFEST_FILE} == {path.relative_to(checkpoint).as_posix() for path in files(checkpoint)}
        assert {*OURS, "optimizer.pt", "rng_state.pth", "adapter_model.safetensors"} <= named.keys()


def test_the_newest_is_taken_by_its_number_and_in_silence(whole: Path, tmp_path: Path) -> None:
    assert tsq.last_checkpoint(whole) == whole / "checkpoint-20"
    assert tsq.last_checkpoint(str(tmp_path)) is None
    for name in ("checkpoint-9", "checkpoint-10"):
        shutil.copytree(whole / "checkpoint-8", tmp_path / name)
    for name in ("checkpoint-best", "old-checkpoint-99"):
        (tmp_path / name).mkdir()
    assert tsq.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_folder_that_is_not_there_is_told_by_the_first_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others may look before the first has made it."""
    with pytest.raises(tsq.SettingsError, match=r"typo is not there; give"):
        tsq.last_checkpoint(tmp_path / "typo")
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    assert tsq.last_checkpoint(tmp_path / "typo") is None


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut_off, r"has \d+ bytes, and was written with \d+"),
        (one_bit, "has other content than was written"),
        (Path.unlink, "is missing"),
    ],
)
def test_with_any_file_damaged_the_one_before_is_taken_and_told_why(
    damage: Callable[[Path], Any], why: str, run: Path
) -> None:
    names = [path.name for path in files(run / "checkpoint-12") if path.name != MANIFEST_FILE]
    for name in names:
        path = run / "checkpoint-12" / name
        content = path.read_bytes()
        damage(path)
        with pytest.warns(UserWarning, match=f"checkpoint-12 is passed over: {name} {why}"):
            assert tsq.last_checkpoint(run) == run / "checkpoint-8"
        path.write_bytes(content)
    assert tsq.last_checkpoint(run) == run / "checkpoint-12", "all are as they were"


@pytest.mark.parametrize("text", ["", "[]", '{"version": 3, "files": {"a": "x"}}', None])
def test_a_manifest_that_is_none_or_of_another_version_is_told(text: str | None, run: Path) -> None:
    path = run / "checkpoint-12" / MANIFEST_FILE
    path.write_text(path.read_text().replace('"version": 3', '"version": 4') if text is None else text)
    why = "was written by another version of tsqlora" if text is None else "cannot be read"
    assert fault(run / "checkpoint-12") == f"{MANIFEST_FILE} {why}"


def test_when_all_are_damaged_that_is_an_error(run: Path) -> None:
    cut_off(run / "checkpoint-8" / "optimizer.pt")
    (run / "checkpoint-12" / MANIFEST_FILE).unlink()
    with pytest.raises(tsq.TsqLoraError, match=rf"checkpoint-12 is passed over: .* {MANIFEST_FILE}.*checkpoint-8 is"):
        tsq.last_checkpoint(run)


def test_when_none_was_ever_finished_training_begins_anew(run: Path) -> None:
    for step in (8, 12):
        (run / f"checkpoint-{step}" / MANIFEST_FILE).unlink()
    result, passed_over = newest_complete(run)
    assert result is None
    assert [why.partition(" is passed over")[0] for why in passed_over] == [
        str(run / f"checkpoint-{n}") for n in (12, 8)
    ]


@ORDERS
def test_a_crash_before_the_callbacks_leaves_no_manifest(order: tuple[int, ...], tmp_path: Path) -> None:
    made = trainer(tmp_path, order, fail=12)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    # The first one writes the parts of both.
    assert (fault(tmp_path / "checkpoint-12") is None) == (order[2] == 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tsq.last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{12 if order[2] == 2 else 8}"


def test_a_checkpoint_that_a_step_and_its_epoch_both_save_is_complete(tmp_path: Path) -> None:
    made = trainer(tmp_path, (0, 1), num_train_epochs=1)
    made.add_callback(At("step_end", lambda state, control, _: setattr(control, "should_save", state.global_step == 4)))
    made.train()
    assert fault(tmp_path / "checkpoint-4") is None


def test_a_run_goes_on_without_the_ranks_and_its_checkpoints_are_complete(run: Path) -> None:
    trainer(run, (0,)).train(resume_from_checkpoint=str(run / "checkpoint-12"))
    assert tsq.last_checkpoint(run) == run / "checkpoint-20"
    named = json.loads((run / "checkpoint-20" / MANIFEST_FILE).read_text())["files"].keys()
    assert (named & OURS) == {"tsqlora_quality.json"}


def test_all_is_on_the_disk_before_the_manifest_has_its_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, done = run / "checkpoint-12", list[str]()
    sync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def renamed(old: Path, new: Path) -> None:
        done.append(f"renamed {new.name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_manifest(checkpoint)
    *before, temporary, last, folder = done
    assert sorted(before) == sorted(path.name for path in files(checkpoint) if path.name != MANIFEST_FILE)
    assert temporary.startswith(f".{MANIFEST_FILE}")
    assert (last, folder) == (f"renamed {MANIFEST_FILE}", checkpoint.name)


# ------------------------------------------------------------------- what users of Trainer see


def test_resuming_by_name_refuses_a_damaged_checkpoint_and_names_another(run: Path) -> None:
    cut_off(run / "checkpoint-12" / "tsqlora.json")
    with pytest.raises(tsq.TsqLoraError, match=r"checkpoint-12 is not complete: tsqlora\.json .*checkpoint-8$"):
        trainer(run).train(resume_from_checkpoint=True)
    shutil.rmtree(run / "checkpoint-8")
    with pytest.raises(tsq.TsqLoraError, match=r"start again$"):
        trainer(run).train(resume_from_checkpoint=True)


def test_a_checkpoint_from_elsewhere_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(tsq.TsqLoraError, match="elsewhere/checkpoint-12 is not there; resume with the output_dir"):
        trainer(tmp_path / "elsewhere", (0, 1)).train(resume_from_checkpoint=str(run / "checkpoint-12"))


def test_a_checkpoint_of_another_run_in_the_same_place_is_not_taken_for_the_loaded_one(
    run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Not even of a run that went on from the same checkpoint."""
    branch = tmp_path_factory.mktemp("branch")
    shutil.copytree(run / "checkpoint-8", branch / "checkpoint-8")
    for scores in run.glob("scores*.parquet"):
        shutil.copy(scores, branch)
    made = trainer(branch, (0, 1, 2), fail=12, learning_rate=0.01)
    with pytest.raises(KeyboardInterrupt):
        made.train(resume_from_checkpoint=str(branch / "checkpoint-8"))
    for loaded, place in ((run, branch), (branch, run)):
        with pytest.raises(tsq.TsqLoraError, match=f"{place}/checkpoint-12 is of another run than the checkpoint"):
            trainer(place).train(resume_from_checkpoint=str(loaded / "checkpoint-12"))


def test_a_run_that_was_moved_or_copied_goes_on(whole: Path, run: Path, tmp_path: Path) -> None:
    moved = run.rename(tmp_path.with_name("moved"))
    trainer(moved).train(resume_from_checkpoint=str(whole / "checkpoint-12"))
    trainer(moved).train(resume_from_checkpoint=True)
    assert tsq.last_checkpoint(moved) == moved / "checkpoint-20"
    adapters = [(folder / "checkpoint-20" / "adapter_model.safetensors").read_bytes() for folder in (whole, moved)]
    assert adapters[0] == adapters[1]


def test_with_two_at_a_time_one_is_whole_at_every_moment(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, (2, 0, 1), fail=16, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-16"]
    assert fault(tmp_path / "checkpoint-12") is None


def test_a_clock_that_goes_back_costs_no_new_checkpoint(tmp_path: Path) -> None:
    """The Trainer keeps those with the latest dates."""

    def goes_back(*_: Any) -> None:
        """By a year, before each checkpoint: what was not dated on purpose has a date in the future."""
        for path in tmp_path.glob("checkpoint-*"):
            if path.stat().st_mtime > 1e6:
                os.utime(path, (time.time() + 3e7,) * 2)

    made = trainer(tmp_path, save_total_limit=2)
    made.add_callback(At("epoch_end", goes_back))
    made.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-20"]
    assert tsq.last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"


def test_what_a_wrong_clock_left_unfinished_outlives_no_new_checkpoint(run: Path) -> None:
    shutil.copytree(run / "checkpoint-12", run / "checkpoint-13")
    (run / "checkpoint-13" / MANIFEST_FILE).unlink()
    os.utime(run / "checkpoint-13", (time.time() + 3e7,) * 2)
    trainer(run, save_total_limit=2).train(resume_from_checkpoint=str(run / "checkpoint-12"))
    assert tsq.last_checkpoint(run) == run / "checkpoint-20"


def test_checkpoints_of_an_earlier_run_in_the_folder_go_first_and_are_never_the_newest(tmp_path: Path) -> None:
    trainer(tmp_path, save_total_limit=2).train()
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="checkpoint-16, checkpoint-20"):
        trainer(tmp_path, (0, 1, 2), fail=4, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-20.earlier", "checkpoint-4"]
    assert tsq.last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    with pytest.warns(UserWarning, match="checkpoint-4"):
        trainer(tmp_path, save_total_limit=3, max_steps=16).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (12, 16, 8)]
    assert tsq.last_checkpoint(tmp_path) == tmp_path / "checkpoint-16"


def test_a_trial_of_a_search_has_complete_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # takes optuna's trials only
    searched = trainer(tmp_path, save_total_limit=3, max_steps=8)
    searched.hp_search_backend, searched.hp_space = HPSearchBackend.OPTUNA, lambda trial: {}
    searched.train(trial=SimpleNamespace(number=3, params={}))
    assert tsq.last_checkpoint(tmp_path / "run-3") == tmp_path / "run-3" / "checkpoint-8"


def test_weights_alone_are_nothing_to_resume_from(tmp_path: Path) -> None:
    trainer(tmp_path, save_only_model=True, save_total_limit=1, num_train_epochs=1).train()
    with pytest.warns(UserWarning, match="it was not finished, or not written for resuming"):
        assert tsq.last_checkpoint(tmp_path) is None


@pytest.mark.parametrize(("gone", "why"), [(True, "is missing; put it"), (False, "holds other scores.*put it back")])
def test_scores_that_are_gone_or_not_the_runs_own_are_refused(gone: bool, why: str, run: Path) -> None:
    scores = paper.Scores.load(run / "scores.parquet")
    replace(scores, record=replace(scores.record, epoch=7)).save(run / "scores.parquet")
    for path in run.glob("scores*.parquet") if gone else ():
        path.unlink()
    with pytest.raises(tsq.DataError, match=rf"scores\.parquet {why}"):
        trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-12"))


def test_a_best_checkpoint_that_cannot_be_brought_back_is_told(run: Path) -> None:
    state = run / "checkpoint-12" / "trainer_state.json"
    best = {"best_model_checkpoint": str(run / "checkpoint-8"), "best_global_step": 8}
    state.write_text(json.dumps(json.loads(state.read_text()) | best))
    write_manifest(run / "checkpoint-12")
    cut_off(run / "checkpoint-8" / "adapter_model.safetensors")
    options = {"load_best_model_at_end": True, "eval_strategy": "epoch", "evaluate_on": DATA[:16]}
    with pytest.raises(tsq.TsqLoraError, match="checkpoint-8 is not complete"):
        trainer(run, **options).train(resume_from_checkpoint=str(run / "checkpoint-12"))
