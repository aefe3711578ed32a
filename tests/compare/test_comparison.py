"""A comparison trains each cell once, chooses learning rates by validation, and refuses what makes no sense."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from runs import write_config
from tsqlora.compare import comparison
from tsqlora.compare.methods import Entry
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.run.config import Config, dump_config, load_config
from tsqlora.training.record import RunRecord


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "train.jsonl"))


class Fake:
    """Trains nothing: entry, seed and learning rate decide a run, which `change` edits; runs are counted."""

    def __init__(
        self,
        gain: Mapping[str, float] | None = None,
        fails: Callable[[RunRecord], bool] = lambda run: False,
        dies_at: int = -1,
        change: Callable[[RunRecord], None] = lambda run: None,
    ) -> None:
        self.gain, self.fails, self.dies_at, self.change = gain or {}, fails, dies_at, change
        self.names, self.ran = list[str](), list[RunRecord]()

    def __call__(self, config: Config, entry: Entry, folder: Path) -> RunRecord:
        if len(self.ran) == self.dies_at:
            raise KeyboardInterrupt
        seed, rate = config.training.seed, config.training.learning_rate
        run = RunRecord("finished", seed, "sequence-classification", None, {"hash": f"rows of {seed}"}, {"steps": 10})
        run.compared = {"method": entry.method, "policy": entry.policy, "learning_rate": rate, "equal": "steps"}
        run.compared |= {"commit": "c", "bf16": True, "peak_memory_bytes": 2**20, "random": None}
        run.phase("training").add(seconds=7.0)
        if self.fails(run):
            run.status, run.compared["failed"] = "failed", "diverged"
        else:
            # Test and validation disagree about learning rates: test must decide nothing.
            right = 0.5 + self.gain.get(entry.name, 0.0) + 0.01 * seed
            validation = {"accuracy": right - abs(rate - 0.01), "loss": 1.0}
            run.metrics = {"validation": validation, "test": {"accuracy": right + rate, "loss": 1.0}}
            run.parameters = {"trainable": 3}
            self.change(run)
        self.names.append(folder.name)
        self.ran.append(run)
        folder.mkdir(parents=True)
        run.save(folder)
        return run


Compare = Callable[..., Any]


@pytest.fixture
def compare(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """`compare` without processes: `run` is called for each cell, and `rows` are the hashes that preflight finds."""

    def run_all(
        methods: list[str] = ["lora"],  # noqa: B006
        *,
        run: Any = None,
        rows: Mapping[int, str] | None = None,
        **options: Any,
    ) -> Any:
        def in_own_process(name: str, work: Any, progress: Any = None, *, device: str | None = None) -> Any:
            if name == "preflight":
                return {seed: rows[seed] for seed in work.keywords["finished"]} if rows else {}
            return (run or Fake())(*work.args, **({} if device is None else {"device": device}))

        monkeypatch.setattr(comparison, "in_own_process", in_own_process)
        settings = options.pop("settings", config)
        return comparison.compare(settings, methods, **({"seeds": [0], "out": tmp_path / "out"} | options))

    return run_all


def test_a_finished_cell_never_runs_again_also_after_an_interruption_and_more_may_be_added(
    compare: Compare, tmp_path: Path
) -> None:
    second = Fake()
    with pytest.raises(KeyboardInterrupt):
        compare(seeds=[0, 1, 2], run=Fake(dies_at=2))
    result = compare(["lora", "lora+random"], seeds=[0, 1, 2], run=second)
    assert sorted(second.names) == sorted(["lora+all.2", *(f"lora+random.{seed}" for seed in range(3))])
    assert [row["seeds"] for row in result["table"]] == [[0, 1, 2], [0, 1, 2]]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == result


class Together(Fake):
    """Trains nothing, and waits until a cell runs on each of two devices."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.meet = Barrier(2, timeout=2 if "dies_at" in options else 60)  # the other cell may be dead
        self.devices = list[str]()

    def __call__(self, config: Config, entry: Entry, folder: Path, *, device: str) -> RunRecord:  # type: ignore[override]
        self.devices.append(device)
        self.meet.wait()
        return super().__call__(config, entry, folder)


