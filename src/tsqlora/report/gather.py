"""A run directory -> what its report shows, as plain values of bounded size."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsqlora.compat.yaml import load_yaml
from tsqlora.errors import DataError
from tsqlora.quality.scores import Scores
from tsqlora.report.distributions import Distribution, distributions
from tsqlora.report.samples import Samples, choose_samples
from tsqlora.training.record import RECORD_FILE, RunRecord

# As the run directory has them; training, which names them too, is not imported here.
CONFIG_FILE = "config.yaml"
SCORES_FILE = "scores.parquet"


@dataclass(frozen=True, slots=True)
class Control:
    """Another run, with which a run is compared."""

    name: str
    record: RunRecord


@dataclass(frozen=True, slots=True)
class Gathered:
    """All that a page is made of.

    What is missing is None, and `missing` says why: by `scores`, `history` and `events`. `control` is another run, with
    which this one is compared.
    """

    name: str
    record: RunRecord
    settings: str
    config: dict[str, Any]
    distributions: list[Distribution] | None
    samples: Samples | None
    missing: dict[str, str]
    control: Control | None = None


OfScores = tuple[list[Distribution], Samples]


def look_at(path: Path) -> OfScores:
    """What is shown of a file of scores."""
    scores = Scores.load(path)
    return distributions(scores), choose_samples(scores)


def gather(
    run: Path, *, control: Control | None = None, unfinished: bool = False, look: Callable[[Path], OfScores] = look_at
) -> Gathered:
    """Reads run.json, config.yaml, scores.parquet and, where it still is, the file of the training rows.

    Raises DataError where the directory is no run, holds what cannot be read, or, without `unfinished`, where the run
    has not finished.
    """
    record = RunRecord.load(run)
    if record.status != "finished" and not unfinished:
        raise DataError(
            f"{run / RECORD_FILE} says '{record.status}': the run has not finished; look at it while it runs "
            f"by --watch, or go on with: tsqlora train {run / CONFIG_FILE} --out {run} --resume"
        )
    settings, config = _config(run / CONFIG_FILE)
    seen = look(run / SCORES_FILE) if (run / SCORES_FILE).exists() else None
    return Gathered(
        name=run.resolve().name,
        record=record,
        settings=settings,
        config=config,
        distributions=None if seen is None else seen[0],
        samples=None if seen is None else seen[1],
        missing=_missing(record, config, scored=seen is not None),
        control=control,
    )


def control_of(run: Path) -> Control:
    """A run as the one that another is compared with.  Raises DataError where it is none, or has not finished."""
    record = RunRecord.load(run)
    if record.status != "finished":
        raise DataError(f"{run / RECORD_FILE} says '{record.status}': a control must have finished; name another")
    return Control(run.resolve().name, record)


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, dict(load_yaml(text))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a run has one, copy it beside {RECORD_FILE}") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not a run's settings ({str(error).splitlines()[0]})") from None


def _missing(record: RunRecord, config: dict[str, Any], *, scored: bool) -> dict[str, str]:
    missing: dict[str, str] = {}
    begun = record.status != "finished"
    if not scored and begun and record.quality.get("enabled") and not record.quality.get("refused"):
        missing["scores"] = "Rows are not scored yet: that comes after the warm-up."
    elif not scored and not record.quality.get("enabled"):
        missing["scores"] = "Rows were not scored: quality.enabled is false, so every draw was a random one."
    elif not scored and record.quality.get("refused"):
        missing["scores"] = f"Rows were not scored: {record.quality['refused']}."
    elif not scored:
        missing["scores"] = f"The directory has no {SCORES_FILE}: what it says of the rows is left out."
    if not record.history and begun:
        missing["history"] = "Nothing was logged yet."
    elif not record.history:
        missing["history"] = "The run logged no losses (training.logging_strategy is no, or an older version wrote it)."
    policy = config.get("ranks", {}).get("policy")
    if not record.rank_events and begun and policy != "fixed":
        missing["events"] = "Ranks have not moved yet."
    elif not record.rank_events:
        missing["events"] = f"Ranks never moved: ranks.policy is {policy}."
    return missing
