"""The library's contract: the public names, the calls that the documentation shows, and what they return."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import tsqlora as tsq
from scoring import logits_of
from stock import base_bert, make_trainer, moods
from tsqlora import paper
from tsqlora.moved import MOVED

CALLS = {
    "train": [{"config": "tsq.yaml"}, {"model": {"path": "m"}, "data": {"train": "f"}, "out": "run", "resume": True}],
    "wrap": [
        {"model": 0, "mean_rank": 8},
        {"model": 0, "mean_rank": 8, "alpha": 16.0, "dropout": 0.1, "target_modules": ["query"]},
    ],
    "QualitySubset": [{"dataset": [], "fraction": 0.5, "seed": 0}],
    "QualityCallback": [{"data": 0}],
    "attach": [{"trainer": 0, "fraction": 0.5, "trusted": []}],
    "audit_of": [{"features": [], "labels": []}, {"features": [], "labels": [], "classes": ["no", "yes"]}],
    "apply": [{"model": 0, "look": "LOOK", "batch": {}}],
    "look": [{"model": 0, "dataset": [], "collate": 0, "out": "LOOK"}],
    "last_checkpoint": [{"folder": "out"}],
    "report": [{"directory": "out"}, {"directory": "out", "texts": []}],
}
"""Calls that users have written, by the names of their arguments."""
PAPER: dict[str, list[dict[str, Any]]] = {
    "wrap": [{"model": 0, "mean_rank": 8, "max_rank": 16, "alpha": 16.0, "target_modules": ["query"]}],
    "RankCallback": [{"interval": 50}],
    "RankLoop": [{"model": 0, "optimizer": 0, "total_steps": 100}],
    "score": [{"model": 0, "dataset": [], "collate": 0}],
    "sample": [{"scores": 0, "fraction": 0.5, "seed": 0}],
    "sensitivity": [{"model": 0, "dataset": [], "collate": 0}],
    "allocate": [{"sensitivity": 0, "mean_rank": 8, "min_rank": 1, "max_rank": 16}],
    "active_ranks": [{"model": 0}],
    "active_parameters": [{"model": 0}],
    "finalize": [{"model": 0}],
}
EXIT_CODES = {"TsqLoraError": 1, "SettingsError": 2, "UnsupportedError": 2, "DataError": 3}
VALUES = ["paper"]


def test_the_public_names_are_there_and_listed() -> None:
    assert {*CALLS, *EXIT_CODES, *VALUES} <= set(tsq.__all__)
    homes = [name for names in tsq._HOMES.values() for name in names]
    assert tsq.__all__ == sorted(tsq.__all__) == sorted(["paper", *homes])
    assert dir(tsq) == tsq.__all__
    for name in tsq.__all__:
        assert getattr(tsq, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = tsq.nothing


def test_names_of_the_published_method_are_in_its_wing() -> None:
    moved = {name for name, now in MOVED["names"].items() if now == f"use tsqlora.paper.{name}"}
    assert {"wrap", *moved} == {*paper.__all__}
    for name in paper.__all__:
        assert getattr(paper, name).__name__ == name
    for name in moved:
        with pytest.raises(AttributeError, match=rf"use tsqlora\.paper\.{name}"):
            getattr(tsq, name)


@pytest.mark.parametrize(("home", "name"), [*((tsq, name) for name in CALLS), *((paper, name) for name in PAPER)])
def test_a_call_of_the_documentation_is_accepted(home: Any, name: str) -> None:
    for arguments in (CALLS if home is tsq else PAPER)[name]:
        inspect.signature(getattr(home, name)).bind(**arguments)


def test_what_may_be_given_by_place() -> None:
    for name, count in (("wrap", 1), ("QualitySubset", 1), ("QualityCallback", 1)):
        inspect.signature(getattr(tsq, name)).bind(*range(count))
    for name in ("RankLoop", "score", "sensitivity"):
        inspect.signature(getattr(paper, name)).bind(*range(3))


@pytest.mark.parametrize(
    ("function", "call"),
    [
        (tsq.audit, r"audit\(model, dataset, collate\)"),
        (paper.score, r"score\(model, dataset, collate\)"),
        (tsq.select, r"select\(model, dataset, processing_class\)"),
        (paper.sensitivity, r"sensitivity\(model, dataset, collate\)"),
    ],
)
def test_a_path_in_place_of_the_model_names_the_arguments(function: Any, call: str) -> None:
    for path in ("a.csv", Path("a.csv")):
        with pytest.raises(tsq.SettingsError, match=f"'a.csv'; call {call}"):
            function(path)


@pytest.mark.parametrize("name", EXIT_CODES)
def test_every_error_is_one_of_ours_with_its_exit_code(name: str) -> None:
    error = getattr(tsq, name)
    assert issubclass(error, tsq.TsqLoraError)
    assert error.exit_code == EXIT_CODES[name]


def test_a_submodule_of_the_same_name_does_not_hide_a_function() -> None:
    code = "import tsqlora.training.report, tsqlora as t"
    subprocess.run([sys.executable, "-c", f"{code}; assert callable(t.report)"], check=True)


def test_the_main_job_in_a_stock_trainer(tmp_path: Path) -> None:
    """wrap, QualitySubset and both callbacks; the adapter loads in plain PEFT with the same logits."""
    torch.manual_seed(0)
    model = tsq.wrap(base_bert(), mean_rank=4)
    assert isinstance(model, PeftModel)
    rows = moods()
    data = tsq.QualitySubset(rows, fraction=0.5, seed=0)
    ranks = paper.RankCallback(interval=2)
    make_trainer(model, data, tmp_path, [tsq.QualityCallback(data), ranks], num_train_epochs=8).train()
    assert len(data) == len(rows) // 2
    assert isinstance(data.scores, paper.Scores)
    assert all(isinstance(event, paper.RankEvent) for event in ranks.events)
    assert any(event.moved for event in ranks.events)
    shown = tsq.report(tmp_path)
    assert shown.path == tmp_path / "report.html"
    assert shown._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html')
    model.save_pretrained(str(tmp_path / "adapter"))
    plain = PeftModel.from_pretrained(base_bert(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(plain, rows), logits_of(model, rows), rtol=1e-5, atol=1e-6)
