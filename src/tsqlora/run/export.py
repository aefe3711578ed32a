"""The adapter of a run, or any other, for the world outside: `tsqlora export`, `merge` and `doctor`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi

from tsqlora.compat.hub import is_hub_id
from tsqlora.errors import SettingsError, TsqLoraError, nearest
from tsqlora.interop import doctor
from tsqlora.interop.base import base_skeleton, load_base, load_tokenizer
from tsqlora.interop.checkpoint import base_path, revision_of
from tsqlora.interop.export import Base, Exported, export_adapter
from tsqlora.interop.files import read_adapter
from tsqlora.interop.health import vllm_rank
from tsqlora.interop.merge import reload
from tsqlora.interop.verify import describe, logits, takes_tokens
from tsqlora.layer_sensitivity import sensitivity
from tsqlora.run.card import write_card
from tsqlora.run.predict import open_run
from tsqlora.run.reading import read, trained_task
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
    """Writes the adapter of a run or of a directory as `out`, as `export_adapter` does; what was written, for JSON.

    A run knows its base model, and what is made of it gets a model card. Of another adapter, logits
    are compared where `base` is given or its weights are needed; else the base that it names is
    read for its modules' shapes alone.

    Args:
        by: how `mean_rank` weighs layers: alike, or by their `curvature` on a run's own rows.
        push_to_hub: a repository of the hub, such as "name/adapter", to which the directory is uploaded in the end.
    """
    if by not in WEIGHINGS:
        raise SettingsError(f"--by {by}: {nearest(by, WEIGHINGS)}")
    if push_to_hub is not None and not is_hub_id(push_to_hub):
        raise SettingsError(f"--push-to-hub {push_to_hub} is no name of a repository; give NAME or OWNER/NAME")
    measured = WEIGHINGS[by](source)
    if is_run(source):
        if base is not None:
            raise SettingsError(f"{source} is a run, which knows its base model; leave out --base")
        model = _base_of_run(source)
    else:
        model = _base_of_adapter(source, base, format)
    done = export_adapter(
        adapter_folder(source),
        out,
        format=format,
        base=model,
        dtype=dtype,
        max_rank=max_rank,
        mean_rank=mean_rank,
        curvature=measured,
    )
    if is_run(source):
        write_card(source, out, format=format, cut=bool(done.truncation))
    report = _report(out, format, done)
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


def compress(
    source: Path, out: Path, *, mean_rank: float, by: str = "singular", base: str | None = None
) -> dict[str, Any]:
    """Writes the adapter, as `export`, with ranks allotted anew at the parameters of a uniform LoRA of `mean_rank`."""
    return export(source, out, format="peft", base=base, mean_rank=mean_rank, by=by)


def curvature(source: Path) -> dict[str, float]:
    """The mean Fisher information of each layer's weights, on rows that a run was trained on.

    Half of it times (s·σ)² is what the loss gains, to second order, when a direction is dropped.
    Raises SettingsError for an adapter whose rows are not known.
    """
    if not is_run(source):
        raise SettingsError(f"{source} is no run, and which rows it was trained on is not known; leave out --by")
    run = open_run(source)
    samples, settings = run.prepare(read(run.config)).samples["train"], run.config.ranks
    rows = np.random.default_rng([run.config.training.seed, 4]).permutation(len(samples))[: settings.samples]
    measured = sensitivity(
        run.model,
        [samples[row] for row in sorted(rows.tolist())],
        run.collate,
        estimator="fisher",
        task=trained_task(run.config),
        batch_size=run.config.training.batch_size,
    )
    return dict(measured.values)


WEIGHINGS: Mapping[str, Callable[[Path], dict[str, float] | None]] = {
    "singular": lambda _: None,
    "curvature": curvature,
}
"""How directions of different layers are compared: by their singular values alone, or by what they do to the loss."""


def examine(source: Path) -> dict[str, Any]:
    """What the doctor says of the adapter of a run or of a directory."""
    return doctor.examine(adapter_folder(source))


def _base_of_run(run: Path) -> Base:
    """The whole base, also of a run that had it packed: merging into packed weights would round them again."""

    def load(dtype: str | None) -> Any:
        opened = open_run(run, [WHOLE, *([] if dtype is None else [f"model.dtype={dtype}"])])
        return opened.model.unload().cpu().eval()

    return Base(lambda: load(None), load, lambda: open_run(run, [WHOLE]).tokenizer)


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


def _base_of_adapter(folder: Path, given: str | None, format: str) -> Base | None:
    if given is None and format == "peft":
        return None
    adapter = read_adapter(folder)
    path = base_path(adapter, given)
    return Base(
        lambda: base_skeleton(path, adapter),
        lambda dtype: load_base(path, adapter, dtype),
        lambda: load_tokenizer(str(folder)) or load_tokenizer(path, revision_of(path, adapter)),
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
