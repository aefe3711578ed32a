"""The command line as scripts see it: exit codes, one JSON object, errors of one or two lines."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from runs import make_rows, set_up, write_config, write_jsonl
from tables import cells_of
from tsqlora.auditing.scores import Scores
from tsqlora.paper.callback import RankCallback
from tsqlora.rows.rows import Columns, row_hash, sample_hash
from tsqlora.settings import load_config
from tsqlora.training.command import train

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, data and a configuration."""
    folder = set_up(tmp_path_factory.mktemp("cli"))
    write_jsonl(folder / "test.jsonl", make_rows(30, seed=5))
    return folder


@pytest.fixture(scope="session")
def trained(place: Path) -> Path:
    """The run that most tests share, trained by the command in its own process."""
    command = [sys.executable, "-m", "tsqlora.cli", "train", str(place / "c.yaml"), "--out", str(place / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    (place / "stdout").write_text(done.stdout)
    (place / "stderr").write_text(done.stderr)
    return place / "run"


# ---------------------------------------------------------------------------- what is refused


def refused(tsqlora: Run, *arguments: str | Path) -> tuple[int, str]:
    """Exit code and message of a command that must fail in one or two lines, with nothing on stdout."""
    code, out, err = tsqlora(*arguments)
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error:") or "error:" in line]
    assert len(lines) == 1, err
    message = err[err.index("error:") :].strip()
    assert len(message.splitlines()) <= 2, err
    return code, message


def assert_refused(code: int, named: str, tsqlora: Run, *arguments: str | Path) -> str:
    exit_code, text = refused(tsqlora, *arguments)
    assert (exit_code, named in text) == (code, True), text
    return text


# ------------------------------------------------------------------------------------ train


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def test_json_is_one_object_and_nothing_noisy_is_on_stderr(trained: Path) -> None:
    printed = json.loads((trained.parent / "stdout").read_text())
    assert printed.pop("run") == str(trained)
    assert printed == record_of(trained)
    first, *lines = (trained.parent / "stderr").read_text().splitlines()
    rows = record_of(trained)["plan"]["rows"]
    assert f"train.jsonl: {rows['train']} train, {rows['validation']} validation rows; columns 'text', 'label'" in first
    assert first.endswith("2 classes (0, 1); task sequence-classification")
    assert all(line.endswith((" steps", " rows")) for line in lines if line.strip()), lines


def test_a_run_directory_has_all_that_the_contract_names(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} >= {"config.yaml", "run.json", "scores.parquet", "adapter"}
    record = record_of(trained)
    assert record["status"] == "finished"
    assert record["seed"] == 0
    assert {"tsqlora", "torch", "transformers", "peft", "python"} <= record["versions"].keys()
    assert len(record["data"]["hash"]) == 16
    assert {"start", "adjustment"} >= {event["reason"] for event in record["rank_events"]}
    assert record["rank_events"]
    assert "accuracy" in record["metrics"]["validation"]
    assert record["quality"]["used"] is True


def test_the_id_of_a_score_is_the_rows_place_in_the_file_though_a_tenth_is_held_out(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained.parent / "train.jsonl").read_text().splitlines()]
    scores = Scores.load(trained / "scores.parquet")
    assert scores.ids is not None
    assert scores.hashes is not None
    assert len(scores) < len(rows)
    columns = Columns(**scores.record.columns or {})
    assert [row_hash(rows[place], columns) for place in scores.ids] == list(scores.hashes)


def test_ranks_stay_within_the_budget_and_are_those_of_the_adapter(trained: Path) -> None:
    record = record_of(trained)
    config = LoraConfig.from_pretrained(str(trained / "adapter"))
    assert all(event["used"] <= event["budget"] for event in record["rank_events"])
    ranks = {name: dict(config.rank_pattern).get(name, config.r) for name in record["ranks"]}
    assert ranks == record["ranks"]
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    for name, rank in record["ranks"].items():
        assert tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank


def test_its_own_config_repeats_the_run(trained: Path, tmp_path: Path, tsqlora: Run) -> None:
    assert tsqlora("train", trained / "config.yaml", "--out", tmp_path / "again", "--json")[0] == 0
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (trained, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "again" / "config.yaml").read_text() == (trained / "config.yaml").read_text()


def stock_logits(run: Path, texts: Sequence[str]) -> torch.Tensor:
    """Logits by plain transformers and PEFT, one text at a time."""
    model_path = load_config(run / "config.yaml").model.path
    base = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2)
    model = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def test_plain_peft_loads_the_adapter_with_the_same_predictions(trained: Path, tmp_path: Path, tsqlora: Run) -> None:
    data, out = trained.parent / "test.jsonl", tmp_path / "p.jsonl"
    assert tsqlora("predict", trained, "--data", data, "--out", out)[0] == 0
    predicted = cells_of(out)
    logits = stock_logits(trained, [row["text"] for row in predicted])
    assert [row["prediction"] for row in predicted] == logits.argmax(1).tolist()
    torch.testing.assert_close(
        torch.tensor([row["probability"] for row in predicted]), logits.softmax(1).amax(1), atol=1e-5, rtol=0
    )


