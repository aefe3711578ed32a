"""Two processes on CPU under an engine that shards: `torchrun … engines.py ENGINE FOLDER WHAT,WHAT…`."""

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertForSequenceClassification, BitsAndBytesConfig, TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

import tsqlora as tsq
from models import collate
from stock import base_bert, make_trainer, moods
from training.test_question import CONTRARY, POOL, Handed
from tsqlora import distributed, paper

ROWS = moods(96)
SAVED_AT, KILLED_AT, POISONED_AT, ANSWERED_AT = 6, 8, 4, 18


def fsdp_on_cpu() -> None:
    """Let accelerate shard on CPU with FSDP, which its AcceleratorState does on GPUs alone."""
    former = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        former(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def arguments_of(engine: str) -> dict[str, Any]:
    """The fields of TrainingArguments that choose the engine."""
    if engine.startswith("fsdp"):
        config = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": engine == "fsdp-ram"}
        config |= {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["BertLayer"]}
        return {"fsdp": True, "fsdp_config": config}
    if engine.startswith("zero"):
        stage = {"stage": int(engine[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        config: dict[str, Any] = {"zero_optimization": {**stage, "stage3_param_persistence_threshold": 0}}
        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        return {"deepspeed": config | dict.fromkeys(sizes, "auto")}
    return {}


class Watch(TrainerCallback):
    """The loss of each step, which parameters are in parts, and on request the end of the second process."""

    def __init__(self, killed: bool) -> None:
        self.losses: list[float] = []
        self.parts: set[str] = set()
        self.killed = killed

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.parts |= {parts for p in model.parameters() if (parts := distributed.parts_of(p)) is not None}
        if self.killed and state.global_step == KILLED_AT and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Poison(TrainerCallback):
    """Makes the losses of one step NaN on the second process."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if state.global_step == POISONED_AT and args.process_index == 1:
            self.hook = model.register_forward_hook(self._forward)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == POISONED_AT + 1 and args.process_index == 1:
            self.hook.remove()

    @staticmethod
    def _forward(module: nn.Module, args: Any, output: Any) -> None:
        output["loss"] = output["loss"] * torch.nan


def loaded_in_parts(folder: Path) -> Any:
    """A model that transformers shards while loading it, before any Trainer."""
    from transformers.distributed import DistributedConfig

    base_bert().save_pretrained(folder / "whole")  # the first process alone writes
    distributed.wait()
    return BertForSequenceClassification.from_pretrained(
        folder / "whole", distributed_config=DistributedConfig(fsdp_size=2)
    )


def bert(*, slots: bool = False, packed: Path | None = None) -> PeftModel:
    """A model without dropout, with plain LoRA or with slots; its base in 4 bits if a folder holds it."""
    torch.manual_seed(0)
    base = base_bert() if packed is None else in_four_bits(packed)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if slots:
        return tsq.wrap(base, mean_rank=4)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS))


def in_four_bits(folder: Path) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["classifier"])
    return BertForSequenceClassification.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def trained(
    engine: str,
    folder: Path,
    name: str,
    *,
    look: str | None = "LOOK",
    resume: str | None = None,
    killed: bool = False,
    ranks: bool = False,
    late: bool = False,
    poisoned: bool = False,
    model: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Train with a look from a folder, and save the adapter as the Trainer saves it."""
    rows, trusted = (POOL, CONTRARY) if look == "CONTRARY" else (ROWS, None)
    data = tsq.QualitySubset(rows, fraction=0.5, seed=0, trusted=trusted)
    quality = tsq.QualityCallback(data, look=None if look is None else folder / look)
    watch, handed = Watch(killed), Handed()
    callbacks: list[Any] = [] if late else [quality]
    if ranks:
        schedule = paper.RankSchedule(warmup=0.0, freeze=0.2)
        callbacks.append(paper.RankCallback(interval=2, schedule=schedule))
    if poisoned:
        callbacks.append(Poison())
    args = {"average_tokens_across_devices": False, "save_strategy": "steps", "save_steps": SAVED_AT}
    args |= {"logging_strategy": "steps", "logging_steps": 1, "per_device_train_batch_size": 8 // world()}
    args |= {"num_train_epochs": 2, "max_grad_norm": 0.0, **arguments_of(engine), **options}
    trainer = make_trainer(model or bert(slots=ranks), data, folder / name, [*callbacks, watch], **args)
    if late:
        trainer.add_callback(quality)
    if trusted is not None:
        trainer.add_callback(handed)
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / name / resume))
    trainer.save_model(str(folder / f"{name}-adapter"))
    distributed.wait()
    return {
        "losses": watch.losses,
        "parts": watch.parts,
        "notes": [note for callback in callbacks for note in getattr(callback, "notes", ())],
        "skipped": quality.finite.skipped,
        "drawn": data.indices.tolist(),
        "engine": str(trainer.accelerator.distributed_type),
        "weights": load_file(folder / f"{name}-adapter" / "adapter_model.safetensors"),
        "question": numbers_of(quality.question or {}),
        "steps": handed.steps,
    }


def numbers_of(question: dict[str, Any]) -> dict[str, float]:
    """What pytest.approx can compare."""
    return {name: value for name, value in question.items() if isinstance(value, (int, float))}


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def error_of(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def work(engine: str, folder: Path, what: str) -> dict[str, Any]:
    """What is trained and what is refused under the engine, each in another folder."""

    def run(name: str, **options: Any) -> Any:
        return error_of(lambda: trained(engine, folder, f"{engine}-{options.pop('into', name)}", **options))

    if engine == "loaded":
        model, saves = loaded_in_parts(folder), {"save_strategy": "no"}
        ways: dict[str, Any] = {"look": {}, "no look": {"look": None}, "late": {"late": True}}
        ways |= {"ranks": {"look": None, "ranks": True}}
        done = {name: run(name, model=model, **saves, **options) for name, options in ways.items()}
        return done | {"taken": error_of(lambda: tsq.look(model, ROWS, collate, out=folder / "never"))}
    if what == "packed":
        return run("packed", model=bert(packed=folder / "whole"))
    if engine == "fsdp-ram":
        return {"train": run("train"), "ranks": run("ranks", ranks=True, save_strategy="no")}
    return {
        "train": run("train"),
        "resumed": run("resumed", into="train", resume=f"checkpoint-{SAVED_AT}"),
        "questioned": run("questioned", look="CONTRARY"),
        "answered": run("answered", into="questioned", look="CONTRARY", resume=f"checkpoint-{ANSWERED_AT}"),
        "no look": run("no look", look=None),
        "late": run("late", late=True),
        "ranks": run("ranks", ranks=True),
        "poisoned": run("poisoned", poisoned=True),
    }


def by_command(engine: str, folder: Path, *, packed: bool) -> str:
    """Train by the settings in folder/c.yaml, with a look from folder/SETTINGS; return the run."""
    settings: dict[str, Any] = {"ranks": {"policy": "fixed"}}
    settings |= {"model": {"quantization": "4bit"}} if packed else {}
    run = folder / f"{engine}-{'packed-' if packed else ''}run"
    return str(
        tsq.train(folder / "c.yaml", out=run, look=folder / "SETTINGS", training=arguments_of(engine), **settings)
    )


def main(engine: str, folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    if what == "look":  # one process, before anything is sharded
        base_bert().save_pretrained(folder / "whole")
        tsq.look(bert(), ROWS, collate, out=folder / "LOOK", compute=paper.Compute(8))
        tsq.look(bert(), POOL, collate, out=folder / "CONTRARY", trusted=CONTRARY, compute=paper.Compute(8))
        return
    if engine.startswith("fsdp"):
        fsdp_on_cpu()
    if engine.startswith("zero"):
        from deepspeed import init_distributed  # pyright: ignore[reportMissingImports]

        init_distributed("gloo", auto_mpi_discovery=False)  # as accelerate does on GPUs
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for one in what.split(","):
        if one == "killed":
            trained(engine, folder, f"{engine}-killed", killed=True)
        if one.endswith("command"):
            done = by_command(engine, folder, packed=one == "packed command")
        elif one == "resumed":
            done = trained(engine, folder, f"{engine}-killed", resume=f"checkpoint-{SAVED_AT}")
        else:
            done = work(engine, folder, one)
        torch.save(done, folder / f"{engine}-{one}-{dist.get_rank()}.pt")
        distributed.wait()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
