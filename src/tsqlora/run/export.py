"""Export the adapter of a run, or any other: what a run adds is its base model, its rows and a model card."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi

from tsqlora.compat.hub import is_hub_id
from tsqlora.errors import SettingsError, TsqLoraError, nearest
from tsqlora.interop.base import Base, base_of
from tsqlora.interop.export import export_adapter, reload
from tsqlora.interop.verify import logits, takes_tokens
from tsqlora.run.allocate import sensitivities
from tsqlora.run.card import write_card
from tsqlora.run.finished import open_run
from tsqlora.run.reading import read
from tsqlora.training.run_dir import adapter_folder, is_run

WHOLE = "model.quantization=null"
"""For `open_run`: the base as it was before it was packed."""


def export(
    source: Path,
    out: Path,
    *,
    format: str,
    base: str | None = None,
    dtype: str | None = None,
    max_rank: int | None = None,
    mean_rank: float | None = None,
    by: str = "singular",
    push_to_hub: str | None = None,
) -> dict[str, Any]:
    """Writes the adapter of a run or of a directory as `out`, by `export_adapter`; returns a report for JSON.

    A run knows its base model, and its export gets a model card. For another adapter, logits are
    compared where `base` is given or its weights are needed; else only the shapes of the base that
    the adapter names are read.

    Args:
        by: how `mean_rank` weighs layers: alike, or by their `curvature` on a run's own rows.
        push_to_hub: a repository of the hub, such as "name/adapter", to which the directory is uploaded in the end.
    """
    if by not in WEIGHINGS:
        raise SettingsError(f"--by {by}: {nearest(by, WEIGHINGS)}")
    if by != "singular" and mean_rank is None:
        raise SettingsError(f"--by {by} is how --mean-rank weighs layers; give --mean-rank R, or leave out --by")
    if push_to_hub is not None and not is_hub_id(push_to_hub):
        raise SettingsError(f"--push-to-hub {push_to_hub} is no name of a repository; give NAME or OWNER/NAME")
    measured = WEIGHINGS[by](source)
    if is_run(source) and base is not None:
        raise SettingsError(f"{source} is a run, which knows its base model; leave out --base")
    done = export_adapter(
        adapter_folder(source),
        out,
        format=format,
        base=_base_of_run(source) if is_run(source) else base_of(source, base),
        dtype=dtype,
        max_rank=max_rank,
        mean_rank=mean_rank,
        curvature=measured,
    )
    if is_run(source):
        write_card(source, out, format=format, cut=bool(done.truncation))
    report = done.report(out, format)
    if is_run(source) and format == "merged":
        report["notes"] += _off_packed(source, out)
    return report if push_to_hub is None else report | {"pushed": _push(out, push_to_hub)}


def _push(folder: Path, repo: str) -> str:
    """Uploads a directory as one commit, into a new private repository where there is none; the commit's address."""
    hub = HfApi()
    try:
        named = hub.create_repo(repo, private=True, exist_ok=True).repo_id  # with its owner
        return str(hub.upload_folder(repo_id=named, folder_path=folder, commit_message="Upload adapter").commit_url)
    except Exception as error:  # of the network, the login or the hub: the directory stays, whatever it is
        raise TsqLoraError(
            f"{folder} is written, and was not pushed to {repo} ({type(error).__name__}: {str(error).strip()}); log in "
            f"with `hf auth login`, then `hf upload {repo} {folder}`"
        ) from error


def curvature(source: Path) -> dict[str, float]:
    """The mean Fisher information of each layer's weights, on rows that a run was trained on.

    Half of it times (s·σ)² is what the loss gains, to second order, when a direction is dropped.
    Raises SettingsError for an adapter whose rows are not known.
    """
    if not is_run(source):
        raise SettingsError(f"{source} is no run, and which rows it was trained on is not known; leave out --by")
    run = open_run(source)
    job = run.job(read(run.config))
    rows = np.arange(len(job.data.samples["train"]))
    return dict(sensitivities(job, run.model, rows, estimator="fisher").values)


WEIGHINGS: Mapping[str, Callable[[Path], dict[str, float] | None]] = {
    "singular": lambda _: None,
    "curvature": curvature,
}
"""How directions of different layers are compared: by their singular values alone, or by what they do to the loss."""


def _base_of_run(run: Path) -> Base:
    """The whole base, also of a run that had it packed: merging into packed weights would round them again."""

    def load(dtype: str | None) -> Any:
        opened = open_run(run, [WHOLE, *([] if dtype is None else [f"model.dtype={dtype}"])])
        return opened.model.unload().cpu().eval()

    return Base(lambda: load(None), load, lambda: open_run(run, [WHOLE]).pretrained.tokenizer)


def _off_packed(run: Path, merged: Path) -> list[str]:
    """For a run on a packed base: how far what it was trained as is from what the merged model says."""
    opened = open_run(run)
    base: Any = opened.model.get_base_model()
    if (packed := opened.config.model.quantization) is None or not takes_tokens(base):
        return []
    trained = logits(opened.model)
    gap = (trained - logits(reload(merged, base))).abs()
    return [
        f"trained on a {packed} base and merged into the whole one: logits differ by {float(gap.mean()):.3g} in the "
        f"mean and {float(gap.max()):.3g} at most, where the largest is {float(trained.abs().max()):.3g}"
    ]
