"""`tsqlora train` in a process to which something happens: bench/faults.py starts it, and sees which phase it is in."""

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PHASES = ("look", "ranks", "training", "adjustment", "checkpointing", "export")
YEAR = 31_536_000


def run_cli(arguments: list[str], counts: Any, log: str, plan: Mapping[str, Any]) -> None:
    """The command line, with all of its output in a file.

    `plan`: a `signal` for it, so many seconds after it has come to a `phase` for the `count`-th time; or what is
    prepared for it, see PREPARE. `counts` has the phase, and how often it came to each.
    """
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(plan.get("environment", {}))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    import torch

    torch.set_num_threads(1)
    PREPARE[plan.get("prepare", "nothing")](plan)

    def begun(phase: str, count: int) -> None:
        if (phase, count) == (plan.get("phase"), plan.get("count")):
            threading.Timer(plan["delay"], lambda: os.kill(os.getpid(), plan["signal"])).start()

    phases = Phases(counts, begun)
    phases.watch()
    from tsqlora.cli import commands as cli

    sys.argv = ["tsqlora", *arguments]
    try:
        cli.main()
    finally:
        if "timeline" in plan:
            Path(plan["timeline"]).write_text(json.dumps(phases.spans()))


class Phases:
    """Which phase a training is in, and how often it came to each."""

    def __init__(self, counts: Any, begun: Callable[[str, int], None]) -> None:
        self.counts, self.begun = counts, begun
        self.entries: list[tuple[float, str, int]] = []

    def spans(self) -> list[tuple[str, int, float]]:
        """Of each time in a phase: which, the how manieth, seconds."""
        ends = [*(begun for begun, _, _ in self.entries[1:]), time.monotonic()]
        return [(phase, count, end - begun) for (begun, phase, count), end in zip(self.entries, ends, strict=True)]

    def watch(self) -> None:
        """Looks at what phases are made of."""
        from peft import PeftModel
        from transformers import Trainer
        from transformers.trainer_callback import CallbackHandler

        from tsqlora.paper.callback import RankCallback
        from tsqlora.paper.loop import RankLoop
        from tsqlora.training.quality_callback import QualityCallback

        self._within(CallbackHandler, "on_step_begin", "training")
        self._within(QualityCallback, "_look", "look")
        self._within(RankCallback, "_start", "ranks")
        self._within(RankLoop, "_change", "adjustment", only=lambda reason: reason == "adjustment")
        self._within(Trainer, "_save_checkpoint", "checkpointing", ends=False)
        self._within(CallbackHandler, "on_save", "checkpointing")
        self._within(PeftModel, "save_pretrained", "export", ends=False, only=lambda of: Path(of).name == "adapter")

    def _within(
        self, owner: Any, name: str, phase: str, *, ends: bool = True, only: Callable[[Any], bool] | None = None
    ) -> None:
        inner = getattr(owner, name)

        def wrapped(this: Any, *args: Any, **kwargs: Any) -> Any:
            if only is not None and not only(args[0]):
                return inner(this, *args, **kwargs)
            self._enter(phase)
            try:
                return inner(this, *args, **kwargs)
            finally:
                if ends:
                    self._enter("training")

        setattr(owner, name, wrapped)

    def _enter(self, phase: str) -> None:
        place = PHASES.index(phase)
        if self.counts[0] == place:
            return
        self.counts[0] = place
        self.counts[1 + place] += 1
        self.entries.append((time.monotonic(), phase, self.counts[1 + place]))
        self.begun(phase, self.counts[1 + place])


# -------------------------------------------------------------------------- what is prepared


def clock_goes_back(plan: Mapping[str, Any]) -> None:
    """Between one checkpoint and the next, by a year."""
    from transformers import Trainer

    save, now, passed = Trainer._save_checkpoint, time.time, 0

    def saved(self: Any, *args: Any) -> None:
        nonlocal passed
        passed += 1
        clock_was_ahead(Path(self.args.output_dir))
        save(self, *args)

    Trainer._save_checkpoint = saved  # type: ignore[method-assign]
    time.time = lambda: now() - YEAR * passed


def clock_was_ahead(checkpoints: Path) -> None:
    """Dates what a clock has dated a year later, as if it had been set back since; not what was dated on purpose."""
    for folder in checkpoints.glob("checkpoint-*"):
        if folder.stat().st_mtime > YEAR:
            os.utime(folder, (folder.stat().st_mtime + YEAR,) * 2)


def losses_are_not_finite(plan: Mapping[str, Any]) -> None:
    """In some `steps`."""
    from transformers import Trainer

    compute = Trainer.compute_loss

    def computed(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step + 1 in plan["steps"] else loss

    Trainer.compute_loss = computed  # type: ignore[method-assign]


def allocations_fail(plan: Mapping[str, Any]) -> None:
    """From the `first` pass on, in passes of more than so many `rows`."""
    from transformers import BertModel

    forward, passes = BertModel.forward, 0

    def limited(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes >= plan["first"] and len(input_ids) > plan["rows"]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return forward(self, input_ids, **kwargs)

    BertModel.forward = limited  # type: ignore[method-assign]


def memory_is_limited(plan: Mapping[str, Any]) -> None:
    """When training begins: to so many `bytes` beyond what the process has."""
    from transformers.trainer_callback import CallbackHandler

    begin = CallbackHandler.on_train_begin

    def begun(self: Any, *args: Any) -> Any:
        if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + plan["bytes"], resource.RLIM_INFINITY))
        return begin(self, *args)

    CallbackHandler.on_train_begin = begun  # type: ignore[method-assign]


PREPARE: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "nothing": lambda _: None,
    "clock": clock_goes_back,
    "number": losses_are_not_finite,
    "memory": allocations_fail,
    "limit": memory_is_limited,
}
