"""EVA, PEFT's own: ranks and first rows of A from each layer's inputs.  Paischer et al. (2024), arXiv 2410.07170."""

from typing import Any

import torch
from peft import EvaConfig, initialize_lora_eva_weights
from peft.tuners.lora import Linear
from torch import Tensor, nn

from tsqlora.adapter.slots import active_ranks, layers_of
from tsqlora.baselines.setup import Built, Setup, adapt, count_trainable, whole_rank
from tsqlora.compat.peft import eva_layer_inputs
from tsqlora.errors import SettingsError, TsqLoraError, UnsupportedError
from tsqlora.quality.cost import PhaseCost
from tsqlora.seeds import stream
from tsqlora.tasks.forward import is_encoder_decoder

NAME = "eva"
MOST_PASSES = 20
"""Passes over the samples after which directions that still turn are given up: PEFT would go on for ever."""


def eva(setup: Setup) -> Built:
    """LoRA whose ranks and A come from the layers' inputs, by passes over the samples within this call.

    rho is max_rank / mean_rank, 2 by default; the rest is PEFT's default. With its `adjust_scaling_factors`
    PEFT makes a layer's alpha as much larger as its rank, so that the scale stays alpha / mean_rank in
    every layer. Ranks sum to those of uniform LoRA, their parameters only where layers are alike. A layer
    may end without any: its rank is 0, and PEFT puts the plain layer back.
    """
    rank = whole_rank(setup.mean_rank, NAME)
    if is_encoder_decoder(setup.pretrained.model):
        raise UnsupportedError(
            f"EVA reads the inputs of one stack of layers, and {type(setup.pretrained.model).__name__} has an encoder "
            "and a decoder; leave out eva"
        )
    if "input_ids" not in setup.samples[0]:
        raise UnsupportedError("PEFT's EVA reads tokens, and these rows are images or recordings; leave out eva")
    if setup.max_rank < rank:
        raise SettingsError(f"ranks.max is {setup.max_rank}, below ranks.mean, {rank}; raise ranks.max")
    if len(setup.samples) < (size := _batch_size(setup)):
        raise SettingsError(
            f"EVA needs {size} rows to find {setup.max_rank} directions in, and there are {len(setup.samples)}; give "
            "more rows or lower ranks.max"
        )
    model = adapt(setup, r=rank, lora_alpha=setup.alpha)
    names = list(layers_of(model))
    for name, layer in layers_of(model).items():
        if not isinstance(layer, Linear):
            raise UnsupportedError(f"{name} is not a linear layer, which EVA needs; leave it out of target_modules")
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
        ranks=lambda: dict.fromkeys(names, 0) | active_ranks(model),
        cost=forward.cost,
    )


def _batch_size(setup: Setup) -> int:
    """At least as many rows as directions: a layer that sees one row a sample, as a pooler does, has no others."""
    return max(setup.batch_size, setup.max_rank)


def batches_of(setup: Setup) -> list[dict[str, Tensor]]:
    """The samples in a random order, in whole batches without labels."""
    size = _batch_size(setup)
    order = stream("EVA batches", setup.seed).permutation(len(setup.samples))
    rows = [dict(setup.samples[j]) for j in order]
    return [
        {name: value for name, value in setup.collate(rows[start : start + size]).items() if name != "labels"}
        for start in range(0, len(rows) - size + 1, size)
    ]


class CountedForward:
    """Run at most `most` forward passes, and count their rows and tokens without padding."""

    def __init__(self, most: int) -> None:
        self.left, self.cost = most, PhaseCost()

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        self.left -= 1
        if self.left < 0:
            raise TsqLoraError(
                f"EVA's directions still change after {MOST_PASSES} passes over its samples; give more rows or lower "
                "ranks.max"
            )
        ids = inputs["input_ids"]
        tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else ids.numel()
        self.cost.add(forward=len(ids), tokens=tokens)
        with torch.no_grad():
            return model(**inputs)