def test_a_dry_run_tells_the_plan_that_the_run_then_records_and_writes_nothing(
    trained: Path, place: Path, tmp_path: Path, tsqlora: Run
) -> None:
    code, out, _ = tsqlora("train", place / "c.yaml", "--out", tmp_path / "none", "--dry-run", "--json")
    plan, record = json.loads(out), record_of(trained)
    assert (code, plan["steps"], plan["passes"]["look"]["forward"]) == (0, 6 * 5, 72)
    assert {name: plan[name] for name in record["plan"]} == record["plan"]
    assert (plan["columns"], plan["max_length"]) == (record["data"]["columns"], record["data"]["max_length"])
    assert sum(plan["classes"].values()) == plan["rows"]["train"]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("resume", "part"), [([], "would be refused"), (["--resume"], "the plan of the whole run")])
def test_a_dry_run_tells_what_the_directory_holds(
    resume: list[str], part: str, trained: Path, place: Path, tsqlora: Run
) -> None:
    code, out, err = tsqlora("train", place / "c.yaml", "--out", trained, "--dry-run", *resume)
    assert (code, part in err, "trainable" in out) == (0, True, True)


def test_a_dry_run_refuses_what_the_run_would_before_its_first_step(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    one = ["--set", "training.save_total_limit=1", "--out", tmp_path / "none", "--dry-run"]
    assert_refused(2, "save_total_limit 1 deletes the last complete", tsqlora, "train", place / "c.yaml", *one)


# ----------------------------------------------------------------------------------- resume


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """A training inside the `with` is interrupted where this step would begin."""
    begin = RankCallback.on_step_begin

    def killed(self: RankCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt
        begin(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankCallback, "on_step_begin", killed)
        yield


def contents(run: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in run.rglob("*") if path.is_file()]
    return {str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_resuming_a_finished_run_changes_nothing(trained: Path, place: Path, tsqlora: Run) -> None:
    before = contents(trained)
    code, out, err = tsqlora("train", place / "c.yaml", "--out", trained, "--resume", "--json")
    assert code == 0
    assert "is finished" in err
    assert json.loads(out)["metrics"] == record_of(trained)["metrics"]
    assert contents(trained) == before


@pytest.mark.parametrize(("more", "named"), [([], "--resume"), (["--resume", "--set", "training.seed=1"], "settings")])
def test_training_into_another_run_is_refused(
    more: list[str], named: str, trained: Path, place: Path, tsqlora: Run
) -> None:
    assert_refused(2, named, tsqlora, "train", place / "c.yaml", "--out", trained, *more)


def test_a_killed_run_resumes_to_the_same_adapter(trained: Path, place: Path, tmp_path: Path, tsqlora: Run) -> None:
    arguments = ("train", place / "c.yaml", "--out", tmp_path / "run", "--resume", "--json")
    with killed_at(17):
        code, out, err = tsqlora(*arguments)
    assert (code, out) == (130, "")
    assert "--resume" in err
    code, out, err = tsqlora(*arguments)
    assert code == 0, err
    whole, resumed = record_of(trained), json.loads(out)
    assert resumed["ranks"] == whole["ranks"]
    assert resumed["metrics"] == whole["metrics"]
    passes = [{p: (c["forward"], c["backward"]) for p, c in r["cost"].items()} for r in (whole, resumed)]
    assert passes[0] == passes[1]
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (trained, tmp_path / "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_is_continued_by_its_directory(
    trained: Path, stopped: Path, tmp_path: Path, tsqlora: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"tsqlora train {stopped} --resume"
    rows = stopped.parent / "rows.jsonl"
    assert line in refused(tsqlora, "predict", stopped, "--data", rows, "--out", tmp_path / "p.jsonl")[1]
    assert line in refused(tsqlora, "export", stopped, "--format", "peft", "--out", tmp_path / "e")[1]
    assert "--resume" in refused(tsqlora, "train", stopped)[1]
    code, out, err = tsqlora(*line.split()[1:], "--json")
    assert code == 0, err
    assert json.loads(out)["run"] == str(stopped)
    assert json.loads(out)["metrics"] == record_of(trained)["metrics"]
    assert "no run" in refused(tsqlora, "train", tmp_path, "--resume")[1]


@pytest.mark.parametrize(
    ("command", "advice"), [("train", "the same command with --resume"), ("audit", "the same command starts again")]
)
def test_an_interrupted_command_says_what_is_true_of_it(
    command: str, advice: str, tsqlora: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqlora.cli.commands.app", lambda *_, **__: 130)
    code, _, err = tsqlora(command)
    assert (code, err.strip().startswith(f"interrupted; {advice}")) == (130, True)


def test_a_run_killed_behind_its_last_step_only_ends(
    trained: Path, place: Path, tmp_path: Path, tsqlora: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its adapter is written."""

    def cut_off(self: PeftModel, folder: str, **kwargs: Any) -> None:
        if Path(folder).name == "adapter":
            (tmp_path / "run" / "adapter").mkdir()
            (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt
        save(self, folder, **kwargs)

    save, arguments = PeftModel.save_pretrained, ("train", place / "c.yaml", "--out", tmp_path / "run", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", cut_off)
        assert tsqlora(*arguments)[0] == 130
    code, _, err = tsqlora(*arguments)
    assert code == 0, err
    assert "training" not in err, "no step is trained again"
    assert record_of(tmp_path / "run")["metrics"] == record_of(trained)["metrics"]
    files = (run / "adapter" / "adapter_model.safetensors" for run in (trained, tmp_path / "run"))
    assert len({path.read_bytes() for path in files}) == 1


@pytest.fixture(scope="session")
def stopped_once(place: Path) -> Path:
    with killed_at(17), pytest.raises(KeyboardInterrupt):
        train(load_config(place / "c.yaml"), place / "stopped")
    return place / "stopped"


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A run with checkpoints 10 and 15, and the whole run's settings."""
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


@pytest.mark.parametrize("name", ["optimizer.pt", "tsqlora_manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_and_told(
    name: str, stopped: Path, trained: Path, place: Path, tsqlora: Run
) -> None:
    path = stopped / "checkpoints" / "checkpoint-15" / name
    path.write_bytes(path.read_bytes()[:-9])
    code, _, err = tsqlora("train", place / "c.yaml", "--out", stopped, "--resume")
    assert code == 0, err
    assert f"warning: {path.parent} is passed over: {name} " in err
    assert any(f"is passed over: {name} " in note for note in record_of(stopped)["notes"])
    files = (run / "adapter" / "adapter_model.safetensors" for run in (trained, stopped))
    assert len({path.read_bytes() for path in files}) == 1


def test_a_run_with_nothing_whole_to_resume_from_is_refused(stopped: Path, place: Path, tsqlora: Run) -> None:
    for path in (stopped / "checkpoints").rglob("rng_state.pth"):
        path.unlink()
    text = assert_refused(
        1, "no checkpoint is complete", tsqlora, "train", place / "c.yaml", "--out", stopped, "--resume"
    )
    assert text.count("rng_state.pth is missing") == 2


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text("{")])
def test_a_run_whose_record_is_lost_is_not_resumed_until_it_is_back(
    harm: Callable[[Path], Any], stopped: Path, place: Path, tsqlora: Run
) -> None:
    harm(stopped / "run.json")
    assert_refused(
        3, "run.json is missing or damaged", tsqlora, "train", place / "c.yaml", "--out", stopped, "--resume"
    )


# -------------------------------------------------------------------------- score and select


@pytest.fixture(scope="session")
def scored(trained: Path) -> Path:
    """Scores by the weights of the shared run."""
    from tsqlora.training.score import score_rows

    score_rows(trained, trained.parent / "scores-of-run.parquet")
    return trained.parent / "scores-of-run.parquet"


def check_scores(path: Path, rows: int, train: Path) -> None:
    table = pq.read_table(path)
    assert {"id", "hash", "loss", "el2n", "quality", "probability"} <= set(table.column_names)
    assert {"predicted", "predicted_probability", "label_probability", "reason"} <= set(table.column_names)
    assert len(table) == rows
    file = cells_of(train)
    for place, name in zip(table["id"].to_pylist(), table["hash"].to_pylist(), strict=True):
        assert name == sample_hash(file[place]["text"], "", str(file[place]["label"]))
    assert table["probability"].to_numpy().sum() == pytest.approx(1)


def test_scoring_a_run_gives_every_row_its_terms(scored: Path) -> None:
    check_scores(scored, 72, scored.parent / "train.jsonl")


def test_scoring_a_config_trains_nothing(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    code, out, _ = tsqlora("score", place / "c.yaml", "--out", tmp_path / "s.parquet", "--json")
    assert code == 0
    assert json.loads(out)["rows"] == 72
    check_scores(tmp_path / "s.parquet", 72, place / "train.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["s.parquet"]


def test_scores_are_explained_with_texts(scored: Path, tsqlora: Run) -> None:
    code, out, _ = tsqlora("explain", scored, "--samples", "3", "--json")
    assert code == 0
    result = json.loads(out)
    rows = cells_of(scored.parent / "train.jsonl")
    for name in ("highest", "lowest", "suspicious"):
        assert len(result[name]) == 3
        for sample in result[name]:
            assert rows[sample["id"]] == {"text": sample["text"], "label": sample["label"]}
            assert sample["predicted"] in (0, 1)
    shown = tsqlora("explain", scored, "--samples", "3")[1]
    assert "most suspicious" in shown
    assert "wrong labels" in shown


# ----------------------------------------------------------------------- evaluate and predict


def test_evaluate_says_what_sklearn_says_of_the_predictions(trained: Path, tmp_path: Path, tsqlora: Run) -> None:
    data, out = trained.parent / "test.jsonl", tmp_path / "p.csv"
    code, printed, _ = tsqlora("evaluate", trained, "--data", data, "--json")
    assert code == 0
    metrics = json.loads(printed)
    assert tsqlora("predict", trained, "--data", data, "--out", out)[0] == 0
    rows = cells_of(out)
    truth, predicted = ([int(row[name]) for row in rows] for name in ("label", "prediction"))
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert metrics["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert {"accuracy", "macro_f1", "matthews", "loss"} <= metrics.keys()


# ------------------------------------------------------------------------- other kinds of runs


# Here the warning is printed, as for a user: under pytest it would be an error.
at_chance = pytest.mark.filterwarnings("default:rows are drawn evenly:UserWarning")


def train_on(
    tsqlora: Run, folder: Path, model: Path, rows: Sequence[Mapping[str, Any]], **sections: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """The record of a run on these rows, and what stood on the screen."""
    config = write_config(folder / "c.yaml", model, write_jsonl(folder / "rows.jsonl", rows), **sections)
    code, out, err = tsqlora("train", config, "--out", folder / "run")
    assert code == 0, err
    return record_of(folder / "run"), out + err


def test_without_quality_rows_are_drawn_at_random(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    record, _ = train_on(tsqlora, tmp_path, place / "model", make_rows(80), quality={"enabled": False, "fraction": 0.5})
    assert (record["quality"]["enabled"], record["quality"]["used"]) == (False, False)
    assert record["quality"]["looks"][0]["head_start"]["replaced"]
    assert record["plan"]["steps"] == 30
    assert not (tmp_path / "run" / "scores.parquet").exists()
    assert_refused(2, "quality.enabled", tsqlora, "score", tmp_path / "c.yaml", "--out", tmp_path / "s.parquet")


@at_chance
def test_regression_predicts_numbers(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    rows = make_rows(80, labels=(-1.0, 1.5))
    record, _ = train_on(tsqlora, tmp_path, place / "model", rows, task={"type": "regression"})
    assert {"pearson", "spearman", "loss"} <= record["metrics"]["validation"].keys()
    data = write_jsonl(tmp_path / "new.jsonl", rows[:4])
    assert tsqlora("predict", tmp_path / "run", "--data", data, "--out", tmp_path / "p.jsonl")[0] == 0
    predicted = cells_of(tmp_path / "p.jsonl")
    assert all(isinstance(row["prediction"], float) and "probability" not in row for row in predicted)


@at_chance
def test_a_model_at_chance_finishes_with_random_draws_and_says_so(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    rng = np.random.default_rng(0)
    rows = [{**row, "label": int(rng.integers(2))} for row in make_rows(80)]
    slow = {"training": {"epochs": 4, "learning_rate": 1e-7}}
    record, screen = train_on(tsqlora, tmp_path, place / "model", rows, **slow)
    assert record["quality"]["used"] is False
    assert "standard errors" in record["quality"]["looks"][0]["not_ready"]
    assert any("drawn evenly" in note for note in record["notes"])
    assert "drawn evenly" in screen
    assert "UserWarning" not in screen
    code, _, err = tsqlora("score", tmp_path / "c.yaml", "--out", tmp_path / "s.parquet")
    assert code == 0, err
    assert Scores.load(tmp_path / "s.parquet").record.not_ready


# ------------------------------------------------------------------------------- further corners


def test_init_prints_yaml_or_one_json_object(tmp_path: Path, tsqlora: Run) -> None:
    _, text, _ = tsqlora("init")
    assert json.loads(tsqlora("init", "--json")[1]) == {"yaml": text}
    path = tmp_path / "new" / "tsq.yaml"
    assert json.loads(tsqlora("init", "-o", path, "--json")[1]) == {"out": str(path)}
    assert path.read_text() == text


def test_only_the_first_of_several_processes_speaks(
    trained: Path, tsqlora: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert tsqlora("evaluate", trained, "--json") == (0, "", "")
    assert "is not a run" in tsqlora("evaluate", trained.parent)[2]


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_killed_before_its_first_checkpoint_starts_over(
    step: int, place: Path, tmp_path: Path, tsqlora: Run
) -> None:
    arguments = ("train", place / "c.yaml", "--out", tmp_path / "run")
    with killed_at(step):
        assert tsqlora(*arguments)[0] == 130
    if step == 0:
        assert not (tmp_path / "run" / "config.yaml").exists(), "nothing began"
    else:
        assert record_of(tmp_path / "run")["status"] == "running"
        assert "is not finished" in refused(tsqlora, "evaluate", tmp_path / "run")[1]
        assert refused(tsqlora, *arguments)[0] == 2
    code, _, err = tsqlora(*arguments, *(["--resume"] if step else []))
    assert code == 0, err
    assert record_of(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize("setting", ["data.train", "data.trusted"])
def test_a_run_whose_data_changed_is_not_resumed(setting: str, place: Path, tmp_path: Path, tsqlora: Run) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(80, seed=2))
    arguments = ("train", place / "c.yaml", "--set", f"{setting}={data}", "--out", tmp_path / "run", "--resume")

    with killed_at(1):
        assert tsqlora(*arguments)[0] == 130
    write_jsonl(data, make_rows(80, seed=1))
    assert_refused(3, "--out", tsqlora, *arguments)


def test_two_processes_train_one_run_and_one_speaks(place: Path, tmp_path: Path) -> None:
    # Half a batch a process: the steps are those of the shared run, which has batches of 8.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = ["--set", "training.batch_size=4", "--set", "training.use_cpu=true"]
    command = ["-m", "tsqlora.cli", "train", str(place / "c.yaml"), "--out", str(tmp_path / "run"), *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command, "--json"], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["status"] == "finished"
    assert record["plan"]["steps"] == 30
    done_rows, planned = (
        sum(phases[phase]["forward"] for phase in ("training",))
        for phases in (record["cost"], record["plan"]["passes"])
    )
    assert done_rows == planned
    # As if both had been killed behind checkpoint 25, which has the random state of each.
    adapter, run = tmp_path / "run" / "adapter" / "adapter_model.safetensors", tmp_path / "run"
    whole = adapter.read_bytes()
    named = json.loads((run / "checkpoints" / "checkpoint-25" / "tsqlora_manifest.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= named.keys()
    shutil.rmtree(run / "adapter")
    (run / "checkpoints" / "checkpoint-30" / "rng_state_1.pth").unlink()
    (run / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "run"} | {"status": "running"}))
    # By accelerate, whose --multi_gpu is what starts several processes on CPUs as well.
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch = [*accelerate, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run([*launch, *command, "--resume"], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("checkpoint-30 is passed over: rng_state_1.pth is missing") == 1
    assert adapter.read_bytes() == whole
