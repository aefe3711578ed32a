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


MISREAD = 4
"""The exit code where the server of `doctor --server` misreads or refuses the adapter."""


def doctor(
    source: Annotated[
        Path, typer.Argument(metavar="ADAPTER|RUN|HUB_ID", help="A directory, or OWNER/NAME on the hub.")
    ],
    server: Annotated[
        str | None, typer.Option(metavar="NAME[==VERSION]", help="The one server to judge; the newest, or a version.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Says which servers read an adapter right, what mends it for the others, and what its numbers look like.

    With --server the exit code is 0 if that server reads the adapter right, and 4
    if it misreads or refuses it.

    Example: tsqlora doctor adapter --json

    Example: tsqlora doctor adapter --server vllm==0.31.0
    """
    from tsqlora.interop.doctor import examine
    from tsqlora.training.run_dir import adapter_folder

    report = examine(_from_hub(source) or adapter_folder(source), server=server)
    console.show(report, as_json, show_doctor)
    if server is not None and (found := report["consumers"][0])["verdict"] != "right":
        console.note(f"for {found['name']}: tsqlora export {source} --format {found['mend']} --out DIR")
        raise typer.Exit(MISREAD)


def _from_hub(source: Path) -> Path | None:
    """Where an adapter of the hub is once it is downloaded; None for what is here, or can be no OWNER/NAME."""
    from tsqlora.compat.hub import download_adapter, is_hub_id

    name = source.as_posix()
    return download_adapter(name) if "/" in name and is_hub_id(name) and not source.exists() else None
