"""A run directory -> what its report shows, as plain values of bounded size."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsqlora.errors import DataError
from tsqlora.quality.scores import Scores
from tsqlora.record import RECORD_FILE, RunRecord
from tsqlora.report.distributions import Distribution, distributions
from tsqlora.report.samples import Samples, choose_samples
from tsqlora.yaml12 import load_yaml

# As the run directory has them; training, which names them too, is not imported here.
CONFIG_FILE = "config.yaml"
SCORES_FILE = "scores.parquet"


@dataclass(frozen=True, slots=True)
class Gathered:
    """All that a page is made of.

    What is missing is None, and `missing` says why: by `scores`, `history` and `events`.
    """

    name: str
    record: RunRecord
    settings: str
    config: dict[str, Any]
    distributions: list[Distribution] | None
    samples: Samples | None
    missing: dict[str, str]


def gather(run: Path) -> Gathered:
    """Reads run.json, config.yaml, scores.parquet and, where it still is, the file of the training rows.

    Raises DataError where the directory is no run, is not finished, or holds what cannot be read.
    """
    record = RunRecord.load(run)
    if record.status != "finished":
        raise DataError(
            f"{run / RECORD_FILE} says '{record.status}': the run has not finished; "
            f"go on with: tsqlora train {run / CONFIG_FILE} --out {run} --resume"
        )
    settings, config = _config(run / CONFIG_FILE)
    scores = Scores.load(run / SCORES_FILE) if (run / SCORES_FILE).exists() else None
    return Gathered(
        name=run.resolve().name,
        record=record,
        settings=settings,
        config=config,
        distributions=None if scores is None else distributions(scores),
        samples=None if scores is None else choose_samples(scores),
        missing=_missing(record, config, scored=scores is not None),
    )


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
    if not scored and not record.quality.get("enabled"):
        missing["scores"] = "Rows were not scored: quality.enabled is false, so every draw was a random one."
    elif not scored and record.quality.get("refused"):
        missing["scores"] = f"Rows were not scored: {record.quality['refused']}."
    elif not scored:
        missing["scores"] = f"The directory has no {SCORES_FILE}: what it says of the rows is left out."
    if not record.history:
        missing["history"] = "The run logged no losses (training.logging_strategy is no, or an older version wrote it)."
    if not record.rank_events:
        policy = config.get("ranks", {}).get("policy")
        missing["events"] = f"Ranks never moved: ranks.policy is {policy}."
    return missing
