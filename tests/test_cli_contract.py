"""The command line's contract, which scripts rely on: commands, options, exit codes, JSON, errors, help."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

from loras import lora_config, save_base, save_lora, tiny_llama
from runs import make_rows, set_up, write_jsonl
from tsqlora.cli import console
from tsqlora.cli.commands import app

Run = Callable[..., tuple[int, str, str]]

OPTIONS = {
    "demo": "--out --seed",
    "init": "-o --output --task",
    "look": "--model --set --out",
    "train": "--model --data --set --out --look --resume --dry-run",
    "audit": "--model --review --out --apply --set",
    "apply": "--drop --out",
    "score": "--look --out --set",
    "explain": "--row --samples --data",
    "select": "--out --fraction --seed --data",
    "evaluate": "--data --set",
    "predict": "--data --out --set",
    "export": "--format --out --base --dtype --max-rank --keep",
    "doctor": "--server --template",
    "check": "--server-url --served-name --yes",
    "report": "--out",
}
"""Every command with its options, beside --json."""


def test_every_command_is_in_the_contract_with_its_options_and_json() -> None:
    root: Any = typer.main.get_command(app)
    assert OPTIONS.keys() == root.commands.keys()
    for name, command in root.commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {*OPTIONS[name].split(), "--json"} <= options, name


@pytest.mark.parametrize("name", OPTIONS)
def test_help_of_every_command_has_an_example(name: str, tsqlora: Run) -> None:
    code, out, err = tsqlora(*name.split(), "--help")
    assert (code, err) == (0, "")
    assert f"Example: tsqlora {name}" in " ".join(out.split())


def test_without_arguments_help_lists_every_command(tsqlora: Run) -> None:
    code, out, _ = tsqlora()
    assert code == 0
    assert all(name.split()[0] in out for name in OPTIONS)


def test_version(tsqlora: Run) -> None:
    assert tsqlora("--version") == (0, f"tsqlora {version('tsqlora')}\n", "")


# --- exit codes ----------------------------------------------------------------------------


def assert_refused(answer: tuple[int, str, str], code: int, named: str) -> None:
    """Nothing on stdout, one or two lines on stderr, which name what is wrong."""
    result, out, err = answer
    assert (result, out) == (code, ""), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 2, err
    assert named in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("train", "CONFIG"),
        ("train --model m", "data.train"),
        ("train --data d.csv --set task.type=regression", "model.path"),
        ("train --model m --data d.csv --set qualty.fraction=1", "qualty"),
        ("fly", "fly"),
        ("merge run --out model", "tsqlora export --format merged"),
        ("llamafactory sft.yaml --out run", "llama_factory.py"),
        ("adapter compress run --mean-rank 4 --out x", "tsqlora export --format peft --keep SHARE"),
        ("train c.yaml --fast", "--fast"),
        ("select s --fraction x --out o", "--fraction"),
        ("train none.yaml", "none.yaml"),
        ("score c.yaml --explain=3", "tsqlora explain"),
        ("explain scores.parquet --samples 0", "--samples"),
        ("report run --port 80", "--port"),
        ("init -o taken.yaml", "taken.yaml"),
        ("train taken.yaml", "qualty"),
    ],
)
def test_wrong_usage_and_settings_exit_2(
    arguments: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tsqlora: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken.yaml").write_text("qualty: {}\n")
    assert_refused(tsqlora(*arguments.split()), 2, named)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.yaml"], "a refused command leaves nothing behind"


@pytest.mark.parametrize(
    "command", ["evaluate", "report", "score --out s.parquet", "predict --data d.jsonl --out p.jsonl"]
)
def test_bad_data_exits_3(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tsqlora: Run) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    name, *options = command.split()
    assert_refused(tsqlora(name, "empty", *options), 3, "empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize(("fails", "code"), [("first\nsecond", 1), (KeyboardInterrupt, 130)])
def test_what_was_not_foreseen_exits_1_and_an_interrupt_130(
    fails: Any, code: int, monkeypatch: pytest.MonkeyPatch, tsqlora: Run
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError(fails) if isinstance(fails, str) else fails

    monkeypatch.setattr("tsqlora.settings.load_config", broken)
    result, out, err = tsqlora("train", "c.yaml")
    assert (result, out, len(err.splitlines())) == (code, "", 1)
    assert "Traceback" not in err
    if code == 1:
        assert err == "error: RuntimeError: first; --debug shows where\n"
        assert "Traceback" in tsqlora("train", "c.yaml", "--debug")[2]


def test_what_an_error_quotes_is_no_markup_and_says_nothing_to_the_terminal(tsqlora: Run) -> None:
    assert r"[odd]\x1b.yaml" in tsqlora("train", "[odd]\x1b.yaml")[2]
    shown = console.harmless({"a\x1b": ["\x1b]0;owned\x07", ("two\nlines", 1)], "n": None})
    assert shown == {r"a\x1b": [r"\x1b]0;owned\x07", ["two\nlines", 1]], "n": None}


# --- results -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a checkpoint, rows, settings, a run, scores and an adapter that is not ours are."""
    from tsqlora.settings import load_config
    from tsqlora.training.command import train
    from tsqlora.training.score import score_rows

    folder = tmp_path_factory.mktemp("contract")
    plain = {"quality": {"enabled": False, "fraction": 0.5}, "ranks": {"policy": "fixed", "mean": 2.0}}
    train(load_config(set_up(folder, rows=60, **plain) / "c.yaml"), folder / "run")
    score_rows(folder / "run", folder / "scores.parquet")
    save_base(folder / "base", tiny_llama())
    save_lora(folder / "adapter", tiny_llama(), lora_config())
    (folder / "empty").mkdir()
    good = '{"text": "good", "label": "a"}\n'
    for name, content in {"blank": "", "half": good + '{"text": "bad"}\n', "broken": good + "{broken\n"}.items():
        (folder / f"{name}.jsonl").write_text(content)
    write_jsonl(folder / "one-class.jsonl", make_rows(20, labels=("a", "a")))
    write_jsonl(folder / "holes.jsonl", [{"text": "", "label": 0}, {"text": "good", "label": 1}] * 5)
    return folder


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ("init", "yaml"),
        ("init -o new.yaml", "out"),
        ("train c.yaml --out new", "run status seed metrics ranks rank_events cost versions plan data quality"),
        ("train --model model --data train.jsonl --set training.epochs=1 --set ranks.policy=fixed", "run status"),
        ("train c.yaml --dry-run", "steps rows passes classes"),
        ("audit c.yaml --out new", "out page suspects evident rate low high likely_wrong listed first pairs"),
        ("look train.jsonl --model model --out new", "look rows kept head model head_start"),
        ("score run --out new.parquet", "scores rows kept held_out"),
        ("explain scores.parquet", "highest lowest suspicious likely_wrong likely_wrong_rows"),
        ("explain scores.parquet --row 5", "id text label quality reason why"),
        ("select scores.parquet --fraction 0.5 --data train.jsonl --out new.jsonl", "out rows"),
        ("evaluate run --data train.jsonl", "accuracy macro_f1 matthews loss"),
        ("predict run --data train.jsonl --out new.csv", "out rows"),
        ("report run", "report bytes"),
        ("export adapter --format universal --base base --out new", "out format"),
        ("export adapter --format compressed --keep 0.5 --base base --out new", "out format truncation"),
        ("doctor adapter", "adapter"),
    ],
)
def test_json_is_one_object_on_stdout(
    arguments: str, keys: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tsqlora: Run
) -> None:
    monkeypatch.chdir(folder)
    for new in folder.glob("new*"):
        new.rename(new.with_name(f"old-{len(list(folder.iterdir()))}"))
    code, out, err = tsqlora(*arguments.split(), "--json")
    assert code == 0, err
    assert set(keys.split()) <= json.loads(out).keys()


