"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="K.K=VALUE", help="Overrides a setting; repeatable.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; `tsqlora init` writes one.")]
Source = Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="A YAML file, or a run's directory.")]
Adapter = Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run's directory, or an adapter's.")]
Base = Annotated[str | None, typer.Option(help="The adapter's base model: a directory or a hub id.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else as it is.")]
NewTokens = Annotated[int | None, typer.Option(help="Tokens that may be written; else task.max_new_tokens.", min=1)]
Beams = Annotated[int | None, typer.Option(help="Beams of the search; else task.beams.", min=1)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")]
