"""Ways to train at equal cost: PEFT's LoRA, AdaLoRA and EVA, ElaLoRA and ours, each with a choice of rows.

`cell` trains one of them by a run's settings, in a new process, and returns a result that is ready for JSON.
"""

import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from elalora import ADAPTER, ORTHOGONALITY, ElaLora, require_gradients, triplets_of
from origin import commit
from peft import AdaLoraConfig, EvaConfig, LoraConfig, PeftModel, TaskType, initialize_lora_eva_weights
from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from tsqlora.errors import SettingsError, TsqLoraError, nearest
from tsqlora.paper.budget import default_max_rank
from tsqlora.paper.moves import RankSchedule, default_interval
from tsqlora.paper.slots import active_parameters, active_ranks
from tsqlora.record import RunRecord, versions
from tsqlora.rows.table import data_hash
from tsqlora.sampling import draw_size
from tsqlora.seeds import stream
from tsqlora.settings import Config
from tsqlora.training.fit import fit
from tsqlora.training.job import Job, Method, load, method_of
from tsqlora.training.lora import inject, layers_of, new_config
from tsqlora.training.run import arguments, measure

ROWS: Mapping[str, Mapping[str, Any]] = {
    "all": {"enabled": False, "head_start": False, "fraction": 1.0},
    "head": {"enabled": False, "head_start": True, "fraction": 1.0},
    "random": {"enabled": False, "head_start": False},
    "even": {"enabled": False, "head_start": True},
    "quality": {},
}
"""Choices of rows, as settings of `quality`: all, without and with a fitted head; a share, likewise; by quality."""
PASSES = 20
"""Most passes of EVA over its rows: PEFT would go on for ever where directions still turn."""


class Entry(NamedTuple):
    """A way to train, and its choice of rows."""

    method: str
    policy: str

    @property
    def name(self) -> str:
        return "+".join(self)


def entry(name: str) -> Entry:
    """Parse METHOD+POLICY; `tsqlora` alone is tsqlora+quality, others train on all rows.  Raises SettingsError.

    >>> entry("lora+head"), entry("tsqlora").name
    (Entry(method='lora', policy='head'), 'tsqlora+quality')
    """
    method, _, policy = name.partition("+")
    policy = policy or ("quality" if method == "tsqlora" else "all")
    for part, choices in ((method, METHODS), (policy, ROWS)):
        if part not in choices:
            raise SettingsError(f"'{part}' of {name} is unknown; {nearest(part, choices)}")
    return Entry(method, policy)


class Built(NamedTuple):
    """A model for the Trainer with its callbacks; parameters in use and each layer's rank at the time of the call."""

    model: PeftModel
    callbacks: tuple[TrainerCallback, ...] = ()
    ranks: Callable[[PeftModel], dict[str, int]] = active_ranks
    trainable: Callable[[PeftModel], int] = active_parameters


def adapt(job: Job, kind: type[LoraConfig] = LoraConfig, **options: Any) -> PeftModel:
    """PEFT's adapter in the layers that `tsqlora.wrap` would adapt; the head trains whole, as there."""
    model, adapter = job.pretrained.model, job.config.adapter
    set_seed(job.config.training.seed)
    usual = new_config(model, adapter.target_modules, adapter.dropout, job.pretrained.new_modules)
    shared = ("target_modules", "lora_dropout", "modules_to_save", "fan_in_fan_out", "task_type")
    config = kind(**{name: getattr(usual, name) for name in shared}, **options)
    # PEFT's class for a task calls AdaLoRA's own forward pass, which adds the penalty; its plain class does not.
    if config.task_type is None and model.can_generate():
        config.task_type = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    return inject(model, config)


def mean_rank(job: Job) -> int:
    mean = job.config.ranks.mean
    if mean != int(mean):
        raise SettingsError(f"ranks.mean is {mean:g}; these methods need a whole number")
    return int(mean)


def phase(steps: int) -> range:
    """Steps at which our own callback would move ranks; they are final from its `stop`.

    >>> phase(100)
    range(10, 70)
    """
    within = RankSchedule().steps(steps, 1)
    if not within.start < within.stop < steps:
        raise SettingsError(f"the run has {steps} optimizer steps, too few for ranks that change; train longer")
    return within


