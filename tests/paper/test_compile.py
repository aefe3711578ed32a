"""With torch.compile: ranks as without it, and a new compilation only when they have changed."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import tsqlora as tsq
from scoring import assert_same, quality_by
from slotted import assert_hidden_are_zero, trained
from stock import make_trainer, moods, slotted_bert
from tsqlora import paper
from tsqlora.paper import loop as mover

STEPS = 40


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):  # its default
        yield
    torch._dynamo.reset()


class Layers(nn.Module):
    """Three linear layers and the squared error: compiled in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.third(self.second(self.first(x).tanh()).tanh()) - x.flip(-1)).square().mean()


OTHERS = [(a, b, 6 - a - b) for a in range(1, 5) for b in range(1, 6 - a) if (a, b) != (2, 2)]
"""All ranks of as many parameters as rank 2 in each of the three layers, but these."""


def wrapped() -> PeftModel:
    torch.manual_seed(0)
    return paper.wrap(Layers(), mean_rank=2, max_rank=6).train()


def run(model: PeftModel, called: Any, steps: int = STEPS) -> paper.RankLoop:
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    others = iter(OTHERS)

    def next_ranks(_target: Any, ranks: dict[str, int], **_: Any) -> dict[str, int]:
        return dict(zip(ranks, next(others), strict=True))

    ranks = paper.RankLoop(called, optimizer, steps, 4, schedule=paper.RankSchedule(warmup=0, freeze=0))
    for step in range(steps):
        ranks.before_forward()
        called(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).backward()
        ranks.before_optimizer_step()
        optimizer.step()
        with patch.object(mover, "moved_towards", next_ranks):
            ranks.after_optimizer_step()
        optimizer.zero_grad()
        assert_hidden_are_zero(model, optimizer)
    return ranks


def test_it_is_compiled_anew_where_ranks_have_changed_and_only_there() -> None:
    limit = torch._dynamo.config.recompile_limit
    plain = wrapped()
    expected = run(plain, plain)
    assert [tuple(event.ranks.values()) for event in expected.events] == OTHERS
    assert len(OTHERS) > limit
    model, counter = wrapped(), CompileCounter()
    ranks = run(model, torch.compile(model, backend=counter))
    assert ranks.events == expected.events
    assert_same(plain.state_dict(), model.state_dict(), "weights")
    assert counter.frame_count == 1 + len(OTHERS)


ROWS = moods(40)


def even(row: dict[str, Any]) -> dict[str, Any]:
    """Cut to one length: another length is another compilation."""
    return row | {name: row[name][:4] for name in ("input_ids", "attention_mask")}


EVEN = [even(row) for row in ROWS]


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def sets_of_ranks(events: list[Any]) -> int:
    """How many there were, rank 4 everywhere at first."""
    return len({tuple(event.ranks.values()) for event in events} | {(4,) * 7})


def train(folder: Path, model: Any, callbacks: list[Any], data: Any = EVEN, **further: Any) -> None:
    options = {"learning_rate": 0.02, "dataloader_drop_last": True}
    make_trainer(model, data, folder, callbacks, **(options | further)).train()


def bert() -> PeftModel:
    model = slotted_bert()
    # Else the model itself writes it down in its first forward pass, and is compiled again.
    model.get_base_model().config.problem_type = "single_label_classification"  # type: ignore[union-attr]
    return model


COMPILED: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "eager"}


def test_scoring_between_epochs_is_not_compiled(tmp_path: Path) -> None:
    ended: list[Any] = []
    for by in ("nobody", "the Trainer", "the user"):
        torch._dynamo.utils.counters.clear()
        data = tsq.QualitySubset([even(row) for row in moods()], 0.5, seed=2)
        quality = quality_by(data, reference=40, weights={"convergence": 1.0})
        ranks = paper.RankCallback(interval=4, samples=16, schedule=paper.RankSchedule(moves=3))
        model = bert()
        called = torch.compile(model, backend="eager") if by == "the user" else model
        further = COMPILED if by == "the Trainer" else {}
        train(tmp_path, called, [quality, ranks], data=data, num_train_epochs=3, learning_rate=0.03, **further)
        ended.append((ranks.events, model.state_dict(), data.scores.quality))  # type: ignore[union-attr]
        assert ended[0][0] == ranks.events
        assert (ended[0][2] == ended[-1][2]).all()
        assert_same(ended[0][1], ended[-1][1], "weights")
        # The first ranks come before the first step: rank 4 everywhere is never compiled.
        assert compiled_graphs() == (sets_of_ranks(ranks.events) - 1 if by != "nobody" else 0)
        torch._dynamo.reset()
    assert [(event.step, event.reason) for event in ended[0][0]] == [(0, "start"), (4, "adjustment"), (8, "adjustment")]
