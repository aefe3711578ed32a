"""A call that a step misses is named before optimizer.step(), and an ended loop leaves nothing behind."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import tsqlora as tsq
from loops import PERIOD, STEPS, adamw, batch, begin, certain, one_step, several_steps, weights
from scoring import assert_same
from slotted import trained
from stock import slotted_bert
from tsqlora import paper


def forward(ranks: paper.RankLoop) -> None:
    ranks.model(**batch(0)).loss.backward()


def step(ranks: paper.RankLoop) -> None:
    ranks.optimizer.step()


Loop = paper.RankLoop
NO_BEFORE = r"before_optimizer_step\(\) is missing in step 1: call it when the step's gradients are complete, before"
NO_AFTER = r"after_optimizer_step\(\) is missing in step 1: call it after optimizer\.step\(\)"
NO_FORWARD = r"before_forward\(\) is missing in step 1: call it before the step's first forward pass"


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        ([forward, step], NO_FORWARD),
        ([forward, Loop.before_optimizer_step], NO_FORWARD),
        ([Loop.after_optimizer_step], NO_FORWARD),
        ([Loop.before_forward, forward, step], NO_BEFORE),
        ([Loop.before_forward, forward, Loop.after_optimizer_step], NO_BEFORE),
        ([Loop.before_forward, forward, Loop.before_optimizer_step, step, Loop.before_forward], NO_AFTER),
        ([Loop.before_forward, forward, Loop.before_optimizer_step, step, Loop.finish], NO_AFTER),
        ([Loop.before_forward, forward, Loop.before_optimizer_step, step, forward, step], NO_AFTER),
    ],
)
def test_a_missing_call_is_named_with_its_place(calls: list[Callable[[paper.RankLoop], Any]], text: str) -> None:
    ranks = begin()
    *before, last = calls
    for call in before:
        call(ranks)
    retained = weights(ranks.model)
    with pytest.raises(tsq.TsqLoraError, match=text):
        last(ranks)
    assert_same(retained, weights(ranks.model), "nothing was stepped")
    ranks.close()


def test_a_step_without_gradients_needs_no_calls() -> None:
    """As torch.distributed.checkpoint makes one, so that an optimizer's state is there to be loaded."""
    ranks = begin()
    get_optimizer_state_dict(ranks.model, ranks.optimizer)
    assert ranks.optimizer.state
    several_steps(ranks, range(4))
    ranks.finish()


class Nested(torch.optim.AdamW):
    """As many optimizers are made; torch then calls a step's hooks twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", ["nested", "scheduled", "averaged"])
def test_whatever_wraps_an_optimizers_step_misses_no_call(kind: str) -> None:
    model = certain(slotted_bert())
    optimizer = (Nested if kind == "nested" else torch.optim.AdamW)(trained(model), lr=0.05, weight_decay=0.0)
    ranks = paper.RankLoop(model, optimizer, STEPS, **PERIOD)
    also: list[Callable[[], Any]] = []
    if kind == "scheduled":
        also.append(torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0).step)
    if kind == "averaged":
        average = torch.optim.swa_utils.AveragedModel(model)
        also += [lambda: average.update_parameters(model), torch.optim.swa_utils.SWALR(optimizer, 0.05, 1).step]
    for number in range(4):
        one_step(ranks, number)
        for call in also:
            call()
    assert [event.step for event in ranks.events] == [4]
    forward(ranks)
    with pytest.raises(tsq.TsqLoraError, match=r"before_forward\(\) is missing in step 5.*close"):
        ranks.optimizer.step()
    ranks.close()


@pytest.mark.parametrize(("end", "wrapped"), [("finish", False), ("close", True), (None, True)])
def test_a_loop_that_has_ended_leaves_nothing_behind_also_inside_a_measured_step(
    end: str | None, wrapped: bool
) -> None:
    model, limit = certain(slotted_bert()), torch._dynamo.config.recompile_limit
    inner = optimizer = adamw(model)
    if wrapped:
        optimizer = accelerate.Accelerator(cpu=True).prepare_optimizer(inner)
    ranks = paper.RankLoop(model, optimizer, STEPS, 1, schedule=paper.RankSchedule(moves=6, warmup=0, freeze=0))
    assert torch._dynamo.config.recompile_limit > limit
    forward(ranks)
    with pytest.raises(tsq.TsqLoraError, match=NO_FORWARD):
        optimizer.step()
    optimizer.zero_grad()
    several_steps(ranks, range(2))
    ranks.before_forward()
    forward(ranks)
    assert any(module._forward_hooks for module in model.modules())
    if end is None:
        del ranks
        gc.collect()
    else:
        getattr(ranks, end)()
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch._dynamo.config.recompile_limit == limit


def test_an_optimizer_that_tells_of_no_steps_is_refused() -> None:
    class Around(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.param_groups = inner.param_groups

    model = slotted_bert()
    with pytest.raises(tsq.UnsupportedError, match=r"the optimizer Around .*Optimizer\.__init__.*that it wraps"):
        paper.RankLoop(model, Around(adamw(model)), STEPS)


def test_a_script_that_fails_in_a_measured_step_tells_its_own_error_last() -> None:
    code = """
from stock import *
model = slotted_bert()
ranks = paper.RankLoop(model, torch.optim.AdamW(model.parameters()), 30, 1, schedule=paper.RankSchedule(warmup=0))
ranks.before_forward()
model(**collate(moods(8))).loss.backward()
raise RuntimeError("mine")
"""
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | path, capture_output=True, text=True)
    assert done.stderr.rstrip().endswith("RuntimeError: mine")


def test_another_loop_takes_down_what_an_interrupted_one_left_on_the_model() -> None:
    model = certain(slotted_bert())
    first = paper.RankLoop(model, adamw(model), STEPS, 1, schedule=paper.RankSchedule(warmup=0))
    first.before_forward()
    assert any(module._forward_hooks for module in model.modules())
    second = paper.RankLoop(model, adamw(model), STEPS, 1, schedule=paper.RankSchedule(warmup=0))
    assert not any(module._forward_hooks for module in model.modules())
    second.close()
    first.close()