def lora(job: Job, steps: int) -> Built:
    return Built(adapt(job, r=mean_rank(job), lora_alpha=job.config.adapter.alpha))


def eva(job: Job, steps: int) -> Built:
    """Ranks and first A from the layers' inputs, by passes over the rows: Paischer et al. (2024), arXiv 2410.07170.

    With `adjust_scaling_factors`, PEFT's default, the scale stays alpha / mean_rank in every layer. Where a layer ends
    without any rank, PEFT puts the plain layer back.
    """
    model, most = lora(job, steps).model, job.config.ranks.max or default_max_rank(job.config.ranks.mean)
    names, config = list(layers_of(model)), cast(LoraConfig, model.peft_config[ADAPTER])
    # Not before: PEFT would advise, by a warning, on how to build the model with less memory.
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=most / mean_rank(job))
    # As many rows as directions: a layer that sees one row a sample, as a pooler does, has no others.
    size, samples = max(job.config.training.batch_size, most), job.train.samples
    order = stream("EVA batches", job.config.training.seed).permutation(len(samples))
    batches = [
        {name: value for name, value in job.collate([samples[int(j)] for j in part]).items() if name != "labels"}
        for part in np.split(order, range(size, len(order), size))
        if len(part) == size
    ]
    passes = iter(range(PASSES * len(batches)))

    def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        if next(passes, None) is None:
            raise TsqLoraError(f"EVA's directions still change after {PASSES} passes over its rows; give more rows")
        with torch.no_grad():
            return model(**inputs)

    def inputs_of(layer_input: Any, model_input: Any, name: str) -> Tensor:
        """Tokens without padding, or all rows of a layer that sees one row a sample."""
        inputs = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
        if inputs.dim() == 2:
            return inputs.contiguous()
        return prepare_layer_inputs_fn_language_modeling(inputs, model_input, name)

    how: dict[str, Any] = {"forward_fn": forward, "prepare_layer_inputs_fn": inputs_of, "show_progress_bar": False}
    initialize_lora_eva_weights(model, batches, **how)
    return Built(model, ranks=lambda model: dict.fromkeys(names, 0) | active_ranks(model))


def adalora(job: Job, steps: int) -> Built:
    """PEFT's, from 1.5 times the mean rank down to it, in the phases of our own callback: arXiv 2303.10512."""
    mean, when = mean_rank(job), phase(steps)
    first, phases = math.floor(1.5 * mean + 0.5), {"tinit": when.start, "tfinal": steps - when.stop}
    model = triplets(job, steps, first, deltaT=default_interval(steps), **phases)

    def ranks(model: PeftModel) -> dict[str, int]:
        """Each layer's triplets that the last allocation chose; all before the first."""
        pattern = cast(AdaLoraConfig, model.peft_config[ADAPTER]).rank_pattern or {}
        chosen = {key.partition(".lora_E")[0]: sum(mask) for key, mask in pattern.items()}
        return {name: chosen.get(name, one.rank) for name, one in triplets_of(model).items()}

    def unmasked(model: PeftModel) -> int:
        now = ranks(model)
        masked = sum((one.rank - now[name]) * one.cost for name, one in triplets_of(model).items())
        return active_parameters(model) - masked

    return Built(model, (Penalty(model), Allocator(model)), ranks, unmasked)


def elalora(job: Job, steps: int) -> Built:
    model = triplets(job, steps, mean_rank(job), orth_reg_weight=ORTHOGONALITY)
    return Built(model, (Penalty(model), ElaLora(model, phase(steps), steps, seed=job.config.training.seed)))


def triplets(job: Job, steps: int, rank: int, **options: Any) -> PeftModel:
    """P Λ Q of this first rank, by which PEFT divides lora_alpha for the whole run; the scale is alpha / mean_rank."""
    if job.config.training.further_arguments().keys() & {"gradient_accumulation_steps", "label_smoothing_factor"}:
        raise SettingsError("PEFT's orthogonality penalty is for steps of one batch without label smoothing")
    mean = mean_rank(job)
    alpha = job.config.adapter.alpha / mean * rank
    return adapt(job, AdaLoraConfig, init_r=rank, target_r=mean, lora_alpha=alpha, total_step=steps, **options)


