"""The doors that rows go through: commands called in this process, and the classes that a script uses."""

import contextlib
import io
import json
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import transformers
from rich.console import Console

from tsqlora.cli import commands, console
from tsqlora.errors import TsqLoraError
from tsqlora.libs.quieten import quieten
from tsqlora.libs.typer import UsageError


@dataclass(slots=True)
class Outcome:
    """What a user sees of a command: exit code, result, the error's lines, or a traceback."""

    code: int
    result: dict[str, Any] = field(default_factory=dict)
    refusal: str = ""
    trace: str = ""
    notes: str = ""


def _terminals(out: io.StringIO, err: io.StringIO) -> Any:
    """The command line's stdout and stderr, into these."""
    consoles = [Console(file=file, width=200, markup=False) for file in (out, err)]
    return mock.patch.object(console, "terminal", lambda *, stderr=False: consoles[stderr])


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Collect what is printed; warnings are ignored, as libraries' are on the command line."""
    printed = io.StringIO()
    with warnings.catch_warnings(), _terminals(printed, printed), contextlib.redirect_stderr(printed):
        warnings.simplefilter("ignore")
        quieten()
        transformers.utils.logging.set_verbosity_error()
        warnings.filterwarnings("always", module="tsqlora")
        warnings.showwarning = lambda message, *_, **__: printed.write(f"{message}\n") and None
        yield printed


def command(*arguments: object) -> Outcome:
    """Run `tsqlora ARGUMENTS --json`."""
    out = io.StringIO()
    with _quiet() as printed, _terminals(out, printed):
        try:
            code = commands.app([*map(str, arguments), "--json"], standalone_mode=False) or 0
        except UsageError as error:
            return Outcome(error.exit_code, refusal=error.format_message(), notes=printed.getvalue())
        except TsqLoraError as error:
            return Outcome(error.exit_code, refusal=str(error), notes=printed.getvalue())
        except Exception:
            return Outcome(1, trace=_end_of(traceback.format_exc()), notes=printed.getvalue())
    shown = out.getvalue()
    try:
        result = json.loads(shown, parse_constant=_refuse_constant) if shown.strip() else {}
    except ValueError as error:
        return Outcome(code, trace=f"--json printed no JSON ({error}): {shown[:200]}")
    return Outcome(code, result, notes=printed.getvalue())


def script(work: Any, *arguments: Any, **named: Any) -> tuple[Any, Outcome]:
    """Call a function as a user's script does; its result, and how it ended."""
    with _quiet() as printed:
        try:
            result = work(*arguments, **named)
        except TsqLoraError as error:
            return None, Outcome(error.exit_code, refusal=str(error), notes=printed.getvalue())
        except Exception:
            return None, Outcome(1, trace=_end_of(traceback.format_exc()), notes=printed.getvalue())
    return result, Outcome(0, notes=printed.getvalue())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _end_of(trace: str) -> str:
    """The place in our code and the error's last line."""
    lines = trace.strip().split("\n")
    ours = [line.strip() for line in lines if "/src/tsqlora/" in line]
    return f"{lines[-1]} at {ours[-1] if ours else lines[-3]}"


@dataclass(frozen=True, slots=True)
class Batch:
    """A row of a batch that the Trainer got, without padding; `trained` are the places that have a loss."""

    ids: tuple[int, ...]
    trained: tuple[int, ...]


@contextlib.contextmanager
def batches() -> Iterator[list[Batch]]:
    """Record the rows of every training step."""
    seen, step = list[Batch](), transformers.Trainer.training_step

    def recorded(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        if "labels" in inputs and inputs["labels"].dim() == 2:
            for ids, labels, mask in zip(
                *(inputs[name] for name in ("input_ids", "labels", "attention_mask")), strict=True
            ):
                read = mask.bool()
                places = np.flatnonzero(labels[read].numpy() != -100)
                seen.append(Batch(tuple(ids[read].tolist()), tuple(places.tolist())))
        return step(self, model, inputs, *rest, **named)

    with mock.patch.object(transformers.Trainer, "training_step", recorded):
        yield seen


def ledger_of(folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(folder / "ledger.parquet").to_pylist()
