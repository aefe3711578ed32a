"""A run that is killed at any moment, again and again, and resumed ends with the same bytes, rows and answers."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

import tsqlora as tsq
from pools import CONTRARY, POOL, TRUSTED, Handed
from scoring import assert_same, drawing, quality_by
from stock import Poison, make_trainer, slotted_bert
from tsqlora import paper
from tsqlora.errors import StoppedError
from tsqlora.training.stop import StopCallback

pytestmark = pytest.mark.filterwarnings("ignore:the pool:UserWarning", "ignore:SIGTERM:UserWarning")

RUNS: dict[str, dict[str, Any]] = {
    "two looks, ranks that move": {"rule": {"weights": {"loss": -1.0}}, "ranks": 3, "pool": POOL[:64]},
    "batches of a step": {"rule": {"weights": {"loss": -1.0}}, "ranks": 3, "gradient_accumulation_steps": 3},
    "a pool that contradicts, and two looks": {"trusted": CONTRARY, "rule": {"weights": {"loss": -1.0}}, "pool": POOL},
    "a pool that does not, and workers": {"trusted": TRUSTED, "dataloader_num_workers": 2},
    "trusted rows mixed in": {"trusted": TRUSTED[:20]},
    "the control, and steps that are not finite": {"rule": None, "poison": (2, 9, 16, 23)},
}
EPOCHS = 4


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    """As a crash before a step, within its batches or in the middle of its checkpoint, or a signal in it."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def _at(self, state: Any, how: str, begun: int) -> None:
        if how == self.how and state.global_step + begun == self.step:
            raise Killed

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at(state, "before", 1)
        if self.how == "signal" and state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at(state, "within", 1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at(state, "saving", 0)


def make(folder: Path, *first: TrainerCallback, also: tuple[TrainerCallback, ...] = (), **run: Any) -> Any:
    """A Trainer of four epochs that saves every second step, its callback, and the rows that its steps were given."""
    options = {"num_train_epochs": EPOCHS, "save_strategy": "steps", "save_steps": 2, **run}
    rule, ranks = options.pop("rule", {}), options.pop("ranks", None)
    data = tsq.QualitySubset(options.pop("pool", POOL[:80]), 0.5, seed=0, trusted=options.pop("trusted", None))
    quality, handed = drawing(data) if rule is None else quality_by(data, **rule), Handed()
    callbacks = [*first, quality, handed, Poison(*options.pop("poison", ())), *also]
    if ranks is not None:
        moving = paper.RankSchedule(moves=3, freeze=0.2)
        callbacks.insert(0, paper.RankCallback(interval=ranks, samples=16, schedule=moving))
    return make_trainer(slotted_bert(), data, folder, callbacks, **options), quality, handed.steps


def go_on(trainer: Trainer, folder: Path) -> None:
    newest = tsq.last_checkpoint(folder) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))


@pytest.mark.filterwarnings("ignore:.*is passed over:UserWarning")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_ends_as_one_that_is_not(name: str, tmp_path: Path) -> None:
    run, rng = RUNS[name], random.Random(name)
    whole, expected, rows = make(tmp_path / "whole", **run)
    whole.train()
    last = whole.state.max_steps
    moments = ["before", "saving", "signal", *(["within"] if "gradient_accumulation_steps" in run else [])]
    folder = tmp_path / "killed"
    for step in sorted(rng.sample(range(3, last + 1), 4)):
        how = rng.choice(moments)
        with StopCallback("go on") as stop:
            kill = Kill(step - step % 2 if how == "saving" else step, how)
            trainer, _, handed = make(folder, kill, also=(stop,), **run)
            with pytest.raises((Killed, StoppedError)):
                go_on(trainer, folder)
        assert all(rows[at][: len(got)] == got for at, got in handed.items()), f"{how} {step}"
    trainer, quality, handed = make(folder, **run)
    go_on(trainer, folder)
    assert handed == {at: got for at, got in rows.items() if at in handed}
    assert_same(whole.model.state_dict(), trainer.model.state_dict(), "the end")
    for mine, theirs in zip(*(callback.summary().items() for callback in (quality, expected)), strict=True):
        assert mine == theirs
    adapters = [(path / f"checkpoint-{last}" / "adapter_model.safetensors") for path in (folder, tmp_path / "whole")]
    if all(path.exists() for path in adapters):
        assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert torch.isfinite(torch.cat([p.detach().flatten() for p in trainer.model.parameters()])).all()
