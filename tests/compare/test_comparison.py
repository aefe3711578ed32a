"""A comparison runs each cell once, chooses learning rates by validation, and refuses what makes no sense."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from runs import write_config
from tsqlora.compare import comparison
from tsqlora.compare.cells import Cell, Entry, load, path_of
from tsqlora.compare.methods import crossed
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.run.config import Config, dump_config, load_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "train.jsonl"))


def compare(
    config: Config, methods: list[str], *, run: Any, rows: Mapping[int, str] | None = None, **options: Any
) -> Any:
    """Without processes: `run` is called for each cell, and `rows` are the hashes that preflight finds."""

    def in_own_process(name: str, work: Any, progress: Any = None) -> Any:
        if name == "preflight":
            return {seed: rows[seed] for seed in work.keywords["known"]} if rows else {}
        return run(*work.args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "in_own_process", in_own_process)
        return comparison.compare(config, methods, **options)


class Fake:
    """Runs nothing: what a cell finds follows from its method, seed and learning rate, and calls are counted."""

    def __init__(self, gain: Mapping[str, float] | None = None, fails_above: float = 1.0, dies_at: int = -1) -> None:
        self.gain, self.fails_above, self.dies_at = gain or {}, fails_above, dies_at
        self.ran: list[Cell] = []

    def __call__(self, config: Config, cell: Cell) -> Any:
        if len(self.ran) == self.dies_at:
            raise KeyboardInterrupt
        self.ran.append(cell)
        common = {"cell": cell.to_dict(), "steps": 10, "seconds": 7.0, "metrics": {}, "peak_memory_bytes": 2**20}
        if cell.learning_rate > self.fails_above:
            return common | {"failed": "diverged"}
        # Test and validation disagree about learning rates: test must decide nothing.
        right = 0.5 + self.gain.get(cell.entry.name, 0.0) + 0.01 * cell.seed
        validation = {"accuracy": right - abs(cell.learning_rate - 0.01), "loss": 1.0}
        test = {"accuracy": right + cell.learning_rate, "loss": 1.0}
        return common | {"metrics": {"validation": validation, "test": test}, "parameters": {"trainable": 3}}

    @property
    def names(self) -> list[str]:
        return [cell.name for cell in self.ran]


def test_a_finished_cell_is_never_run_again_and_more_may_be_added(config: Config, tmp_path: Path) -> None:
    first, second = Fake(), Fake()
    compare(config, ["lora"], seeds=[0, 1], out=tmp_path / "out", run=first)
    result = compare(config, ["lora", "lora+random"], seeds=[0, 1, 2], out=tmp_path / "out", run=second)
    assert len(first.ran) == 2
    assert sorted(second.names) == sorted(
        ["lora+all_seed2_lr0.02", *(f"lora+random_seed{seed}_lr0.02" for seed in range(3))]
    )
    assert [row["seeds"] for row in result["table"]] == [[0, 1, 2], [0, 1, 2]]
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == result


def test_cells_that_other_code_left_are_told(config: Config, tmp_path: Path) -> None:
    class By(Fake):
        commit = "old"

        def __call__(self, config: Config, cell: Cell) -> Any:
            return super().__call__(config, cell) | {"commit": self.commit, "versions": {"torch": "3"}}

    run = By()
    first = compare(config, ["lora"], seeds=[0], out=tmp_path / "out", run=run)
    assert first["differing"] == {}
    run.commit = "new"
    mixed = compare(config, ["lora"], seeds=[0, 1], out=tmp_path / "out", run=run)
    assert mixed["differing"] == {"commit": ["new", "old"]}


def test_what_was_cut_off_goes_on_with_the_cell_that_was_not_finished(config: Config, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compare(config, ["lora", "tsqlora"], seeds=[0, 1], out=tmp_path / "out", run=Fake(dies_at=2))
    after = Fake()
    compare(config, ["lora", "tsqlora"], seeds=[0, 1], out=tmp_path / "out", run=after)
    assert len(after.ran) == 2


def test_differences_are_by_seed_and_noise_is_called_noise(config: Config, tmp_path: Path) -> None:
    run = Fake({"tsqlora+quality": 0.05})
    result = compare(config, ["tsqlora", "lora", "lora+random"], seeds=[0, 1, 2], out=tmp_path / "out", run=run)
    ours, reference, same = result["table"]
    assert ours["difference"]["mean"] == pytest.approx(0.05)
    assert ours["verdict"] == "better than lora+all"
    assert "difference" not in reference
    assert same["difference"]["mean"] == pytest.approx(0.0)
    assert same["verdict"] == "within noise of lora+all"


def test_the_learning_rate_is_chosen_on_validation_rows_of_the_first_seed(config: Config, tmp_path: Path) -> None:
    run = Fake()
    result = compare(config, ["lora"], seeds=[5, 6], out=tmp_path / "out", sweep=[0.001, 0.01, 0.02], run=run)
    assert run.names == [*(f"lora+all_seed5_lr{rate}" for rate in (0.001, 0.01, 0.02)), "lora+all_seed6_lr0.01"]
    assert result["table"][0]["learning_rates"] == [0.01]


def test_of_a_loss_the_lowest_chooses_the_learning_rate_and_is_better(config: Config, tmp_path: Path) -> None:
    class Losses(Fake):
        def __call__(self, config: Config, cell: Cell) -> Any:
            found = super().__call__(config, cell)
            for metrics in found["metrics"].values():
                metrics["loss"] = 1 - metrics["accuracy"]
            return found

    run = Losses({"tsqlora+quality": 0.05})
    sweep = [0.001, 0.01, 0.02]
    methods, seeds = ["lora", "tsqlora"], [0, 1, 2]
    result = compare(config, methods, seeds=seeds, out=tmp_path / "out", sweep=sweep, metric="loss", run=run)
    assert [row["learning_rates"] for row in result["table"]] == [[0.01], [0.01]]
    assert result["table"][1]["difference"]["mean"] == pytest.approx(-0.05)
    assert result["table"][1]["verdict"] == "better than lora+all"


def test_a_cell_that_fails_is_a_result_and_is_never_chosen(config: Config, tmp_path: Path) -> None:
    run = Fake(fails_above=0.005)
    result = compare(config, ["lora"], seeds=[0, 1], out=tmp_path / "out", sweep=[0.001, 0.01], run=run)
    assert result["table"][0]["learning_rates"] == [0.001]
    told: list[str] = []
    result = compare(config, ["lora"], seeds=[0], out=tmp_path / "b", run=Fake(fails_above=0.0), say=told.append)
    assert result["table"][0]["verdict"] == "every seed failed"
    assert told == ["1/1 lora+all_seed0_lr0.02: failed: diverged"]


def test_an_entry_that_fails_at_every_rate_stands_in_the_table_and_the_others_go_on(
    config: Config, tmp_path: Path
) -> None:
    class Fails(Fake):
        def __call__(self, config: Config, cell: Cell) -> Any:
            self.fails_above = 0.0 if cell.entry.method == "full" else 1.0
            return super().__call__(config, cell)

    run, sweep = Fails(), [0.02, 0.01]
    table = compare(config, ["full", "lora"], seeds=[0, 1], out=tmp_path / "out", sweep=sweep, run=run)["table"]
    assert (table[0]["verdict"], table[0]["failed"], table[0]["learning_rates"]) == (
        "every seed failed",
        [0, 1],
        [0.01],
    )
    assert (table[1]["failed"], table[1]["seeds"]) == ([], [0, 1])


def test_seeds_that_drew_at_random_are_named_in_the_table(config: Config, tmp_path: Path) -> None:
    class AtRandom(Fake):
        def __call__(self, config: Config, cell: Cell) -> Any:
            found = super().__call__(config, cell)
            return found | {"quality": {"random": "still at chance" if cell.seed else None}}

    result = compare(config, ["lora", "tsqlora"], seeds=[0, 1, 2], out=tmp_path / "out", run=AtRandom())
    assert result["table"][1]["random"] == [1, 2]


def test_a_learning_rate_may_be_given_for_a_method_or_an_entry(config: Config, tmp_path: Path) -> None:
    run = Fake()
    methods = ["lora", "lora+random", "tsqlora"]
    compare(config, methods, seeds=[0], out=tmp_path / "out", rates={"lora": 0.1, "lora+random": 0.2}, run=run)
    assert [cell.learning_rate for cell in run.ran] == [0.1, 0.2, 0.02]


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ([0.001, 0.01, 0.02], []),  # 0.01 is the best
        ([0.01, 0.02], ["lora+all: 0.01 is the lowest rate of --lr-sweep; a better one may lie beyond it"]),
        ([0.005, 0.001], ["lora+all: 0.005 is the highest rate of --lr-sweep; a better one may lie beyond it"]),
        ([0.01], []),
    ],
)
def test_a_learning_rate_at_the_end_of_a_sweep_is_told(
    config: Config, tmp_path: Path, sweep: list[float], told: list[str]
) -> None:
    said: list[str] = []
    compare(config, ["lora"], seeds=[0], out=tmp_path / "out", sweep=sweep, run=Fake(), say=said.append)
    assert [line for line in said if "--lr-sweep" in line] == told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["loar"]}, "--methods: 'loar' is unknown; did you mean 'lora'?"),
        ({"methods": ["lora+randm"]}, "policy 'randm' is unknown; did you mean 'random'?"),
        ({"methods": ["lora", "lora+all"]}, "names lora+all twice"),
        ({"methods": []}, "--methods is empty"),
        ({"seeds": []}, "--seeds is empty"),
        ({"equal": "seconds"}, "--equal 'seconds'"),
        ({"sweep": [0.1], "rates": {"lora": 0.1}}, "leave out one"),
        ({"sweep": [0.0]}, "learning rate 0.0 must be above 0"),
        ({"rates": {"dora": 0.1}}, "--lr: 'dora' is not compared"),
        ({"metric": "acuracy"}, "'acuracy' is not measured for sequence-classification; did you mean 'accuracy'?"),
        ({"metric": "rougeL"}, "'rougeL' is not measured for sequence-classification"),
        ({"seeds": [-1]}, "--seeds -1: it must be at least 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: dict[str, Any], message: str, config: Config, tmp_path: Path
) -> None:
    given = {"methods": ["lora"], "seeds": [0]} | arguments
    with pytest.raises(SettingsError) as caught:
        compare(config, given.pop("methods"), out=tmp_path / "out", run=Fake(), **given)
    assert message in str(caught.value)


def test_a_directory_holds_one_comparison(config: Config, tmp_path: Path) -> None:
    compare(config, ["lora"], seeds=[0], out=tmp_path / "out", run=Fake())
    with pytest.raises(SettingsError, match="--out"):
        compare(config, ["lora"], seeds=[0], out=tmp_path / "out", equal="epochs", run=Fake())
    other = config.model_copy(update={"training": config.training.model_copy(update={"epochs": 7})})
    with pytest.raises(SettingsError, match="--out"):
        compare(other, ["lora"], seeds=[0], out=tmp_path / "out", run=Fake())


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_comparison_json_is_named_with_the_cure(text: str, config: Config, tmp_path: Path) -> None:
    compare(config, ["lora"], seeds=[0], out=tmp_path / "out", run=Fake())
    (tmp_path / "out" / "comparison.json").write_text(text)
    with pytest.raises(DataError, match=r"comparison\.json"):
        compare(config, ["lora"], seeds=[0], out=tmp_path / "out", run=Fake())


@pytest.mark.parametrize(
    ("section", "changes", "methods", "message"),
    [
        ("quality", {"enabled": False}, "dora+quality", "quality.enabled is false, and dora+quality draws by quality"),
        ("quality", {"enabled": False}, "tsqlora", "set it to true, or leave out tsqlora+quality"),
        ("training", {"load_best_model_at_end": True}, "lora", "training.load_best_model_at_end needs checkpoints"),
    ],
)
def test_settings_that_compare_would_not_follow_are_refused(
    section: str, changes: dict[str, Any], methods: str, message: str, config: Config, tmp_path: Path
) -> None:
    given = config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})
    with pytest.raises(SettingsError) as error:
        compare(given, ["lora+random", methods], seeds=[0], out=tmp_path / "out", run=Fake())
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_settings_that_no_entry_reads_are_no_hindrance(config: Config, tmp_path: Path) -> None:
    unread = {
        "quality": config.quality.model_copy(update={"enabled": False}),
        "ranks": config.ranks.model_copy(update={"policy": "fixed"}),
    }
    given = config.model_copy(update=unread)
    assert compare(given, ["lora", "lora+loss"], seeds=[0], out=tmp_path / "out", run=Fake())["table"]


def test_a_table_has_what_its_command_needs_and_the_range_of_what_trained(config: Config, tmp_path: Path) -> None:
    class Ranges(Fake):
        def __call__(self, config: Config, cell: Cell) -> Any:
            return super().__call__(config, cell) | {"parameters": {"trainable": 10 + 2 * cell.seed}}

    run, rates = Ranges(), {"lora+all": 0.03}
    result = compare(config, ["lora"], seeds=[0, 1, 2], out=tmp_path / "out", rates=rates, run=run)
    assert (result["rates"], result["sweep"], result["metric"]) == (rates, [], "accuracy")
    row = result["table"][0]
    assert (row["trainable"], row["trainable_mean"], row["trainable_range"]) == (14, 12, [10, 14])
    assert compare(config, ["lora"], seeds=[0], out=tmp_path / "b", sweep=[0.1], run=Fake())["sweep"] == [0.1]


def test_a_runs_directory_is_no_comparisons(config: Config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    with pytest.raises(SettingsError, match="--out"):
        compare(config, ["lora"], seeds=[0], out=tmp_path / "run", run=Fake())


def test_policies_cross_methods_that_name_none() -> None:
    assert crossed(["lora"], []) == ["lora"]
    with pytest.raises(SettingsError, match=r"lora\+random"):
        crossed(["lora+random"], ["all"])


def as_writing(config: Config, **data: Any) -> Config:
    """Of a model that writes, with rows to write on."""
    task = config.task.model_copy(update={"type": "seq2seq"})
    return config.model_copy(update={"task": task, "data": config.data.model_copy(update={"test": "t.jsonl"} | data)})


@pytest.mark.parametrize("lacking", [{"test": None}, {"format": "text"}, {"sweep": [0.01, 0.02]}])
def test_a_text_metric_that_nothing_would_have_is_refused_before_a_training(
    lacking: dict[str, Any], config: Config, tmp_path: Path
) -> None:
    """There is no test row, none has a target, or validation rows are to choose by it."""
    run, sweep = Fake(), lacking.get("sweep", [])
    writing = as_writing(config, **{name: value for name, value in lacking.items() if name != "sweep"})
    with pytest.raises(SettingsError, match="rougeL"):
        compare(writing, ["lora"], seeds=[0], out=tmp_path / "out", sweep=sweep, metric="rougeL", run=run)
    assert not run.ran
    assert not (tmp_path / "out").exists()


def test_a_directory_may_have_the_test_rows_of_a_text_metric_and_a_cell_without_it_is_kept(
    config: Config, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    writing, run = as_writing(config, train=str(tmp_path / "data"), test=None), Fake()
    with pytest.raises(SettingsError, match="rougeL"):  # of what is not there, after a training
        compare(writing, ["lora"], seeds=[0], out=tmp_path / "out", metric="rougeL", run=run)
    assert load(tmp_path / "out", run.ran[0]) is not None


def test_a_cells_file_that_is_broken_or_anothers_is_named(config: Config, tmp_path: Path) -> None:
    cell = Cell(Entry("lora", "all"), 0, 0.02)
    path = path_of(tmp_path, cell)
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(DataError, match="lora"):
        load(tmp_path, cell)
    path.write_text(json.dumps({"cell": Cell(Entry("lora", "all"), 1, 0.02).to_dict()}))
    with pytest.raises(DataError, match="another cell"):
        load(tmp_path, cell)


def test_cells_of_other_rows_are_refused_before_anything_is_trained(config: Config, tmp_path: Path) -> None:
    class WithRows(Fake):
        def __call__(self, config: Config, cell: Cell) -> Any:
            return super().__call__(config, cell) | {"data_hash": f"rows of {cell.seed}"}

    rows = {seed: f"rows of {seed}" for seed in range(3)}
    compare(config, ["lora"], seeds=[0, 1], out=tmp_path / "out", run=WithRows())
    compare(config, ["lora"], seeds=[0, 1, 2], out=tmp_path / "out", run=WithRows(), rows=rows)
    changed = WithRows()
    with pytest.raises(DataError, match=r"lora\+all_seed1_lr0.02.json .*--out"):
        compare(config, ["dora"], seeds=[0, 1], out=tmp_path / "out", run=changed, rows=rows | {1: "others"})
    assert not changed.ran


def test_a_launcher_is_refused(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="launcher"):
        compare(config, ["lora"], seeds=[0], out=tmp_path / "out", run=Fake())


def test_time_left_is_told(config: Config, tmp_path: Path) -> None:
    told: list[str] = []
    compare(config, ["lora"], seeds=[0, 1], out=tmp_path / "out", run=Fake(), say=told.append)
    assert told[0].startswith("1/2 lora+all_seed0_lr0.02: test accuracy 0.5200, 7 s; about 1 min left")
    assert "left" not in told[1]
