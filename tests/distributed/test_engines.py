"""FSDP2 and DeepSpeed train as DDP does, with a look from a folder; what they cannot do is refused by its name.

Two processes on CPU over gloo. FSDP2 is accelerate's, patched as engines.py says; DeepSpeed is tested where it is
installed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from runs import set_up
from stock import base_bert
from training.test_question import ROWS
from tsqlora.adapter.files import read_adapter
from tsqlora.adapter.health import nonfinite
from tsqlora.paper.slots import has_slots
from tsqlora.record import RunRecord
from tsqlora.settings import load_config
from tsqlora.training.look import look_at

SCRIPT = Path(__file__).with_name("engines.py")
DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
SHARDED = ["fsdp", pytest.param("zero2", marks=DEEPSPEED), pytest.param("zero3", marks=DEEPSPEED)]
ENGINES = ["fsdp-ram", *SHARDED]
EVERYTHING = "all,packed,command,packed command"
DONE = {"fsdp-ram": "all,packed", "loaded": "all"}
"""What some engines do, where it is not everything."""


def launched(engine: str, folder: Path, what: str, *, ends: bool = True) -> None:
    """Run engines.py in two processes, or in one for the look."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *(() if what == "look" else start), str(SCRIPT), engine, str(folder), what]
    tests = f"{SCRIPT.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": tests}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert (done.returncode == 0) == ends, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("engines")
    training = {"batch_size": 4, "epochs": 2, "bf16": False, "learning_rate": 0.01}
    set_up(place, training=training)
    look_at(load_config(place / "c.yaml"), place / "SETTINGS")
    launched("look", place, "look")
    return place


@pytest.fixture(scope="module")
def of(folder: Path) -> Any:
    """What an engine has done; all that ends without a crash is done by one launch."""

    def result(engine: str, what: str = "all", rank: int = 0) -> Any:
        path = folder / f"{engine}-{what}-{rank}.pt"
        if not path.exists():
            launched(engine, folder, "resumed" if what == "resumed" else DONE.get(engine, EVERYTHING))
        return torch.load(path, weights_only=False)

    return result


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_are_those_of_ddp_and_weights_are_in_parts(engine: str, of: Any) -> None:
    ours, ddp = of(engine)["train"], of("ddp")["train"]
    np.testing.assert_allclose(ours["losses"], ddp["losses"], rtol=1e-5, atol=1e-6)
    assert ours["drawn"] == ddp["drawn"] == of(engine, rank=1)["train"]["drawn"]
    assert ours["engine"] != ddp["engine"]
    assert ours["parts"] or engine == "zero2"  # whose weights are whole


@pytest.mark.parametrize("engine", ENGINES)
def test_plain_peft_loads_what_is_saved_and_it_is_that_of_ddp(engine: str, of: Any, folder: Path) -> None:
    of(engine)
    ours, ddp = (load_file(folder / f"{e}-train-adapter" / "adapter_model.safetensors") for e in (engine, "ddp"))
    assert ours.keys() == ddp.keys()
    for name, tensor in ddp.items():
        assert tensor.abs().max() > 0
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)
    assert nonfinite(read_adapter(folder / f"{engine}-train-adapter")) == {}
    PeftModel.from_pretrained(base_bert(), str(folder / f"{engine}-train-adapter"))


@pytest.mark.parametrize("engine", SHARDED)
def test_a_resumed_run_has_the_losses_of_one_that_was_not_cut_off(engine: str, of: Any) -> None:
    whole, resumed = of(engine)["train"]["losses"], of(engine)["resumed"]["losses"]
    np.testing.assert_allclose(resumed, whole[len(whole) - len(resumed) :], rtol=1e-6)
    assert 0 < len(resumed) < len(whole)


@pytest.mark.parametrize("engine", ["ddp", *SHARDED])
def test_the_pool_is_asked_once_and_rows_that_it_contradicts_are_trained_on_alone(engine: str, of: Any) -> None:
    ours, ddp = of(engine)["questioned"], of("ddp")["questioned"]
    np.testing.assert_allclose(ours["losses"], ddp["losses"], rtol=1e-5, atol=1e-6)
    question, resumed = ours["question"], of(engine)["answered"]
    assert question["contradicted"]
    assert question == pytest.approx(ddp["question"], rel=1e-4)
    for rank in (0, 1):
        whole, answered = of(engine, rank=rank)["questioned"], of(engine, rank=rank)["answered"]
        assert whole["question"] == answered["question"] == question
        assert list(whole["steps"]) == [*range(20)]
        assert {step for step, rows in whole["steps"].items() if min(rows) >= ROWS} == {*range(14, 20)}
        assert max(row for step in range(14) for row in whole["steps"][step]) < ROWS
        assert answered["steps"] == {step: whole["steps"][step] for step in range(18, 20)}  # engines.py has the place
    assert question["step"] < question["from_step"] == 15
    for name, tensor in ours["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], tensor, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize(
    ("what", "message"), [("no look", "tsqlora look CONFIG --out LOOK"), ("late", "callback.write_head(trainer.model)")]
)
def test_what_would_be_lost_is_refused_with_the_line_to_write(what: str, message: str, engine: str, of: Any) -> None:
    for rank in (0, 1):
        refusal = of(engine, rank=rank)[what]
        assert refusal.startswith("UnsupportedError")
        assert message in refusal


