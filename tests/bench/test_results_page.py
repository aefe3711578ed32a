"""The cells that docs/research/glue.md shows, and its list of those that it leaves out."""

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))
glue: Any = importlib.import_module("glue")
results_page: Any = importlib.import_module("results_page")

SST2, MRPC, STSB = (glue.Block(task, 700, 0.2, 4) for task in ("sst2", "mrpc", "stsb"))
NOW = "c0ffee0"


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "glue"
    folder.mkdir()
    monkeypatch.setattr(glue, "RESULTS", folder)
    return folder


def a_cell(
    entry: str = "lora+all",
    points: float | None = 80.0,
    *,
    seed: int = 0,
    rate: float = 1e-3,
    commit: str = NOW,
    trainable: int = 169_730,
    loss: float = 0.5,
) -> Any:
    """Of None points, one that failed."""
    method, policy = entry.split("+")
    result: dict[str, Any] = {
        "cell": {"method": method, "policy": policy, "seed": seed, "learning_rate": rate},
        "commit": commit + 33 * "0",
        "cost": {"training": {"forward": 8000, "backward": 8000}},
        "seconds": 90.0,
        "steps": 504,
        "peak_memory_bytes": 1,
        "metrics": {},
    }
    if points is None:
        return result | {"failed": "the loss is not finite"}
    values = {"accuracy": points / 100, "spearman": points / 100, "loss": loss}
    return result | {"metrics": {"validation": values, "test": values}, "parameters": {"trainable": trainable}}


def put(folder: Path, block: Any, *cells: Any) -> None:
    about = {name: getattr(block, name) for name in ("task", "rows", "wrong", "mean", "metric")}
    named = {f"{n}": cell for n, cell in enumerate(cells)}
    (folder / f"{block.name}.json").write_text(json.dumps({"block": about, "settings": {}, "cells": named}))


def section(title: str) -> str:
    """Of the page, from the first heading that has the title to the next."""
    return results_page.page().partition(title)[2].partition("\n#")[0]


