"""A LoRA adapter as a value: its targets, each W + s·BA, and what came with them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tsqlora.interop.tensors import Array, Stored

Kind = Literal["linear", "embedding", "convolution"]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One module's adapter: A (r, i…), B (o, r…) and the scale s, so that ΔW = s·BA.

    An embedding's inputs are its rows: i counts tokens, and its weight is (BA)ᵀ's shape.

    Attributes:
        dtype: safetensors' name of the precision, whose numbers A and B hold exactly.
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
        """What a slot reads: a row of A, flattened."""
        return math.prod(self.a.shape[1:])

    @property
    def outputs(self) -> int:
        return self.b.shape[0]

    def matrices(self) -> tuple[Array, Array]:
        """A (r, i) and B (o, r) in float64, a convolution's kernel flattened."""
        a, b = (matrix.astype(np.float64) for matrix in (self.a, self.b))
        return a.reshape(self.rank, self.inputs), b.reshape(self.outputs, self.rank)

    def used(self) -> Array:
        """Which slots do something: neither A's row nor B's column is zero."""
        a, b = self.a.reshape(self.rank, self.inputs), self.b.reshape(self.outputs, self.rank)
        return (a != 0).any(1) & (b != 0).any(0)

    def delta(self) -> Array:
        """ΔW (o, i) in float64.  Slots that are zero take no part, so that padding leaves every bit."""
        a, b = self.matrices()
        used = self.used()
        return self.scale * (np.ascontiguousarray(b[:, used]) @ a[used])


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """What the files of an adapter say.

    Attributes:
        config: adapter_config.json as it stands.
        targets: by the name of the module in the base model, with at least one entry.
        saved: tensors of modules that were saved whole (heads), by their names in the base model.
        base_layers: weights of the base that PEFT copies beside the adapter of an embedding.
        further: tensors of a target beyond A and B, by the names of the file: DoRA's magnitudes, biases of B.
    """

    config: Mapping[str, Any]
    targets: Mapping[str, Target]
    saved: Mapping[str, Stored] = field(default_factory=dict)
    further: Mapping[str, Stored] = field(default_factory=dict)
    base_layers: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """The base model's path or hub id, if it is named."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def rank(self) -> int:
        """The largest of any target."""
        return max(target.rank for target in self.targets.values())

    @property
    def parameters(self) -> int:
        """Numbers in A and B, all targets together."""
        return sum(target.a.size + target.b.size for target in self.targets.values())

    def heads(self) -> list[str]:
        """The modules that were saved whole.

        >>> weight = Stored(np.zeros(2))
        >>> LoraAdapter({}, {}, {"classifier.weight": weight, "classifier.bias": weight}).heads()
        ['classifier']
        """
        return sorted({name.rpartition(".")[0] for name in self.saved})

    def variants(self) -> list[str]:
        """What makes the adapter more than s·BA beside the base's own weights, by the names of PEFT's options."""
        found = [option for option in VARIANTS if self.config.get(option)]
        init = self.config.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
            found.append(f"init_lora_weights={init}")
        if self.config.get("bias", "none") != "none":
            found.append(f"bias={self.config['bias']}")
        return found


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
"""Options of LoraConfig with which a layer does something else than W + s·BA."""

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")
"""Values of init_lora_weights with which PEFT changes the base's weights when it loads the adapter."""
