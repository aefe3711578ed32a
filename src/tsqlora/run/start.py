"""Settings and notes of a run that continues an adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsqlora.errors import DataError, SettingsError
from tsqlora.interop.lora import LoraAdapter
from tsqlora.run.config import Config
from tsqlora.training.lora import mean_rank, read_start
from tsqlora.training.record import RunRecord
from tsqlora.training.run_dir import adapter_folder, is_run


def with_start(config: Config) -> Config:
    """The config with ranks.mean, ranks.max, adapter.alpha and target_modules of adapter.init_from; idempotent.

    Raises SettingsError if one of them is set to another value. The default counts as unset, since the template of
    `tsqlora init` writes it.
    """
    adapter = start_of(config)
    if adapter is None:
        return config
    mean, largest = mean_rank(adapter), adapter.rank
    ranks = _require_unset(config, "ranks", {"mean": mean})
    scale = next(iter(adapter.targets.values())).scale  # of all the same
    targets = {"alpha": scale * mean, "target_modules": sorted(adapter.targets)}
    if config.ranks.max is not None and config.ranks.max < largest:
        raise SettingsError(f"ranks.max is {config.ranks.max}, and adapter.init_from has a rank of {largest}; raise it")
    return config.model_copy(
        update={
            "ranks": config.ranks.model_copy(update=ranks),
            "adapter": config.adapter.model_copy(update=_require_unset(config, "adapter", targets)),
        }
    )


def start_of(config: Config) -> LoraAdapter | None:
    """The adapter that a run continues, if any."""
    path = config.adapter.init_from
    return None if path is None else read_start(adapter_folder(Path(path)))


def start_labels(config: Config) -> list[str | int] | None:
    """The classes of the run that adapter.init_from names, if any."""
    path = config.adapter.init_from
    return RunRecord.load(Path(path)).labels if path is not None and is_run(Path(path)) else None


def start_notes(config: Config, labels: Sequence[Any] | None) -> list[str]:
    """Notes about the start, for a run's record.

    Raises DataError if the run was trained on other classes, so that its head means something else.
    """
    adapter, path = start_of(config), config.adapter.init_from
    if adapter is None or path is None:
        return []
    notes = [f"continues {path}: {len(adapter.targets)} layers, mean rank {mean_rank(adapter):.3g}"]
    if not adapter.heads():
        notes.append("that adapter has no head: the head is new")
    elif not is_run(Path(path)):
        notes.append(f"its head must be for these classes, in this order: {_listed(labels)}")
    elif (before := RunRecord.load(Path(path)).labels) != (None if labels is None else list(labels)):
        raise DataError(
            f"{path} was trained on {_listed(before)}, and the rows have {_listed(labels)}; give rows of the same ones"
        )
    if adapter.base not in (None, config.model.path):
        notes.append(f"that adapter names {adapter.base} as its base; its layers fit {config.model.path}")
    return notes


def _require_unset(config: Config, section: str, values: dict[str, Any]) -> dict[str, Any]:
    settings = getattr(config, section)
    for key, value in values.items():
        own = getattr(settings, key)
        if own not in (value, type(settings).model_fields[key].default):
            raise SettingsError(f"{section}.{key} is {own}, and adapter.init_from has {value}; remove it")
    return values


def _listed(labels: Sequence[Any] | None) -> str:
    return "numbers" if labels is None else ", ".join(map(str, labels))
