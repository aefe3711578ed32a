"""examples/ray_data.py: its actor says what `tsqlora score --look` says, and Ray Data runs it where it is installed."""

import json
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import make_rows, set_up, write_jsonl
from tsqlora.auditing.draw.select import select_rows
from tsqlora.auditing.scores import Scores
from tsqlora.settings import load_config
from tsqlora.training.look import look_at, score_by_look

SCRIPT = Path(__file__).parents[2] / "examples" / "ray_data.py"
ROWS = [*make_rows(39, seed=10), {**make_rows(1, seed=11)[0], "label": 9}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    set_up(folder)
    look_at(load_config(folder / "c.yaml"), folder / "LOOK")
    (folder / "rows").mkdir()
    write_jsonl(folder / "rows" / "0.jsonl", ROWS)
    return folder


def drawn(parts: Path, place: Path) -> list[dict[str, Any]]:
    select_rows(parts, place / "subset.jsonl", fraction=0.5)
    return [json.loads(line) for line in (place / "subset.jsonl").read_text().splitlines()]


def test_its_actor_says_what_the_command_says(place: Path) -> None:
    spec = spec_from_file_location("ray_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    score = module.Score(str(place / "LOOK"))
    rows = {name: np.array([row[name] for row in ROWS]) for name in ROWS[0]}
    columns = score(rows)
    score_by_look(str(place / "rows" / "0.jsonl"), place / "LOOK", place / "0.parquet")
    scores = Scores.load(place / "0.parquet")
    np.testing.assert_allclose(columns["loss"], scores.terms["loss"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(columns["predicted"], scores.predictions["predicted"])
    assert columns["reason"][-1] == "unseen class"
    assert columns["text"].tolist() == [row["text"] for row in ROWS]


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_ray_data_runs_it_and_select_reads_its_parts(place: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), "LOOK", "rows", "parts"], cwd=place, check=True, timeout=300)
    rows = drawn(place / "parts", place)
    assert len({row["text"] for row in rows}) == 20
    assert 9 not in [row["label"] for row in rows]