@pytest.mark.parametrize(("visible", "devices"), [(None, ["0", "1"]), ("3,5", ["3", "5"])])
def test_each_of_several_gpus_trains_a_cell_at_a_time(
    visible: str | None, devices: list[str], compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    run = Together()
    ours = compare(["lora", "tsqlora"], seeds=[0, 1], sweep=[0.001, 0.01], run=run)
    assert sorted(run.devices) == sorted(devices * 3)
    assert len(ours["runs"]) == 4
    assert [row["learning_rates"] for row in ours["table"]] == [[0.01], [0.01]]


def test_a_cell_that_is_interrupted_on_one_gpu_ends_the_comparison(
    compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    run = Together(dies_at=2)
    with pytest.raises(KeyboardInterrupt):
        compare(["lora"], seeds=[*range(8)], run=run)
    assert len(run.ran) < 6


def test_differences_are_paired_by_seed(compare: Compare) -> None:
    run = Fake({"tsqlora+quality": 0.05})
    ours, reference, same = compare(["tsqlora", "lora", "lora+random"], seeds=[0, 1, 2], run=run)["table"]
    assert ours["difference"]["mean"] == pytest.approx(0.05)
    assert ours["verdict"] == "better than lora+all"
    assert "difference" not in reference
    assert same["difference"]["mean"] == pytest.approx(0.0)
    assert same["verdict"] == "within noise of lora+all"


def test_validation_rows_of_the_first_seed_choose_the_learning_rate(compare: Compare) -> None:
    run = Fake()
    result = compare(seeds=[5, 6], sweep=[0.001, 0.01, 0.02], run=run)
    assert run.names == ["lora+all.5.lr0.001", "lora+all.5.lr0.01", "lora+all.5", "lora+all.6.lr0.01"]
    assert result["table"][0]["learning_rates"] == [0.01]


def test_the_lowest_loss_chooses_the_learning_rate_and_is_better(compare: Compare) -> None:
    def losses(run: RunRecord) -> None:
        run.metrics = {split: m | {"loss": 1 - m["accuracy"]} for split, m in run.metrics.items()}

    run = Fake({"tsqlora+quality": 0.05}, change=losses)
    result = compare(["lora", "tsqlora"], seeds=[0, 1, 2], sweep=[0.001, 0.01, 0.02], metric="loss", run=run)
    assert [row["learning_rates"] for row in result["table"]] == [[0.01], [0.01]]
    assert result["table"][1]["difference"]["mean"] == pytest.approx(-0.05)
    assert result["table"][1]["verdict"] == "better than lora+all"


def test_a_cell_that_fails_is_a_result_and_is_never_chosen(compare: Compare, tmp_path: Path) -> None:
    run = Fake(fails=lambda run: run.compared["learning_rate"] > 0.005)
    assert compare(seeds=[0, 1], sweep=[0.001, 0.01], run=run)["table"][0]["learning_rates"] == [0.001]
    lines: list[str] = []
    fails = Fake(fails=lambda run: run.compared["method"] == "full")
    failed, worked = compare(
        ["full", "lora"], seeds=[0, 1], sweep=[0.02, 0.01], run=fails, out=tmp_path / "b", say=lines.append
    )["table"]
    assert (failed["verdict"], failed["failed"], failed["learning_rates"]) == ("every seed failed", [0, 1], [0.01])
    assert (worked["failed"], worked["seeds"]) == ([], [0, 1])
    assert lines[0].startswith("1/6 full+all.0: failed: diverged")


def test_a_learning_rate_may_be_set_for_a_method_or_an_entry(compare: Compare) -> None:
    run = Fake()
    compare(["lora", "lora+random", "tsqlora"], rates={"lora": 0.1, "lora+random": 0.2}, run=run)
    assert [made.compared["learning_rate"] for made in run.ran] == [0.1, 0.2, 0.02]


@pytest.mark.parametrize(
    ("sweep", "side"),
    [([0.001, 0.01, 0.02], None), ([0.01, 0.02], "lowest"), ([0.005, 0.001], "highest"), ([0.01], None)],
)
def test_a_best_rate_at_the_end_of_a_sweep_is_reported(compare: Compare, sweep: list[float], side: str | None) -> None:
    lines: list[str] = []
    compare(sweep=sweep, say=lines.append)
    warned = [line for line in lines if "--lr-sweep" in line]
    assert len(warned) == (side is not None)
    assert side is None or f" is the {side} rate" in warned[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["loar"]}, "did you mean 'lora'?"),
        ({"methods": ["lora+randm"]}, "did you mean 'random'?"),
        ({"methods": ["lora", "lora+all"]}, "lora+all twice"),
        ({"methods": []}, "--methods"),
        ({"seeds": []}, "--seeds"),
        ({"seeds": [-1]}, "--seeds -1"),
        ({"equal": "seconds"}, "--equal 'seconds'"),
        ({"sweep": [0.1], "rates": {"lora": 0.1}}, "--lr-sweep"),
        ({"sweep": [0.0]}, "learning rate 0.0"),
        ({"rates": {"dora": 0.1}}, "--lr: 'dora'"),
        ({"metric": "acuracy"}, "did you mean 'accuracy'?"),
        ({"metric": "rougeL"}, "'rougeL'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str, compare: Compare) -> None:
    with pytest.raises(SettingsError) as caught:
        compare(arguments.pop("methods", ["lora"]), **arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("section", "changes", "methods", "error", "key"),
    [
        ("quality", {"enabled": False}, "tsqlora", SettingsError, "quality.enabled"),
        ("quality", {"enabled": False}, "dora+quality", SettingsError, r"remove dora\+quality"),
        ("training", {"load_best_model_at_end": True}, "lora", SettingsError, "training.load_best_model_at_end"),
        ("adapter", {"init_from": "run"}, "lora", UnsupportedError, "adapter.init_from"),
    ],
)
def test_settings_that_compare_cannot_follow_are_refused(
    section: str,
    changes: dict[str, Any],
    methods: str,
    error: type[Exception],
    key: str,
    config: Config,
    compare: Compare,
    tmp_path: Path,
) -> None:
    changed = config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})
    with pytest.raises(error, match=key):
        compare(["lora+random", methods], settings=changed)
    assert not (tmp_path / "out").exists()


