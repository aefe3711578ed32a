"""EVA, PEFT's own: ranks and first rows of A from each layer's inputs.  Paischer et al. (2024), arXiv 2410.07170."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import EvaConfig, initialize_lora_eva_weights
from peft.tuners.lora import Linear
from torch import Tensor, nn

from tsqlora.adapter.slots import layers_of
from tsqlora.baselines.setup import Built, Setup, adapt, count_trainable
from tsqlora.compat.peft import eva_layer_inputs
from tsqlora.errors import SettingsError, TsqLoraError, UnsupportedError
from tsqlora.quality.cost import PhaseCost
from tsqlora.ranks.baselines import whole_rank
from tsqlora.seeds import stream
from tsqlora.tasks.forward import is_encoder_decoder

NAME = "eva"
MOST_PASSES = 20
"""Passes over the samples after which directions that still turn are given up: PEFT would go on for ever."""


def eva(setup: Setup) -> Built:
    """LoRA whose ranks and A are read off the layers' inputs, by passes over the samples within this call.

    rho is max_rank / mean_rank, 2 by default; the rest is PEFT's default. With its `adjust_scaling_factors`
    PEFT makes a layer's alpha as much larger as its rank, so that the scale stays alpha / mean_rank in
    every layer. Ranks sum to those of uniform LoRA, their parameters only where layers are alike. A layer
    may end without any: its rank is 0, and PEFT puts the plain layer back.
    """
    rank = whole_rank(setup.mean_rank, NAME)
    require_one_stack(setup.pretrained.model)
    require_directions(rank, setup.max_rank, rows=len(setup.samples), batch_size=setup.batch_size)
    model = adapt(setup, r=rank, lora_alpha=setup.alpha)
    names = list(layers_of(model))
    for name, layer in layers_of(model).items():
        if not isinstance(layer, Linear):
            raise UnsupportedError(f"{name} is no linear layer, and EVA reads no other; leave it out of target_modules")
    config: Any = model.peft_config["default"]
    # Not before: PEFT would advise, by a warning, on how to build the model with less memory.
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=setup.max_rank / rank)
    batches = batches_of(setup)
    forward = CountedForward(MOST_PASSES * len(batches))
    initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=forward,
        prepare_layer_inputs_fn=eva_layer_inputs,  # pyright: ignore[reportArgumentType]
        show_progress_bar=False,
    )
    return Built(
        model,
        (),
        trainable=lambda: count_trainable(model),
        ranks=lambda: dict.fromkeys(names, 0) | {n: layer.r["default"] for n, layer in layers_of(model).items()},
        cost=forward.cost,
    )


def require_one_stack(model: nn.Module) -> None:
    """Raises UnsupportedError where layers have tokens of two kinds, and which of them are padding differs."""
    if is_encoder_decoder(model):
        raise UnsupportedError(
            f"EVA reads the inputs of one stack of layers, and {type(model).__name__} has an encoder's and a "
            "decoder's, of other tokens; leave out eva"
        )


def require_directions(rank: int, most: int, *, rows: int, batch_size: int) -> None:
    """Raises SettingsError where ranks cannot sum to the mean, or directions are more than a batch's rows."""
    if most < rank:
        raise SettingsError(f"ranks.max is {most}, below ranks.mean, {rank}; raise ranks.max")
    if rows < (size := max(batch_size, most)):
        raise SettingsError(
            f"EVA needs {size} rows to find {most} directions in, and there are {rows}; give more rows or lower "
            "ranks.max"
        )


def batches_of(setup: Setup) -> list[dict[str, Tensor]]:
    """The samples in a random order, without labels, in batches of at least as many rows as directions are sought.

    A layer that sees one row a sample, as a pooler does, has nothing else to find them in.
    """
    size = max(setup.batch_size, setup.max_rank)
    order = stream("EVA batches", setup.seed).permutation(len(setup.samples))
    rows: Sequence[dict[str, Any]] = [dict(setup.samples[j]) for j in order]
    return [
        {name: value for name, value in setup.collate(rows[start : start + size]).items() if name != "labels"}
        for start in range(0, len(rows) - size + 1, size)
    ]


class CountedForward:
    """Passes a batch forward, so many times at most, and counts rows and their tokens that are not padding."""

    def __init__(self, most: int) -> None:
        self.left, self.cost = most, PhaseCost()

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        self.left -= 1
        if self.left < 0:
            raise TsqLoraError(
                f"EVA's directions still turn after {MOST_PASSES} passes over its samples; give more rows or lower "
                "ranks.max"
            )
        ids = inputs["input_ids"]
        tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else ids.numel()
        self.cost.add(forward=len(ids), tokens=tokens)
        with torch.no_grad():
            return model(**inputs)
