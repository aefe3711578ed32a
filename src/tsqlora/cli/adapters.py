"""Commands on an adapter, ours or any other: export, merge, doctor, adapter compress."""

from pathlib import Path
from typing import Annotated

import typer

from tsqlora.cli import console
from tsqlora.cli.adapter_display import show_doctor, show_export
from tsqlora.cli.options import Adapter, Base, Dtype, Json


def export(
    source: Adapter,
    format: Annotated[str, typer.Option(help="peft, universal, gguf or merged.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    base: Base = None,
    dtype: Dtype = None,
    max_rank: Annotated[int | None, typer.Option(metavar="R", help="Cut every layer to this rank by SVD.")] = None,
    mean_rank: Annotated[
        float | None, typer.Option(metavar="R", help="Cut to a uniform rank's parameters, where least is lost.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload it in the end; a new repository is private.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Writes an adapter, ours or any PEFT LoRA, in the format that its server reads, and compares it with its source.

    peft: the smallest. universal: one rank and alpha for all layers, right in
    every server. gguf: for llama.cpp. merged: a plain transformers model. What
    differs by more than rounding is an error, and nothing is written.

    Example: tsqlora export run --format universal --out adapter-for-vllm
    """
    from tsqlora.run import export as exporting

    done = exporting.export(
        source,
        out,
        format=format,
        base=base,
        dtype=dtype,
        max_rank=max_rank,
        mean_rank=mean_rank,
        push_to_hub=push_to_hub,
    )
    console.show(done, as_json, show_export)


def merge(
    source: Adapter,
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    base: Base = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Writes base and adapter as one plain transformers model, with its head and tokenizer.

    Example: tsqlora merge run --out model
    """
    from tsqlora.run import export as exporting

    console.show(exporting.export(source, out, format="merged", base=base, dtype=dtype), as_json, show_export)


def doctor(source: Adapter, as_json: Json = False) -> None:
    """Says which servers read an adapter right, what mends it for the others, and what its numbers look like.

    Example: tsqlora doctor adapter --json
    """
    from tsqlora.interop.doctor import examine
    from tsqlora.training.run_dir import adapter_folder

    console.show(examine(adapter_folder(source)), as_json, show_doctor)


def compress(
    source: Adapter,
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    mean_rank: Annotated[float, typer.Option(metavar="R", help="As many parameters as a uniform LoRA of this rank.")],
    by: Annotated[
        str, typer.Option(help="singular: by the update alone; curvature: by its effect on a run's own rows.")
    ] = "singular",
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Allots a trained adapter's ranks anew: fewer parameters, and each layer keeps what it loses most without.

    Example: tsqlora adapter compress run --mean-rank 4 --out smaller
    """
    from tsqlora.run import export as exporting

    console.show(exporting.compress(source, out, mean_rank=mean_rank, by=by, base=base), as_json, show_export)
