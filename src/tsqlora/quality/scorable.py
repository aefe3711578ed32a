"""Whether a model, a task and their rows can be scored at all."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tsqlora import distributed
from tsqlora.errors import UnsupportedError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.gradients.sites import batch_coupled, find_sites
from tsqlora.oom import halves, retry_on_oom
from tsqlora.quality.exact import require_exact, require_own_loss
from tsqlora.quality.measure import measured_columns
from tsqlora.quality.reference import Reference
from tsqlora.quality.rule import ScoringRule, fitting, needs_gradients, require_precision
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Collate, each_its_row, precision


def require_scorable(
    model: nn.Module,
    rows: Sequence[Any],
    collate: Collate,
    *,
    task: Task,
    own_loss: bool = False,
    rule: ScoringRule,
    autocast: torch.dtype | None = None,
) -> None:
    """Raises what `score` would say of the model, the task and these few rows: before a look, not in it.

    With `own_loss` the task is a guess by the model's config, and its loss must be what the model computes itself.
    It costs a forward pass of the rows, and where a term needs gradients their check.  The model is left as it was.
    """
    wanted = rule.measured()
    model = distributed.unwrapped(model)
    require_apart(model)
    require_precision(wanted, autocast)
    rule.require_rejectable(task)
    collate = each_its_row(collate)
    with eval_mode(model), precision(next(model.parameters()).device, autocast, cache=False):
        # Together, not in portions: whether samples share a row shows in a batch.
        fitted = fitting(wanted, task, rule, collate(list(rows)))
        sites = find_sites(model, rule.scope) if needs_gradients(fitted) else {}
        # No trusted model is there yet.
        without = {name: term for name, term in fitted.items() if not (term.gradient or term.trusted)}

        def look(size: int) -> None:
            batch, nothing = collate(list(rows[:size])), Reference({}, norm=0.0, eta=0.0, rows=size, offsets=None)
            if own_loss:
                require_own_loss(model, batch, task)
            measured_columns(model, batch, task, {}, nothing, torch.zeros(size, dtype=torch.bool), without)
            if sites:
                require_exact(model, batch, task, sites, None)

        retry_on_oom(look, halves(len(rows)))


def require_apart(model: nn.Module) -> None:
    """Raises UnsupportedError for a model whose weights, or samples, are not each in one place."""
    if any(map(distributed.is_sharded, model.parameters())):
        raise UnsupportedError("the model's weights are in parts over processes (FSDP); score before fully_shard")
    if coupled := batch_coupled(model):
        raise UnsupportedError(f"{coupled[0]} couples the samples of a batch: no sample has a loss of its own")
