"""Commands about results and adapters: report, export, doctor, check."""

import os
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from tsqlora.cli import console
from tsqlora.cli.console import Json, Run
from tsqlora.errors import SettingsError, UnsupportedError


def report(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="HTML file; by default report.html in the directory.")] = None,
    as_json: Json = False,
) -> None:
    """Write one page about a run, from its directory alone; it opens anywhere, offline.

    Example: tsqlora report run
    """
    from tsqlora.training.report.write import write_report

    written = write_report(run, out)
    console.show({"report": str(written), "bytes": written.stat().st_size}, as_json, "show_numbers")


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER|HUB_ID", help="A directory, or OWNER/NAME on the hub.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    format: Annotated[str | None, typer.Option(help="peft, universal, gguf or merged.")] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="NAME[==VERSION]", help="Use the format that this server reads."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The adapter's base model: a directory or a hub id.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default unchanged.")] = None,
    max_rank: Annotated[int | None, typer.Option(metavar="R", help="Cut every layer to this rank by SVD.")] = None,
    keep: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Cut to this share of the parameters, at the least change."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter, ours or any PEFT LoRA, in the format of its server, and compare it with its source.

    peft: the smallest. universal: one rank and alpha for all layers, which every
    server that takes adapters on this base reads. gguf: for llama.cpp. merged: base
    and adapter as one plain transformers model, with head and tokenizer. --keep and
    --max-rank cut it first, in any format. For a classifier it first says which
    servers serve it. If the export differs by more than rounding, it fails and
    writes nothing.

    Example: tsqlora export run --format universal --out adapter-for-vllm

    Example: tsqlora export run --server sglang --out adapter-for-sglang

    Example: tsqlora export run --format peft --keep 0.5 --out smaller
    """
    if (format is None) == (server is None):
        raise SettingsError("an export needs either --format or --server; set one of them")
    from tsqlora.adapter.doctor import format_for, served
    from tsqlora.adapter.export import require_format
    from tsqlora.run_dir import adapter_folder

    if format is not None:
        require_format(format)
    source = _local(source)
    if who := served(adapter_folder(source)):
        if format == "gguf":
            raise UnsupportedError(f"llama.cpp cannot load classifier adapters; {who}")
        console.note(who)
    if server is not None:
        format = format_for(adapter_folder(source), server)
    assert format is not None
    from tsqlora.training.export import export as write

    result = write(source, out, format=format, base=base, dtype=dtype, max_rank=max_rank, keep=keep)
    console.show(result, as_json, "show_export")


MISREAD = 4
"""The exit code of `doctor --server` and `check` if the server misreads or refuses the adapter."""


def doctor(
    source: Annotated[
        Path, typer.Argument(metavar="ADAPTER|RUN|HUB_ID", help="A directory, or OWNER/NAME on the hub.")
    ],
    server: Annotated[
        str | None,
        typer.Option(metavar="NAME[==VERSION]", help="Judge one server only: its newest version, or this one."),
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="A chat template: does it give the prompts that a run was trained on?")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check which servers read an adapter correctly, how to fix it for the others, and its numerical health.

    With --server the exit code is 0 if that server reads the adapter correctly,
    and 4 if it misreads or refuses it. With --template it is 4 if that template
    gives other prompts than those in the run's template.json.

    Example: tsqlora doctor adapter --json

    Example: tsqlora doctor adapter --server vllm==0.31.0

    Example: tsqlora doctor run --template chat.jinja
    """
    # The matrices are small: more threads of OpenBLAS only wait for each other. numpy is not imported yet.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from tsqlora.adapter.doctor import examine
    from tsqlora.run_dir import adapter_folder

    source = _local(source)
    result = examine(adapter_folder(source), server=server)
    if template is not None:
        from tsqlora.adapter.template import compare_template

        result["template"] = compare_template(source, template)
    console.show(result, as_json, "show_doctor")
    if server is not None and (judged := result["consumers"][0])["verdict"] != "right":
        mend = judged["mend"]
        instead = "correct the fault that the report names" if result["faults"] else "serve it with PEFT"
        command = (
            f"tsqlora export {quote(str(source))} --format {mend} --out DIR" if mend else f"no export helps; {instead}"
        )
        console.note(f"for {judged['name']}: {command}")
        raise typer.Exit(MISREAD)
    if template is not None and result["template"]["first"]:
        raise typer.Exit(MISREAD)


def check(
    run: Run,
    server_url: Annotated[
        str | None, typer.Option(metavar="URL", help="The running server, as http://HOST:PORT.")
    ] = None,
    served_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The adapter's name on the server, if it lists several.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Send the prompts to another machine.")] = False,
    as_json: Json = False,
) -> None:
    """Compare what a running server answers with what PEFT writes, on 32 held-out prompts.

    Messages go to /v1/chat/completions at temperature 0. If an answer differs, the
    prompt's tokens go to /v1/completions, to see whether the server's template or its
    weights differ. The exit code is 4 if the base answered, or if fewer than 90 % of the
    answers start or stop as PEFT's. The key, if any, is read from TSQLORA_SERVER_KEY.
    Without --server-url it only says how often the model stops by itself.

    Example: tsqlora check run --server-url http://127.0.0.1:8000 --served-name adapter
    """
    from tsqlora.training.check import check_run

    report = check_run(run, server_url, served_name=served_name, yes=yes, say=console.note)
    console.show(report, as_json, "show_check")
    if report["verdict"] == "wrong":
        raise typer.Exit(MISREAD)


def _local(source: Path) -> Path:
    """A directory as it is; for OWNER/NAME the downloaded adapter's, unless a directory has this name."""
    from tsqlora.libs.hub import download_adapter, is_hub_id

    name = source.as_posix()
    return download_adapter(name) if "/" in name and not source.exists() and is_hub_id(name) else source