def row(of: str, name: str) -> list[str]:
    """The cells of a table's row, by its first."""
    [line] = [line for line in of.splitlines() if line.startswith(f"| {name}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_cells_that_chose_rates_are_no_results(results: Path) -> None:
    put(results, SST2, a_cell(), a_cell("eva+all", 99.0, seed=glue.CHOOSING))
    assert "99.0" not in results_page.page()


def test_over_tasks_is_the_mean_over_tasks_of_each_seed_over_seeds(results: Path) -> None:
    """Differences of 1 and 3 points, and of 2 and 6: two seeds of 2 and 4, not four values."""
    for block, gains in ((SST2, (1.0, 2.0)), (MRPC, (3.0, 6.0))):
        theirs = [a_cell(points=80.0, seed=seed) for seed in range(2)]
        put(results, block, *theirs, *(a_cell("eva+all", 80.0 + gains[seed], seed=seed) for seed in range(2)))
    assert "(SST-2, MRPC)" in _over()
    assert row(_over(), "`eva+all`")[1:3] == ["+3.0 ± 12.7 (2 seeds)", "+1.0"]


def test_the_page_begins_with_who_differs_from_lora_by_more_than_noise(results: Path) -> None:
    points = {"lora+random": (80.1, 84.0, 79.0), "tsqlora+quality": (81.0, 83.1, 80.9), "eva+all": (78.0, 79.0, 78.0)}
    theirs = [a_cell(points=p, seed=seed) for seed, p in enumerate((80.0, 82.0, 80.0))]
    put(results, SST2, *theirs, *(a_cell(e, p, seed=s) for e, of in points.items() for s, p in enumerate(of)))
    assert (
        "- *700 rows, 20% wrong labels, mean rank 4* (SST-2): **Better than `lora+all`**: `tsqlora+quality`. "
        "**Worse than `lora+all`**: `eva+all`. **Within noise of `lora+all`**: `lora+random`.\n"
    ) in results_page.page().partition("## ")[0]


def _over() -> str:
    return results_page.page().partition("## Over tasks")[2].partition("### 2,000 rows")[0]


def test_over_tasks_takes_seeds_that_have_all_tasks_that_both_sides_share(results: Path) -> None:
    put(results, SST2, *(a_cell(seed=s) for s in range(3)), *(a_cell("eva+all", 81.0, seed=s) for s in range(3)))
    put(results, MRPC, *(a_cell(seed=s) for s in range(2)), a_cell("eva+all", 85.0, seed=1))
    put(results, STSB, a_cell())
    assert row(_over(), "`eva+all`")[1:3] == ["+3.0 (1 seed)", "+1.0"]


def test_over_tasks_says_nothing_where_no_seed_has_all_tasks(results: Path) -> None:
    put(results, SST2, a_cell(seed=0), a_cell("eva+all", seed=0))
    put(results, MRPC, a_cell(seed=1), a_cell("eva+all", seed=1))
    assert row(_over(), "`eva+all`")[1:3] == ["–", "–"]


@pytest.mark.parametrize(
    ("quality", "random"),
    [
        ({"random": "no row was left out, and rows are drawn evenly", "scored": True}, True),
        ({"random": None, "scored": True, "noise": {"evident": True, "offsets": [0.0, 0.0]}}, False),
        ({"rows": 2000, "rows_an_epoch": 1000}, False),  # nothing was to be scored
    ],
)
def test_cells_that_drew_at_random_all_the_same_are_counted(results: Path, quality: Any, random: bool) -> None:
    put(results, SST2, a_cell(), a_cell("tsqlora+quality") | {"quality": quality})
    name = "`tsqlora+quality`" + (", 1 of 1 drew at random" if random else "")
    assert row(section("### SST-2, 700 rows"), "`tsqlora+quality`")[0] == name
    assert row(_over(), "`tsqlora+quality`")[0] == name


def test_trainable_is_a_range_where_seeds_differ(results: Path) -> None:
    put(results, SST2, a_cell(), a_cell("eva+all", trainable=84_865), a_cell("eva+all", seed=1, trainable=339_460))
    assert row(_over(), "`lora+all`")[-1] == "1.00"
    assert row(_over(), "`eva+all`")[-1] == "0.50 to 2.00"


def test_an_entry_of_which_every_seed_failed_stands_in_the_tables(results: Path) -> None:
    put(results, SST2, a_cell(), a_cell("eva+all", None), a_cell("eva+all", None, seed=1))
    assert row(section("### SST-2, 700 rows"), "`eva+all`")[1:5] == ["–", "–", "–", ""]
    assert row(_over(), "`eva+all`")[:2] == ["`eva+all`, 2 cells failed", "–"]


def test_differences_are_from_lora_on_all_rows_or_from_nothing(results: Path) -> None:
    """Not from a random half, where all rows are missing."""
    put(results, SST2, a_cell("lora+random"), a_cell("eva+all"))
    shown = section("### SST-2, 700 rows")
    assert row(shown, "`lora+random`")[2] == "–"
    assert "\n| `lora+all`" not in shown


def test_the_loss_is_told_beside_the_metric(results: Path) -> None:
    """A third more on one task and none on the other: a sixth more."""
    put(results, SST2, a_cell(loss=0.6), a_cell("eva+all", loss=0.8))
    put(results, MRPC, a_cell(loss=0.5), a_cell("eva+all", loss=0.5))
    assert row(section("### SST-2, 700 rows"), "`eva+all`")[3] == "0.800"
    assert row(_over(), "`eva+all`")[-2] == "+16.7 % (1 seed)"


def test_pools_of_any_number_of_parts_are_rows_of_one_table() -> None:
    own = {"parts": 100, "sample": 10, "drawn": 3, "processor_seconds": {"look": 2.0}, "bytes_before": 1}
    results = {f"parts-{rows}": {"found": own | {"rows": rows, "peak_bytes": rows}} for rows in (10**6, 10**5)}
    # By its path, since tests/ has a module of this name.
    tables = runpy.run_path(str(Path(results_page.__file__).with_name("tables.py")))
    assert [row["rows"] for row in tables["scale_parts"](results)] == ["100,000", "1,000,000"]
