"""Commands from Python and notebooks: `tsqlora.train`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tsqlora.cli import console


def audit(
    subject: Any,
    dataset: Any = None,
    collate: Any = None,
    *,
    classes: Sequence[str | int] | None = None,
    rows: Any = None,
    compute: Any = None,
    data: Any = None,
    evaluation: Any = None,
    out: str | os.PathLike[str] | None = None,
) -> Any:
    """Find what is wrong with rows: the labels of a classifier's rows, or what a Trainer will train on.

    For a model with its dataset and collator, and for the Trainer of a classifier, it returns an `Audit` of the labels,
    as `audit` of `tsqlora.auditing.labels.suspects` does. For a Trainer of a model that writes (SFTTrainer, DPOTrainer)
    it returns the ledger and the findings, as `tsqlora audit` does:

        result = tsqlora.audit(trainer, data=rows)
        [(finding["name"], finding["places"]) for finding in result["findings"]]

    Args:
        subject: the model, or the Trainer.
        classes, rows, compute: for labels: class names, row ids, and how to compute.
        data: for a Trainer: the source rows of its train_dataset, as a file, a list of dicts or a
            datasets.Dataset; by default the columns that train_dataset still has.
        evaluation: rows that must not be among the training rows.
        out: a directory for ledger.parquet, findings.json, suspects.csv and audit.html; without it the result has
            the ledger as a pyarrow table.

    Raises UnsupportedError, DataError and SettingsError, naming what cannot be audited.
    """
    from transformers import Trainer

    from tsqlora.auditing.draw.subset import undrawn
    from tsqlora.tasks.forward import base_model, generates

    if isinstance(subject, Trainer) and not generates(base_model(cast(Any, subject.model))):
        from tsqlora.errors import SettingsError
        from tsqlora.libs.transformers import row_collator

        if idle := [
            name for name, value in (("data", data), ("evaluation", evaluation), ("out", out)) if value is not None
        ]:
            raise SettingsError(f"an audit of labels takes no {' or '.join(idle)}; leave it out")
        subject, dataset, collate = subject.model, undrawn(subject.train_dataset), row_collator(subject)
    if isinstance(subject, Trainer):
        from tsqlora.auditing.texts.command import audit_trainer

        return audit_trainer(subject, data=data, evaluation=evaluation, out=None if out is None else Path(out))
    from tsqlora.auditing.labels.suspects import audit as audit_labels

    return audit_labels(subject, dataset, collate, classes=classes, rows=rows, compute=compute)


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    look: str | os.PathLike[str] | None = None,
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
        look: a folder of `tsqlora look`, in place of a look.
        resume: continue the run in `out`, or the newest one of this name.

    Raises SettingsError and DataError as the command line does.
    """
    from tsqlora.run_dir import dated
    from tsqlora.settings import load_config
    from tsqlora.settings.file import merged
    from tsqlora.training import command as pipeline

    mapping, path = (config, None) if isinstance(config, Mapping) else ({}, config)
    settings = load_config(path, sections=merged(mapping, sections))
    run = Path(out) if out is not None else dated(settings.data.train if path is None else str(path), resume=resume)
    with console.progress() as display:
        folder = None if look is None else Path(look).absolute()
        pipeline.train(settings, run, look=folder, resume=resume, progress=display.progress)
    return run
