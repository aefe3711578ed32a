"""The table of rival methods, and those of them that need no file of their own."""

from collections.abc import Callable

from peft import PeftModel

from tsqlora.errors import SettingsError, nearest
from tsqlora.ranks.rivals import whole_rank
from tsqlora.rivals.adalora import adalora
from tsqlora.rivals.elalora import elalora, elalora_as_released
from tsqlora.rivals.eva import eva
from tsqlora.rivals.prune import prune
from tsqlora.rivals.setup import Built, Setup, adapt, count_trainable, layers_of


def full(setup: Setup) -> Built:
    """The pretrained model, all of which trains: no adapter, no ranks."""
    model = setup.pretrained.model.requires_grad_(True)
    return Built(model, (), trainable=lambda: count_trainable(model), ranks=dict)


def lora(setup: Setup) -> Built:
    """PEFT's LoRA at uniform rank, scaled by alpha / rank."""
    return _uniform(adapt(setup, r=whole_rank(setup.mean_rank, "lora"), lora_alpha=setup.alpha))


def rslora(setup: Setup) -> Built:
    """LoRA scaled by alpha / √rank.  Kalajdzievski (2023), arXiv 2312.03732; PEFT's."""
    rank = whole_rank(setup.mean_rank, "rslora")
    return _uniform(adapt(setup, r=rank, lora_alpha=setup.alpha, use_rslora=True))


def dora(setup: Setup) -> Built:
    """LoRA of the weights' directions, their magnitudes trained apart.  Liu et al. (2024), arXiv 2402.09353; PEFT's."""
    rank = whole_rank(setup.mean_rank, "dora")
    return _uniform(adapt(setup, r=rank, lora_alpha=setup.alpha, use_dora=True))


def _uniform(model: PeftModel) -> Built:
    return Built(
        model,
        (),
        trainable=lambda: count_trainable(model),
        ranks=lambda: {name: layer.r["default"] for name, layer in layers_of(model).items()},
    )


RIVALS: dict[str, Callable[[Setup], Built]] = {
    "full": full,
    "lora": lora,
    "rslora": rslora,
    "dora": dora,
    "adalora": adalora,
    "elalora": elalora,
    "elalora-as-released": elalora_as_released,
    "eva": eva,
    "prune": prune,
}


def get_rival(name: str) -> Callable[[Setup], Built]:
    """The builder of that name; SettingsError for an unknown name."""
    if name not in RIVALS:
        raise SettingsError(f"method '{name}' is unknown; {nearest(name, RIVALS)}")
    return RIVALS[name]