def test_a_launcher_is_refused(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="launcher"):
        compare()


def test_a_directory_holds_one_comparison(config: Config, compare: Compare, tmp_path: Path) -> None:
    compare()
    with pytest.raises(SettingsError, match="--out"):
        compare(equal="epochs")
    other = config.model_copy(update={"training": config.training.model_copy(update={"epochs": 7})})
    with pytest.raises(SettingsError, match="--out"):
        compare(settings=other)
    for text in ("{", "[]", "{}"):
        (tmp_path / "out" / "comparison.json").write_text(text)
        with pytest.raises(DataError, match=r"comparison\.json"):
            compare()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    with pytest.raises(SettingsError, match="--out"):
        compare(out=tmp_path / "run")


def test_a_directory_that_cannot_serve_is_refused_before_the_rehearsal(
    config: Config, compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("rehearsed")

    compare()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(comparison, "in_own_process", never)
    for out in (tmp_path / "file" / "out", tmp_path / "out"):
        with pytest.raises(SettingsError, match="--out"):
            comparison.compare(config, ["lora"], seeds=[0], equal="epochs", out=out)


def test_the_table_records_its_arguments_mixed_code_random_draws_and_the_range_of_parameters(
    compare: Compare, tmp_path: Path
) -> None:
    def change(run: RunRecord) -> None:
        run.parameters = {"trainable": 10 + 2 * run.seed}
        run.compared |= {"commit": "new", "random": "still at chance"} if run.seed else {"commit": "old"}

    result = compare(seeds=[0, 1, 2], rates={"lora+all": 0.03}, run=Fake(change=change))
    assert (result["rates"], result["sweep"], result["metric"]) == ({"lora+all": 0.03}, [], "accuracy")
    assert result["differing"] == {"commit": ["new", "old"]}
    row = result["table"][0]
    assert (row["trainable"], row["trainable_mean"], row["trainable_range"]) == (14, 12, [10, 14])
    assert row["random"] == [1, 2]
    assert compare(out=tmp_path / "b", sweep=[0.1])["sweep"] == [0.1]


def writing(config: Config, **data: Any) -> Config:
    """Settings of a generating model with test rows."""
    task = config.task.model_copy(update={"type": "seq2seq"})
    return config.model_copy(update={"task": task, "data": config.data.model_copy(update={"test": "t.jsonl"} | data)})


@pytest.mark.parametrize(("data", "sweep"), [({"test": None}, []), ({"format": "text"}, []), ({}, [0.01, 0.02])])
def test_a_text_metric_that_no_cell_would_measure_is_refused_before_training(
    data: dict[str, Any], sweep: list[float], config: Config, compare: Compare, tmp_path: Path
) -> None:
    """No test rows, no targets, or a sweep, which chooses on validation rows."""
    run = Fake()
    with pytest.raises(SettingsError, match="rougeL"):
        compare(settings=writing(config, **data), sweep=sweep, metric="rougeL", run=run)
    assert not run.ran
    assert not (tmp_path / "out").exists()


def test_a_directory_may_have_the_test_rows_of_a_text_metric(config: Config, compare: Compare, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    run = Fake()
    with pytest.raises(SettingsError, match="rougeL"):  # the training ended without it
        compare(settings=writing(config, train=str(tmp_path / "data"), test=None), metric="rougeL", run=run)
    assert (tmp_path / "out" / "lora+all.0" / "run.json").exists()


def test_a_damaged_or_foreign_run_is_named(compare: Compare, tmp_path: Path) -> None:
    compare(seeds=[0, 1])
    folder = tmp_path / "out" / "lora+all.0"
    for text in ("{", (tmp_path / "out" / "lora+all.1" / "run.json").read_text()):
        (folder / "run.json").write_text(text)
        with pytest.raises(DataError, match=r"lora\+all\.0"):
            compare(seeds=[0, 1])


def test_runs_of_other_rows_are_refused_before_training(compare: Compare) -> None:
    rows = {seed: f"rows of {seed}" for seed in range(3)}
    compare(seeds=[0, 1])
    compare(seeds=[0, 1, 2], rows=rows)
    changed = Fake()
    with pytest.raises(DataError, match=r"lora\+all\.1 .*--out"):
        compare(["dora"], seeds=[0, 1], run=changed, rows=rows | {1: "others"})
    assert not changed.ran


def test_a_run_that_was_interrupted_runs_again(compare: Compare, tmp_path: Path) -> None:
    compare()
    run = RunRecord.load(tmp_path / "out" / "lora+all.0")
    run.status = "running"
    run.save(tmp_path / "out" / "lora+all.0")
    again = Fake(dies_at=0)
    with pytest.raises(KeyboardInterrupt):
        compare(run=again)


def test_progress_names_cell_metric_and_time_left(compare: Compare) -> None:
    lines: list[str] = []
    compare(seeds=[0, 1], say=lines.append)
    assert lines[0].startswith("1/2 lora+all.0: test accuracy 0.5200, 7 s; about 1 min left")
    assert "left" not in lines[1]