# --- what is refused -----------------------------------------------------------------------


def tree(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Every path below, files with their size and time."""
    stats = {str(path): path.stat() for path in sorted(folder.rglob("*"))}
    return {name: None if Path(name).is_dir() else (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ("train c.yaml --set quality.enabled=true --set quality.gate=share --out OUT", 2, "quality.gate was removed"),
        (
            "train c.yaml --set quality.enabled=true --set quality.preset=paper --set quality.fraction=0.01 --out OUT",
            2,
            "",
        ),
        ("train c.yaml --set quality.fracton=0.5 --out OUT", 2, "did you mean 'fraction'?"),
        ("train c.yaml --set quality.fraction=0 --out OUT", 2, "quality.fraction is 0"),
        ("train c.yaml --set task.type=clasification --out OUT", 2, "did you mean"),
        ("train c.yaml --set data.max_length=1000 --out OUT", 2, "positions"),
        ("train c.yaml --set data.label=lable --out OUT", 3, "did you mean 'label'?"),
        ("train c.yaml --set data.train=none.csv --out OUT", 3, "none.csv"),
        ("train c.yaml --set data.train=blank.jsonl --out OUT", 3, "no rows"),
        ("train c.yaml --set data.train=half.jsonl --out OUT", 3, "no label in column 'label' (line 2)"),
        ("train c.yaml --set data.train=broken.jsonl --out OUT", 3, "broken.jsonl:2"),
        ("train c.yaml --set data.train=one-class.jsonl --out OUT", 3, ""),
        ("train c.yaml --set data.train=holes.jsonl --out OUT", 3, ""),
        ("train c.yaml --set data.label=text --set task.type=regression --out OUT", 3, ""),
        ("train c.yaml --set model.path=empty --out OUT", 2, "empty"),
        ("train c.yaml --set model.path=/no/such/model --out OUT", 2, "/no/such/model"),
        ("train c.yaml --set adapter.target_modules=[no] --out OUT", 2, ""),
        ("train c.yaml --set adapter.init_from=empty --out OUT", 3, "empty"),
        ("train c.yaml --set ranks.mean=0.1 --out OUT", 2, "ranks.mean"),
        ("train c.yaml --set ranks.policy=no --out OUT", 2, "tsqlora"),
        ("train c.yaml --set training.optim=no --out OUT", 2, ""),
        ("train c.yaml --set quality.fraction=0.001 --dry-run --set ranks.mean=0.1 --out OUT", 2, "ranks.mean"),
        ("train c.yaml --look empty --out OUT", 3, "empty"),
        ("look c.yaml --set data.train=none.csv --out OUT", 3, "none.csv"),
        ("look c.yaml --set data.train=holes.jsonl --out OUT", 3, ""),
        ("score c.yaml --out OUT.parquet", 2, "quality.enabled"),
        ("score scores.parquet --out OUT.parquet", 2, "tsqlora explain"),
        ("score train.jsonl --look empty --out OUT.parquet", 3, "empty"),
        ("score none.jsonl --look empty --out OUT.parquet", 3, "none.jsonl"),
        ("score c.yaml --set quality.enabled=true --set quality.gate=share --out OUT.parquet", 2, "quality.gate"),
        ("score c.yaml --set quality.enabled=true --set data.train=holes.jsonl --out OUT.parquet", 3, ""),
        ("score run --set data.train=one-class.csv --out OUT.parquet", 3, "one-class.csv"),
        ("predict run --data none.csv --out OUT.csv", 3, "none.csv"),
        ("predict run --data holes.jsonl --out OUT.txt", 2, ".txt"),
        ("predict empty --data holes.jsonl --out OUT.csv", 3, "empty"),
        ("select scores.parquet --fraction 2 --out OUT.csv", 2, "fraction"),
        ("select scores.parquet --fraction 0.5 --data holes.jsonl --out OUT.csv", 3, ""),
        ("select none.parquet --fraction 0.5 --out OUT.csv", 3, "none.parquet"),
        ("export adapter --format no --out OUT", 2, ""),
        ("export adapter --format merged --out OUT", 2, ""),
        ("export empty --format universal --out OUT", 3, ""),
        ("export adapter --format merged --base empty --out OUT", 2, ""),
        ("export adapter --format compressed --base base --keep 0 --out OUT", 2, ""),
        ("export adapter --format compressed --base base --out OUT", 2, ""),
        ("report empty --out OUT.html", 3, ""),
        ("compare c.yaml --methods lora --seeds 0 --out OUT", 2, "bench/harness.py"),
        ("report run --control run --out OUT.html", 2, "tsqlora report"),
        ("init -o OUT.yaml --task no", 2, ""),
        ("evaluate run --data none.csv", 3, ""),
        ("explain run --row 5", 3, ""),
        ("doctor empty", 3, ""),
    ],
)
@pytest.mark.parametrize("out", ["deep/er/out", "empty"])
def test_a_refused_command_leaves_the_file_system_as_it_was(
    out: str, arguments: str, code: int, named: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tsqlora: Run
) -> None:
    monkeypatch.chdir(folder)
    before = tree(folder)
    result, stdout, err = tsqlora(*arguments.replace("OUT", out).split())
    assert (result, stdout) == (code, ""), err
    assert "Traceback" not in err
    assert len(err.splitlines()[-1]) > 10
    assert named in err
    assert tree(folder) == before
