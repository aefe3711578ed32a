"""Out of memory: the same work in smaller parts."""

import json
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertModel

import tsqlora as tsq
from models import collate, lora, samples, tiny_bert
from runs import set_up
from scoring import score_by, teach
from tsqlora.model.oom import BatchSplitter, even_parts, halves, is_out_of_memory, retry_on_oom
from tsqlora.model.request import Compute
from tsqlora.settings import Config, load_config
from tsqlora.tasks import get_task
from tsqlora.training import command as pipeline
from tsqlora.training.predict import predict_logits

NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError(f"[enforce fail at alloc_cpu.cpp:117] data. {NO_MEMORY}"), True),
        (RuntimeError("could not create a memory object"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory."), False),
    ],
)
def test_memory_errors_are_distinguished_from_others(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_real_allocation_that_cannot_be_is_such_an_error() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@given(st.integers(1, 200))
def test_parts_are_even_and_end_at_one_row(rows: int) -> None:
    parts = even_parts(rows)
    assert (parts[0], parts[-1]) == (rows, 1)
    for larger, smaller in pairwise(parts):
        assert smaller <= larger // 2
        assert rows % smaller == 0


@given(st.integers(1, 40), st.integers(1, 40))
def test_portions_give_every_row_once_in_order_and_remember_what_fits(rows: int, most: int) -> None:
    portions, tried = BatchSplitter(), []

    def work(part: np.ndarray) -> list[int]:
        tried.append(len(part))
        if len(part) > most:
            raise MemoryError
        return part.tolist()

    for _ in range(2):
        tried.clear()
        result = portions.of(np.arange(rows), work)
        assert [row for part in result for row in part] == list(range(rows))
    assert max(tried) <= most, "what did not fit is not tried again"
    assert 2 * max(tried) + 1 >= min(rows, most), "no less is tried than must be"


def test_one_row_that_does_not_fit_is_an_error_with_advice() -> None:
    def work(size: int) -> None:
        raise MemoryError(f"{size} rows")

    with pytest.raises(tsq.TsqLoraError, match=r"\(1 rows\).*data\.max_length"):
        retry_on_oom(work, halves(8))


def test_other_errors_are_not_tried_again() -> None:
    tried: list[int] = []

    def work(size: int) -> None:
        tried.append(size)
        raise ValueError("shape")

    with pytest.raises(ValueError, match="shape"):
        retry_on_oom(work, halves(8))
    assert tried == [8]


class Limit:
    """A BERT whose passes over more than so many rows fail, from the n-th on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int, first: int = 1) -> None:
        self.passes = 0
        self.sizes: list[int] = []
        forward, limit = BertModel.forward, self

        def limited(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
            limit.passes += 1
            if limit.passes >= first and len(input_ids) > rows:
                raise RuntimeError(NO_MEMORY)
            limit.sizes.append(len(input_ids))
            return forward(self, input_ids, **kwargs)

        monkeypatch.setattr(BertModel, "forward", limited)


# -------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("terms", [(), ("gradient_norm", "loss_reduction", "convergence")])
@pytest.mark.parametrize("first", [1, 4])
def test_rows_are_scored_in_parts_as_they_are_in_one(
    terms: tuple[str, ...], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = lora(tiny_bert(layers=1)), samples(24, 3)
    teach(model, rows)
    options: dict[str, Any] = {"reference": list(range(16)), "batch_size": 8, "terms": terms}
    whole = score_by(model, rows, collate, **options)
    limit = Limit(monkeypatch, rows=3, first=first)
    parts = score_by(model, rows, collate, **options)
    assert max(limit.sizes[first:]) <= 3
    for name, values in whole.terms.items():
        np.testing.assert_allclose(parts.terms[name], values, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(parts.kept, whole.kept)


def test_logits_of_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = lora(tiny_bert(layers=1)), samples(20, 3)

    def unlabelled(batch: Any) -> dict[str, torch.Tensor]:
        made = collate([row | {"labels": 0} for row in batch])
        return {name: value for name, value in made.items() if name != "labels"}

    whole = predict_logits(model, rows, unlabelled, task=get_task("sequence-classification"), compute=Compute(8))
    Limit(monkeypatch, rows=2)
    np.testing.assert_allclose(
        predict_logits(model, rows, unlabelled, task=get_task("sequence-classification"), compute=Compute(8)),
        whole,
        rtol=1e-9,
    )


# ------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config(set_up(tmp_path_factory.mktemp("memory"), rows=60) / "c.yaml")


def newest_state(run: Path) -> dict[str, Any]:
    newest = max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return json.loads((newest / "trainer_state.json").read_text())


@pytest.mark.parametrize("first", [1, 12])
def test_a_batch_is_trained_on_in_parts_with_the_same_steps(
    first: int, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is a checkpoint, and behind the first; as a run that had parts of this size from there on."""
    with monkeypatch.context() as patch:
        Limit(patch, rows=2, first=first)
        with pytest.warns(UserWarning, match="memory does not suffice for 8 rows at once"):
            record = pipeline.train(config, tmp_path / "run")
    assert "in 4 parts of 2" in record.notes[0]
    state = newest_state(tmp_path / "run")
    assert (state["stateful_callbacks"]["tsqlora"]["rows"], state["global_step"]) == (2, record.plan["steps"])
    assert record.plan["steps"] == 24
    assert record.status == "finished"
    if first == 1:
        monkeypatch.setattr(pipeline, "even_parts", lambda rows: [2])
        Limit(monkeypatch, rows=2, first=first)  # the look's batches are split, too
        small = pipeline.train(config, tmp_path / "small")
        assert small.rank_events == record.rank_events
        adapters = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("run", "small")]
        assert adapters[0] == adapters[1]


def test_a_resumed_run_begins_with_what_sufficed(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("tsqlora.training.command.measure", stopped)
        Limit(patch, rows=4)
        with pytest.raises(KeyboardInterrupt):
            pipeline.train(config, tmp_path / "run")
    record = pipeline.train(config, tmp_path / "run", resume=True)
    assert "in 2 parts of 4" in record.notes[0]


def test_several_processes_are_told_what_to_change(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait in the middle of a step, which cannot be made again in one of them."""
    monkeypatch.setattr(pipeline.distributed, "launched", lambda: 2)

    def work(*_: Any, **__: Any) -> Any:
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(pipeline, "load", work)
    with pytest.raises(
        tsq.TsqLoraError,
        match=r"^memory does not suffice for 8 rows in each of 2 processes; halve training\.batch_size, double "
        r"training\.gradient_accumulation_steps, and use another --out$",
    ):
        pipeline.train(config, tmp_path / "run")
