"""`tsqlora compare` as scripts see it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tsqlora.compare.methods import entries
from tsqlora.compare.table import show_comparison

Run = Callable[..., tuple[int, str, str]]


def test_one_json_object_is_printed_and_progress_goes_elsewhere(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    arguments = (place / "c.yaml", "--methods", "lora, lora+random", "--seeds", "3", "--out", tmp_path / "o", "--json")
    code, out, err = tsqlora("compare", *arguments)
    assert code == 0, err
    told = json.loads(out)
    assert [row["name"] for row in told["table"]] == ["lora+all", "lora+random"]
    assert told["table"][1]["verdict"] == "1 seed: too few to tell from lora+all"
    assert told["table"][0]["split"] == "validation"
    assert "1/2 lora+all_seed3_lr0.02: validation accuracy" in err
    assert "Loading weights" not in err


def test_the_head_start_alone_is_a_policy_that_help_names(tsqlora: Run) -> None:
    assert [entry.name for entry in entries(["lora+head"])] == ["lora+head"]
    assert "lora+head" in tsqlora("compare", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "loar"], "did you mean 'lora'?"),
        (["--methods", "lora", "--seeds", "x"], "--seeds: 'x' is not a number"),
        (["--methods", "lora", "--lr-sweep", "1e-3,y"], "--lr-sweep: 'y' is not a number"),
        (["--methods", "lora", "--lr", "lora"], "--lr lora: '' is not a number"),
        (["--methods", "lora", "--lr", "lora=1e-3", "--lr", "lora=2e-3"], "--lr lora is given twice"),
        (["--methods", "lora", "--equal", "fun"], "--equal 'fun' is unknown"),
    ],
)
def test_wrong_usage_exits_2_with_the_cure(
    arguments: list[str], message: str, place: Path, tmp_path: Path, tsqlora: Run
) -> None:
    code, out, err = tsqlora("compare", place / "c.yaml", *arguments, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_the_table_fits_a_terminal_of_80_columns_and_shows_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    number = {"mean": 0.8, "half": 0.01, "n": 3}
    cost = {"seconds": number, "steps": 100, "trainable": 12345, "peak_memory_bytes": 2**30, "split": "test"}
    worked = {"name": "lora+all", "failed": [], "metrics": {"accuracy": number}, "verdict": "the reference", **cost}
    partly = worked | {
        "name": "dora+all",
        "failed": [2],
        "seeds": [0, 1],
        "trainable_mean": 12345.5,
        "trainable_range": [12341, 12350],
        "random": [1],
        "difference": number,
    }
    partly |= {"verdict": "better than lora+all"}
    failed = {"name": "full+all", "failed": [0, 1, 2], "verdict": "every seed failed"}
    table = [worked, partly, failed]
    result = {"metric": "accuracy", "equal": "steps", "seeds": [0, 1, 2], "out": "comparison", "table": table}
    show_comparison(Console(width=80), result)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for words in ("0.8000 ± 0.0100", "+0.8000 ± 0.0100", "every seed failed", "12,345", "1,024"):
        assert words in out
    show_comparison(Console(width=200), result)
    out = capsys.readouterr().out
    assert "dora+all (1 failed; 1 of 2 seeds drew at random)" in out
    assert "12,346 (12,341 to 12,350)" in out
    assert "different code" not in out
    assert "data.test" not in out


def test_numbers_that_chose_themselves_and_cells_of_several_codes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    number = {"mean": 0.8, "half": None, "n": 1}
    cost = {"seconds": number, "steps": 100, "trainable": 12345, "peak_memory_bytes": 2**30, "split": "validation"}
    row = {"name": "lora+all", "failed": [], "metrics": {"accuracy": number}, "verdict": "the reference", **cost}
    result = {"metric": "accuracy", "equal": "steps", "seeds": [0], "out": "comparison", "table": [row]}
    about = {"sweep": [1e-3, 1e-2], "differing": {"commit": ["a" * 40, "b" * 40 + "-dirty"], "torch": ["2.8", "2.9"]}}
    show_comparison(Console(width=200), result | about)
    out = capsys.readouterr().out
    assert "There are no test rows: the numbers of the first seed are of the validation rows that chose its rate" in out
    assert f"not made alike: commit {'a' * 12}, {'b' * 12}-dirty; another --out makes all anew" in out
    assert "not made alike: torch 2.8, 2.9;" in out