@pytest.mark.parametrize("what", ["look", "no look", "late", "ranks", "taken"])
def test_a_model_that_transformers_shards_while_loading_is_refused_by_name(what: str, of: Any) -> None:
    for rank in (0, 1):
        refusal = of("loaded", rank=rank)[what]
        assert refusal.startswith("UnsupportedError")
        assert "distributed_config" in refusal
        assert "--use_fsdp --fsdp_version 2" in refusal


def test_ranks_move_under_fsdp_as_under_ddp_and_slots_stay(of: Any, folder: Path) -> None:
    ours, ddp = of("fsdp")["ranks"], of("ddp")["ranks"]
    np.testing.assert_allclose(ours["losses"], ddp["losses"], rtol=1e-4, atol=1e-5)
    assert any("slots" in note for note in ours["notes"])
    assert any("resume" in note for note in ours["notes"])
    plain = PeftModel.from_pretrained(base_bert(), str(folder / "fsdp-ranks-adapter"))
    assert not has_slots(plain)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("fsdp-ram", "cpu_ram_efficient_loading"),
        pytest.param("zero2", "ranks.policy: fixed", marks=DEEPSPEED),
        pytest.param("zero3", "ranks.policy: fixed", marks=DEEPSPEED),
    ],
)
def test_ranks_that_cannot_move_are_refused_with_the_cure(engine: str, message: str, of: Any) -> None:
    refusal = of(engine)["ranks"]
    assert refusal.startswith("UnsupportedError")
    assert message in refusal


@pytest.mark.parametrize("engine", SHARDED)
def test_a_killed_process_ends_all_and_the_rest_is_resumed(engine: str, of: Any, folder: Path) -> None:
    launched(engine, folder, "killed", ends=False)
    whole, resumed = of(engine)["train"]["losses"], of(engine, "resumed")["losses"]
    np.testing.assert_allclose(resumed, whole[-len(resumed) :], rtol=1e-6)


@pytest.mark.parametrize("engine", SHARDED)
def test_a_step_that_is_not_finite_is_undone_or_a_note_says_that_it_is_not(engine: str, of: Any, folder: Path) -> None:
    ours, ddp = of(engine)["poisoned"], of("ddp")["poisoned"]
    saved = read_adapter(folder / f"{engine}-poisoned-adapter")
    if engine.startswith("zero"):
        assert any("not finite" in note for note in ours["notes"])
        return
    np.testing.assert_allclose(ours["losses"], ddp["losses"], rtol=1e-5, atol=1e-6)
    assert ours["skipped"] == ddp["skipped"] == [5]  # engines.py has the place
    assert nonfinite(saved) == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_base_in_four_bits_is_trained_as_under_ddp(engine: str, of: Any, folder: Path) -> None:
    ours, ddp = of(engine, "packed"), of("ddp", "packed")
    assert ours["losses"] != of("ddp")["train"]["losses"]
    np.testing.assert_allclose(ours["losses"], ddp["losses"], rtol=1e-5, atol=1e-6)
    saved, theirs = (load_file(folder / f"{e}-packed-adapter" / "adapter_model.safetensors") for e in (engine, "ddp"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=1e-6)
    PeftModel.from_pretrained(base_bert(), str(folder / f"{engine}-packed-adapter"))


@pytest.mark.parametrize("what", ["command", "packed command"])
@pytest.mark.parametrize("engine", ["ddp", *SHARDED])
def test_the_command_trains_saves_and_measures(engine: str, what: str, of: Any) -> None:
    ours, ddp = (RunRecord.load(Path(of(e, what))) for e in (engine, "ddp"))
    assert ours.status == "finished"
    assert ours.metrics["validation"]["loss"] == pytest.approx(ddp.metrics["validation"]["loss"], rel=1e-4)
    assert ours.metrics["validation"]["accuracy"] == ddp.metrics["validation"]["accuracy"]