class Penalty(TrainerCallback):
    """Keep PEFT's orthogonality penalty out of every loss but training's."""

    def __init__(self, model: PeftModel) -> None:
        self.config = cast(AdaLoraConfig, model.peft_config[ADAPTER])
        self.weight, self.config.orth_reg_weight = self.config.orth_reg_weight, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.orth_reg_weight = self.weight

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.orth_reg_weight = 0.0


class Allocator(TrainerCallback):
    """Call AdaLoRA's allocator after each optimizer step, before its gradients are cleared."""

    def __init__(self, model: PeftModel) -> None:
        self.model, self.layers = model, triplets_of(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        require_gradients(self.layers, state.global_step)
        cast(Any, self.model.base_model).update_and_allocate(state.global_step)


def tsqlora(job: Job, steps: int) -> Built:
    """Our model, by the settings; its callbacks are those of the run."""
    return Built(job.with_adapter().model)


METHODS = {"lora": lora, "adalora": adalora, "elalora": elalora, "eva": eva, "tsqlora": tsqlora}


def cell(config: Config, entry: Entry) -> dict[str, Any]:
    """`train` in a new process, so that peak memory and leftovers stay apart."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train, config, entry).result()


def train(
    config: Config, entry: Entry, *, also: Callable[[Job, int], Iterable[TrainerCallback]] = lambda job, steps: ()
) -> dict[str, Any]:
    """Train and measure an entry in this process, by the config's seed and learning rate; `also` makes more callbacks.

    A training that fails, for example because it diverges, is a result too, with `failed`. Wrong settings raise.
    """
    job = load(changed(config, quality=ROWS[entry.policy]))
    steps, seed = planned_steps(config, len(job.train)), config.training.seed
    job = replace(job, config=changed(job.config, training={"max_steps": steps, "save_strategy": "no"}))
    record = RunRecord("running", seed, job.task.name, None, {"hash": data_hash(job.data)}, {})
    with tempfile.TemporaryDirectory() as folder:
        args, further = arguments(job.config, Path(folder)), [*also(job, steps)]
        method = method_of(job, Path(folder) / "scores.parquet")
        if entry.method != "tsqlora":
            method = replace(method, ranks=None)
        with record.timed("building"):
            set_seed(seed)
            built = METHODS[entry.method](job, steps)
        failed = {}
        try:
            fit(job.with_model(built.model), args, method, record, also=(*built.callbacks, *further))
            measure(job.with_model(built.model), record, args, None)
        except TsqLoraError as error:
            if type(error) is not TsqLoraError:  # of settings and data, which no other seed would cure
                raise
            failed = {"failed": str(error)}
    return {
        "cell": {**entry._asdict(), "seed": seed, "learning_rate": config.training.learning_rate},
        **failed,
        "commit": commit(),
        "bf16": args.bf16,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() or 1024 * getrusage(RUSAGE_SELF).ru_maxrss,
        "quality": {**record.quality, "random": _why_at_random(method)},
        "metrics": record.metrics,
        "cost": {name: asdict(cost) for name, cost in record.cost.items()},
        "seconds": sum(cost.seconds for name, cost in record.cost.items() if name != "evaluation"),
        "steps": steps,
        "parameters": {"trainable": built.trainable(built.model)},
        "ranks": built.ranks(built.model),
        "data_hash": record.data["hash"],
        "versions": versions(),
    }


def planned_steps(config: Config, rows: int) -> int:
    """Optimizer steps of every method: training.max_steps, else the settings' epochs of their share of the rows."""
    if config.training.steps is not None:
        return config.training.steps
    batches = math.ceil(draw_size(rows, config.quality.fraction) / config.training.batch_size)
    return math.ceil(config.training.epochs * batches)


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """The config with these values in its sections."""
    news = {name: getattr(config, name).model_copy(update=dict(values)) for name, values in sections.items()}
    return config.model_copy(update=news)


def _why_at_random(method: Method) -> str | None:
    """Why a policy with scores drew rows evenly; None if its scores decided, and for a control."""
    quality, scores = method.quality, method.data.scores
    if not quality.rule.select:
        return None
    if scores is None:
        return quality.why_not
    return "no row was left out, and rows are drawn evenly" if scores.even and scores.kept.all() else None
