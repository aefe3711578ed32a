"""Ranks that follow sensitivity, in a stock Trainer: a callback that drives a `RankLoop`."""

import os
import warnings
from dataclasses import asdict, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora import distributed
from tsqlora.auditing.draw.subset import QualitySubset
from tsqlora.auditing.head_start import is_ready
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.files import write_tensors
from tsqlora.libs.transformers import live_note
from tsqlora.paper.change import require_moments
from tsqlora.paper.loop import RankLoop
from tsqlora.paper.moves import RankSchedule, default_interval
from tsqlora.paper.probe import sensitivity_rows
from tsqlora.paper.slots import find_slots, has_slots, wrap
from tsqlora.record import RankEvent
from tsqlora.tasks import Collate, task_of
from tsqlora.training.checkpoints import checkpoint_folder, read_state, write_state
from tsqlora.training.live_record import step_size

RANKS_FILE = "tsqlora.json"
IMPORTANCE_FILE = "tsqlora.safetensors"
"""The loop's state in a checkpoint."""
LEAST_ROWS, MOST_ROWS = 32, 256
"""Rows that first ranks are measured on."""

_NO_SLOTS = (
    "the optimizer exists already, and the model has no rank slots; give RankCallback to Trainer(callbacks=[...]); "
    "with model_init, your own optimizer or a second train(), use tsqlora.paper.wrap(model) and "
    "RankCallback(finalize=False)"
)


