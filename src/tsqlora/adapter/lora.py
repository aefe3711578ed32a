"""A LoRA adapter as a value: its targets, each W + s·BA, and the tensors beside them."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tsqlora.adapter.tensors import Array, Stored

Kind = Literal["linear", "embedding", "convolution"]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One module's adapter: A (r, i…), B (o, r…) and the scale s, so that ΔW = s·BA.

    An embedding's inputs are tokens: its weight has the shape of (BA)ᵀ.

    Attributes:
        dtype: safetensors' name of the precision in which A and B are exact.
    """

    a: Array
    b: Array
    scale: float
    kind: Kind = "linear"
    dtype: str = "F32"

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def inputs(self) -> int:
        """Inputs of a slot: a row of A, flattened."""
        return math.prod(self.a.shape[1:])

    @property
    def outputs(self) -> int:
        return self.b.shape[0]

    def matrices(self) -> tuple[Array, Array]:
        """A (r, i) and B (o, r) in float64, a convolution's kernel flattened."""
        a, b = (matrix.astype(np.float64) for matrix in (self.a, self.b))
        return a.reshape(self.rank, self.inputs), b.reshape(self.outputs, self.rank)

    def used(self) -> Array:
        """Mask of slots whose row of A and column of B are not zero."""
        a, b = self.a.reshape(self.rank, self.inputs), self.b.reshape(self.outputs, self.rank)
        return (a != 0).any(1) & (b != 0).any(0)

    def delta(self) -> Array:
        """ΔW (o, i) in float64, without zero slots, so that padding does not change a bit."""
        a, b = self.matrices()
        used = self.used()
        return self.scale * (np.ascontiguousarray(b[:, used]) @ a[used])


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """The content of an adapter's files.

    Attributes:
        config: the settings of adapter_config.json that are used, unchanged.
        targets: by module name in the base model; none only where parameters of experts have all of the adapter.
        saved: tensors of modules that were saved in full (heads), by name in the base model.
        base_layers: base weights that PEFT copies beside the adapter of an embedding.
        further: other tensors of a target, by the file's names: DoRA's magnitudes, biases of B, A and B of experts.
        ignored: names of unknown settings that adapter_config.json sets.
    """

    config: Mapping[str, Any]
    targets: Mapping[str, Target]
    saved: Mapping[str, Stored] = field(default_factory=dict)
    further: Mapping[str, Stored] = field(default_factory=dict)
    base_layers: Mapping[str, Stored] = field(default_factory=dict)
    ignored: Collection[str] = ()

    @property
    def base(self) -> str | None:
        """The base model's path or hub id, or None."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def made_on(self) -> str:
        """The class of the model that it was trained on, where PEFT recorded it; or empty."""
        return (self.config.get("auto_mapping") or {}).get("base_model_class", "")

    @property
    def rank(self) -> int:
        """The largest rank of any target."""
        return max((target.rank for target in self.targets.values()), default=0)

    @property
    def named_rank(self) -> int:
        """The largest rank of any target or in the config: what vLLM holds against --max-lora-rank."""
        return max(self.rank, self.config["r"], *(self.config.get("rank_pattern") or {}).values())

    @property
    def parameters(self) -> int:
        """The number of values in A and B of all targets."""
        return sum(target.a.size + target.b.size for target in self.targets.values())

    @property
    def bias(self) -> str:
        """PEFT's setting of the base's biases that it replaces; none where the file has no bias without a weight."""
        biases = [name.removesuffix("bias") for name in self.saved if name.endswith(".bias")]
        replaced = any(f"{name}weight" not in self.saved for name in biases)
        return (replaced and self.config.get("bias")) or "none"

    @property
    def is_zero(self) -> bool:
        """Whether every update is zero, and nothing else is in the file."""
        works = any(target.used().any() and target.scale for target in self.targets.values())
        return not (self.saved or self.further or works)

    def heads(self) -> list[str]:
        """The modules that were saved in full.

        >>> weight = Stored(np.zeros(2))
        >>> LoraAdapter({}, {}, {"classifier.weight": weight, "classifier.bias": weight}).heads()
        ['classifier']
        """
        return sorted({name.rpartition(".")[0] for name in self.saved})

    def whole(self) -> list[str]:
        """The modules of modules_to_save that have tensors."""
        names = self.config.get("modules_to_save") or ()
        return [name for name in names if any(f".{name}." in f".{key}" for key in self.saved)]

    def weights(self) -> dict[str, Stored]:
        """The weights of modules that were saved in full, by the modules' names."""
        return {name.removesuffix(".weight"): t for name, t in self.saved.items() if name.endswith(".weight")}

    def experts(self) -> list[str]:
        """The modules of experts whose parameters have A and B (target_parameters)."""
        return sorted(name.removesuffix(".lora_A.weight") for name in self.further if name.endswith(".lora_A.weight"))

    def variants(self) -> list[str]:
        """PEFT's options that make the adapter more than s·BA on the base's own weights."""
        options = [option for option in VARIANTS if self.config.get(option)]
        if changes_base(self.config):
            options.append(f"init_lora_weights={self.config['init_lora_weights']}")
        if self.bias != "none":
            options.append(f"bias={self.bias}")
        return options


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether PEFT changes the base's weights when it loads an adapter with this config."""
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS)


def tied_targets(adapter: LoraAdapter) -> list[str]:
    """The targets that share a weight in a base with tied embeddings: the embedding and the language model's head."""
    return [name for name, t in adapter.targets.items() if t.kind == "embedding" or name.endswith("lm_head")]


def shared_by_sides(adapter: LoraAdapter) -> list[str]:
    """The adapted embeddings whose weight encoder and decoder share: PEFT adapts one copy, and a merge all of them."""
    sides = [name for name in adapter.targets if name.endswith("encoder.embed_tokens")]
    return sides + [name for name in (*adapter.heads(), *adapter.targets) if name.rpartition(".")[2] == "shared"]


VARIANTS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "megatron_config",
)
"""Options of LoraConfig with which a layer is not W + s·BA."""

UNMERGEABLE = ("alora_invocation_tokens", "layer_replication", "target_parameters")
"""Those of VARIANTS that no export merges into the base."""

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")
"""Values of init_lora_weights with which PEFT changes the base's weights on loading."""
