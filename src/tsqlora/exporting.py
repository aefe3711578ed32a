"""The adapter of a run, or any other, for the world outside: `tsqlora export`, `merge` and `doctor`."""

from pathlib import Path
from typing import Any

from tsqlora.adapter import doctor
from tsqlora.adapter.base import base_path, base_skeleton, load_base, load_tokenizer
from tsqlora.adapter.export import Base, Exported, export_adapter
from tsqlora.adapter.files import read_adapter
from tsqlora.adapter.health import vllm_rank
from tsqlora.adapter.verify import describe
from tsqlora.card import write_card
from tsqlora.errors import SettingsError
from tsqlora.inference import open_run
from tsqlora.training.run_dir import ADAPTER_DIR, CONFIG_FILE


def export(
    source: Path,
    out: Path,
    *,
    format: str,
    base: str | None = None,
    dtype: str | None = None,
    max_rank: int | None = None,
    mean_rank: float | None = None,
) -> dict[str, Any]:
    """Writes the adapter of a run or of a directory as `out`, as `export_adapter` does; what was written, for JSON.

    A run knows its base model, and what is made of it gets a model card. Of another adapter, logits
    are compared where `base` is given or its weights are needed; else the base that it names is
    read for its modules' shapes alone.
    """
    if is_run(source):
        if base is not None:
            raise SettingsError(f"{source} is a run, which knows its base model; leave out --base")
        folder, model = source / ADAPTER_DIR, _base_of_run(source)
    else:
        folder, model = source, _base_of_adapter(source, base, format)
    done = export_adapter(folder, out, format=format, base=model, dtype=dtype, max_rank=max_rank, mean_rank=mean_rank)
    if is_run(source):
        write_card(source, out, format=format)
    return _report(out, format, done)


def examine(source: Path) -> dict[str, Any]:
    """What the doctor says of the adapter of a run or of a directory."""
    return doctor.examine(source / ADAPTER_DIR if is_run(source) else source)


def is_run(path: Path) -> bool:
    """Whether a directory is a run's."""
    return (path / CONFIG_FILE).is_file()


def _base_of_run(run: Path) -> Base:
    def load(dtype: str | None) -> Any:
        opened = open_run(run, [] if dtype is None else [f"model.dtype={dtype}"])
        return opened.model.unload().cpu().eval()

    return Base(lambda: load(None), load, lambda: open_run(run).tokenizer)


def _base_of_adapter(folder: Path, given: str | None, format: str) -> Base | None:
    if given is None and format == "peft":
        return None
    adapter = read_adapter(folder)
    path = base_path(adapter, given)
    return Base(
        lambda: base_skeleton(path, adapter),
        lambda dtype: load_base(path, adapter, dtype),
        lambda: load_tokenizer(str(folder)) or load_tokenizer(path),
        compare=given is not None,
    )


def _report(out: Path, format: str, done: Exported) -> dict[str, Any]:
    report: dict[str, Any] = {"out": str(out), "format": format, **describe(done.difference)}
    if done.rank is not None:
        report |= {"rank": done.rank, "targets": done.targets}
    if done.rank is not None and format != "gguf":
        report["max_lora_rank"] = vllm_rank(done.rank)
    files = [path for path in out.rglob("*") if path.is_file()]
    report |= {"bytes": sum(path.stat().st_size for path in files), "truncation": dict(done.truncation)}
    return report | {"notes": list(done.notes)}