class RankCallback(TrainerCallback):
    """Moves rank between the layers of a LoRA model, at constant parameters, in transformers' or TRL's Trainer.

    The model is one from `paper.wrap`, or a PeftModel with plain LoRA (`get_peft_model`, SFTTrainer's
    `peft_config`), whose ranks become changeable when the Trainer is made. Ranks are first set from sensitivities on
    rows of the first epoch, unless the model is at chance, as with a new head that no look has fitted, or tsqlora
    has no loss for its samples (preferences, spans of answers). Every `interval`
    optimizer steps they then move towards a target that is measured in that step's own backward pass. At the end the
    model becomes a plain PEFT model. A sample is a row of a batch: with SFTTrainer's packing it is a whole packed row,
    and in a batch without padding the whole batch.

    Where ranks cannot move, a warning and `notes` say why. With an optimizer whose state cannot follow slots, and with
    several GPUs in one process, ranks are set once, before the first step. Those of other adapters stay.

    Args:
        max_rank: slots of each layer of a PeftModel without slots; by default twice its rank.
        samples: rows of the first epoch that the first ranks are measured on; by default a twentieth of the
            rows that the run trains on, 32 to 256.
        collate: makes the batches of those rows; by default the Trainer's collator.
        finalize: leave a plain PEFT model; False keeps the slots for further training.
        interval, schedule and the others: as in `RankLoop`.

    First ranks are measured by the model's own loss, or by the task of `QualityCallback`.

    `events` has every decision, `final` the ranks at the end, `seconds` the time for measuring and changing them,
    without the steps' own backward passes. The Trainer's checkpoints have all of it, so that runs resume; where another
    callback writes run.json, it has it too.
    """

    def __init__(
        self,
        interval: int | None = None,
        *,
        max_rank: int | None = None,
        schedule: RankSchedule | None = None,
        min_rank: int = 1,
        samples: int | None = None,
        seed: int = 0,
        finalize: bool = True,
        collate: Collate | None = None,
    ) -> None:
        if samples is not None and not (isinstance(samples, Integral) and samples >= 1):
            raise SettingsError(f"samples is {samples}; it must be a whole number of rows, at least 1")
        self.options: dict[str, Any] = {
            "interval": interval,
            "schedule": schedule or RankSchedule(),
            "min_rank": min_rank,
            "seed": seed,
        }
        self.max_rank, self.samples, self.seed, self.finalize = max_rank, samples, seed, finalize
        self.collate = collate
        self.loop: RankLoop | None = None
        self._why_not: str | None = None
        """Why ranks cannot change in this Trainer."""
        self.notes: list[str] = []
        """Warnings, for the record."""

    def rows_of(self, trained: int) -> int:
        """Rows that the first ranks are measured on, in a run that trains on `trained` rows."""
        return min(MOST_ROWS, max(LEAST_ROWS, trained // 20)) if self.samples is None else self.samples

    def why_idle(self, steps: int) -> str | None:
        """Why a run of so many optimizer steps will not adjust ranks, if it will not."""
        interval = self.options["interval"] or default_interval(steps)
        if self.options["schedule"].steps(steps, interval):
            return None
        return f"{steps} steps at an interval of {interval} allow no adjustment"

    @property
    def events(self) -> list[RankEvent]:
        return [] if self.loop is None else self.loop.events

    @property
    def final(self) -> dict[str, int]:
        return {} if self.loop is None else self.loop.final

    @property
    def seconds(self) -> float:
        return 0.0 if self.loop is None else self.loop.seconds

    def _tell(self, state: TrainerState) -> None:
        """Put decisions, current ranks, warnings and cost into the Trainer's state, for whoever writes run.json."""
        schedule: RankSchedule = self.options["schedule"]
        options = {**self.options, **asdict(schedule)}
        del options["schedule"]
        live_note(state)["record"] = {
            "rank_events": list(self.events),
            "ranks": {} if self.loop is None else self.loop.ranks,
            "notes": self.notes,
            "settings": {"ranks": options},
            "cost": {"ranks": replace(self.loop.spent)} if self.loop and self.seconds else {},
        }

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        distributed.refuse_sharded_loading(kwargs["model"])
        distributed.refuse_deepspeed(args.deepspeed_plugin)
        model, self._why_not = distributed.unwrapped(kwargs["model"]), None
        if has_slots(model):
            if self.max_rank is not None:
                raise SettingsError(
                    "the model has its slots already; give max_rank to tsqlora.paper.wrap, not to RankCallback"
                )
        elif not isinstance(model, PeftModel):
            find_slots(model)  # which says what to do
        elif kwargs["optimizer"] is not None:
            self._why_not = _NO_SLOTS
        else:
            try:
                wrap(model, max_rank=self.max_rank)
            except UnsupportedError as error:
                self._why_not = str(error)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        resumed = checkpoint_folder(args, state) if state.global_step > 0 else None
        self._begin(args, state, resumed, kwargs["model"], kwargs["optimizer"])
        # A checkpoint without these files is not complete, whichever callback writes its manifest, and when.
        live_note(state)["files"] = [] if self.loop is None else [RANKS_FILE, IMPORTANCE_FILE]
        self._tell(state)

    def _begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        resumed: Path | None,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        distributed.refuse_sharded_loading(model)
        distributed.refuse_deepspeed(args.deepspeed_plugin)
        if self.loop is not None:
            self.loop.close()  # an attempt that failed may have left it open
        self.loop, self.notes = None, []
        if not has_slots(model):
            self._note(f"ranks stay as they are: {self._why_not or _NO_SLOTS}")
            return
        if sharded := any(map(distributed.is_sharded, model.parameters())):
            _refuse_efficient_loading(args)
        saved = None
        if resumed is not None:
            saved = {**read_state(resumed / RANKS_FILE), "importance": load_file(resumed / IMPORTANCE_FILE)}
        # Ranks that moved go on moving; where they cannot, `load_state_dict` names what has changed.
        moved = saved is not None and saved["options"].get("ranks.policy") != "fixed"
        why_not = None
        if args.n_gpu > 1 and not moved:
            why_not = (
                f"{args.n_gpu} GPUs in one process copy the model at each step, so measurements on a copy are lost; "
                "start a process for each: accelerate launch"
            )
        elif not moved:
            try:
                require_moments(next(iter(find_slots(distributed.unwrapped(model)).values())).a, optimizer)
            except UnsupportedError as error:
                if distributed.active():
                    raise  # processes have agreed on the parameters' shapes, which would have to change once
                why_not = str(error)
        options = dict(self.options)
        if saved is not None and options["interval"] is None:
            # By default it follows the number of steps, which may be another now.
            options["interval"] = saved["interval"]
        if why_not is not None:
            options["moves"] = False
        loop = RankLoop(model, optimizer, state.max_steps, **options)
        self.notes = loop.notes
        if sharded and args.save_strategy != "no" and not args.save_only_model:
            self._note("a run with moving ranks cannot resume under FSDP; if it must, set ranks.policy: fixed")
        if saved is not None:
            loop.load_state_dict({**saved, "step": state.global_step})
        if why_not is not None:
            loop.state_of = None  # before its first step it keeps nothing that would have to move
            self._note(f"ranks are set once, before the first step, and do not move: {why_not}")
        self.loop = loop

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (loop := self.loop) is None or loop.final:
            return
        loader = kwargs["train_dataloader"]
        drawn = isinstance(loader.dataset, QualitySubset)
        waits = drawn and loader.dataset.plan.awaits_scores
        scored = drawn and loader.dataset.scores is not None
        first = state.global_step == 0 and not isinstance(loader.dataset, IterableDataset)
        if not (waits or loop.started) and (scored or first):
            self._start(loop, args, state, kwargs["model"], loader.dataset, self.collate or loader.collate_fn)
            self._tell(state)
        if loop.state_of is None:  # ranks are set now, and stay
            loop.finish()
        else:
            loop.before_forward(adjust=not waits)  # until the rows are scored, ranks stay

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if self.loop is not None and not self.loop.final:
            self.loop.before_optimizer_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if self.loop is None or self.loop.final:
            return
        before = len(self.events), self.seconds
        self.loop.after_optimizer_step()
        if before != (len(self.events), self.seconds):
            self._tell(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if self.loop is None:
            return
        folder = checkpoint_folder(args, state)
        values = self.loop.state_dict()
        del values["step"]  # the Trainer's state has it
        importance = values.pop("importance")
        if distributed.is_first():
            write_tensors(folder / IMPORTANCE_FILE, importance)
        write_state(folder / RANKS_FILE, values)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if self.loop is None:
            return
        stays = self.finalize and any(map(distributed.is_sharded, self.loop.model.parameters()))
        self.loop.finish(finalize_model=self.finalize and not stays)
        if stays:
            self._note("the weights are sharded, so the model keeps its slots; trainer.save_model writes plain PEFT")
        self._tell(state)

    def _note(self, what: str) -> None:
        self.notes.append(what)
        warnings.warn(what, stacklevel=4)

    def _start(
        self,
        loop: RankLoop,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        data: Any,
        collate: Any,
    ) -> None:
        """Set the first ranks from rows of the first epoch, unless the head is at chance."""
        trained = state.max_steps * step_size(args, state)
        places = sensitivity_rows(len(data), self.rows_of(trained), self.seed).tolist()
        looked = isinstance(data, QualitySubset)
        rows = [data[place] for place in places]
        task = data.task if looked else None
        options: dict[str, Any] = {
            "batch_size": args.per_device_train_batch_size,
            "autocast": torch.bfloat16 if args.bf16 else None,
        }
        try:
            options["task"] = task or task_of(model, label_smoothing=args.label_smoothing_factor)
            ready = (looked and data.scores is not None) or is_ready(model, rows, collate, **options)
        except (DataError, UnsupportedError, TypeError):
            if task is not None:
                raise
            ready = False  # training has a custom loss, which moves ranks later
        if not ready:
            return
        loop.start(rows, collate, **options)
        if looked and data.lengths is not None:
            loop.spent.add(tokens=sum(data.lengths[row] for row in data.indices[places]))


def _refuse_efficient_loading(args: TrainingArguments) -> None:
    """Raise UnsupportedError where FSDP gives the weights to one process, since ranks move in all."""
    config: Any = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    loads = config.get("cpu_ram_efficient_loading", os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", ""))
    if str(loads).lower() in ("1", "true"):
        raise UnsupportedError(
            "cpu_ram_efficient_loading gives the weights to one process, but ranks move in all; set it to false, or "
            "ranks.policy: fixed (leave RankCallback out)"
        )
