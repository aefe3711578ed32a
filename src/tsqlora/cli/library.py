"""Commands from Python and notebooks: `tsqlora.train`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from tsqlora.cli.progress_bars import Display


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **sections: Mapping[str, Any],
) -> Path:
    """Train as `tsqlora train` does, and return the run directory: run.json, scores.parquet, adapter/.

    Settings are those of the command line's YAML, by section:

        run = tsqlora.train(model={"path": "minilm"}, data={"train": "rows.csv"}, training={"epochs": 2})
        tsqlora.report(run)

    Args:
        config: a YAML file, or all settings as a mapping; `sections` win over it.
        out: the run directory; by default runs/DATE-NAME, by the name of the file or of the data.
        resume: continue the run in `out`, or the newest one of this name.

    Raises SettingsError and DataError as the command line does.
    """
    from tsqlora.run import train as pipeline
    from tsqlora.run.config import load_config
    from tsqlora.run.config.file import merged
    from tsqlora.training.run_dir import dated

    mapping, path = (config, None) if isinstance(config, Mapping) else ({}, config)
    settings = load_config(path, sections=merged(mapping, sections))
    run = Path(out) if out is not None else dated(settings.data.train if path is None else str(path), resume=resume)
    with Display(Console(stderr=True)) as display:
        pipeline.train(settings, run, resume=resume, progress=display.progress)
    return run
