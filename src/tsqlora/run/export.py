"""Export the adapter of a run, or any other; a run adds its base model and a model card."""

from pathlib import Path
from typing import Any

from tsqlora.errors import SettingsError
from tsqlora.interop.base import Base, base_of
from tsqlora.interop.doctor import serving
from tsqlora.interop.export import export_adapter
from tsqlora.run.card import write_card
from tsqlora.run.config import load_config
from tsqlora.run.finished import open_run
from tsqlora.training.run_dir import CONFIG_FILE, adapter_folder, is_run

UNQUANTIZED = "model.quantization=null"
"""Override for `open_run`: the base before quantisation."""


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
    """Write the adapter of a run or of a directory to `out` with `export_adapter`; return a report for JSON.

    A run knows its base model, and its export gets a model card. For another adapter, logits are compared if `base` is
    given or its weights are needed; else only the base's shapes that the adapter names are read.
    """
    if is_run(source) and base is not None:
        raise SettingsError(f"{source} is a run, which names its base model; remove --base")
    done = export_adapter(
        adapter_folder(source),
        out,
        format=format,
        base=_base_of_run(source) if is_run(source) else base_of(source, base),
        dtype=dtype,
        max_rank=max_rank,
        mean_rank=mean_rank,
    )
    if is_run(source):
        write_card(source, out, format=format, cut=bool(done.truncation))
    report: dict[str, Any] = done.report(out, format) | {"serve": serving(adapter_folder(source), out, format)}
    quantization = load_config(source / CONFIG_FILE, trained=True).model.quantization if is_run(source) else None
    if format == "merged" and quantization is not None:
        report["notes"].append(f"trained on a {quantization} base, merged into the full one: outputs differ slightly")
    return report


def _base_of_run(run: Path) -> Base:
    """The run's base without quantisation: merging into quantised weights would round them again."""
    beside: list[Any] = []

    def load(dtype: str | None) -> Any:
        opened = open_run(run, [UNQUANTIZED, *([] if dtype is None else [f"model.dtype={dtype}"])])
        model: Any = opened.model.unload().cpu().eval()
        parts = (opened.pretrained.tokenizer, getattr(model, "generation_config", None))
        beside[:] = [one for one in parts if one is not None]
        return model

    def processors() -> list[Any]:
        if not beside:
            load(None)
        return beside

    return Base(lambda: load(None), load, processors)
