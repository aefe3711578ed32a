"""Commands on an adapter, ours or any other: export, doctor."""

from pathlib import Path
from typing import Annotated

import typer

from tsqlora.cli import console
from tsqlora.cli.adapter_display import show_doctor, show_export
from tsqlora.cli.options import Adapter, Base, Dtype, Json


def export(
    source: Adapter,
    format: Annotated[str, typer.Option(help="peft, universal, compressed, gguf or merged.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    base: Base = None,
    dtype: Dtype = None,
    max_rank: Annotated[int | None, typer.Option(metavar="R", help="Cut every layer to this rank by SVD.")] = None,
    mean_rank: Annotated[
        float | None, typer.Option(metavar="R", help="Cut to a uniform rank's parameters, where least is lost.")
    ] = None,
    by: Annotated[
        str,
        typer.Option(help="What --mean-rank weighs layers by: singular, the update; curvature, a run's own rows."),
    ] = "singular",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload it in the end; a new repository is private.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Writes an adapter, ours or any PEFT LoRA, in the format that its server reads, and compares it with its source.

    peft: the smallest. universal: one rank and alpha for all layers, right in
    every server. compressed: fewer parameters, by --mean-rank or --max-rank; each
    layer keeps what it loses most without. gguf: for llama.cpp. merged: base and
    adapter as one plain transformers model, with head and tokenizer. What differs
    by more than rounding is an error, and nothing is written.

    Example: tsqlora export run --format universal --out adapter-for-vllm

    Example: tsqlora export run --format compressed --mean-rank 4 --out smaller
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
        by=by,
        push_to_hub=push_to_hub,
    )
    console.show(done, as_json, show_export)


def doctor(source: Adapter, as_json: Json = False) -> None:
    """Says which servers read an adapter right, what mends it for the others, and what its numbers look like.

    Example: tsqlora doctor adapter --json
    """
    from tsqlora.interop.doctor import examine
    from tsqlora.training.run_dir import adapter_folder

    console.show(examine(adapter_folder(source)), as_json, show_doctor)
