"""Read a run directory for its report, in bounded size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsqlora.compat.yaml import dump_yaml, load_yaml
from tsqlora.errors import DataError
from tsqlora.files import reading
from tsqlora.quality.scores import Scores
from tsqlora.reports.figures import Drawn, histograms
from tsqlora.reports.samples import Samples, choose_samples
from tsqlora.training.record import RECORD_FILE, RunRecord
from tsqlora.training.run_dir import CONFIG_FILE, SCORES_FILE


@dataclass(frozen=True, slots=True)
class ScoresView:
    """Histograms and samples of a scores file."""

    histograms: list[Drawn]
    samples: Samples


@dataclass(frozen=True, slots=True)
class Gathered:
    """A run's files. `missing` has the reasons for missing scores, history and events."""

    name: str
    record: RunRecord
    settings: str
    config: dict[str, Any]
    scores: ScoresView | None
    missing: dict[str, str]


def read_scores(path: Path, texts: Sequence[str] | None = None) -> ScoresView:
    """Read a scores file; `texts` are its rows' texts, if the file does not name their source."""
    scores = Scores.load(path)
    return ScoresView(histograms(scores), choose_samples(scores, texts))


def gather(run: Path, *, read: Callable[[Path], ScoresView] = read_scores) -> Gathered:
    """Read run.json, config.yaml, scores.parquet and, if it still exists, the file of the training rows.

    For a training in the user's own Trainer, run.json has the settings.  Raises DataError if the directory is no run or
    cannot be read.
    """
    record = RunRecord.load(run)
    if record.settings:
        settings, config = dump_yaml(record.settings), record.settings
    else:
        settings, config = read_config(run / CONFIG_FILE)
    # A Trainer's output_dir may hold the scores of an earlier training.
    scored = record.quality.get("enabled") or not record.settings
    scores = read(run / SCORES_FILE) if scored and (run / SCORES_FILE).exists() else None
    return Gathered(
        name=run.resolve().name,
        record=record,
        settings=settings,
        config=config,
        scores=scores,
        missing=_missing(record, config, scored=scores is not None),
    )


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The text and the settings of a run's config.yaml.  Raises DataError for any other file."""
    reading(path)
    try:
        text = path.read_text(encoding="utf-8")
        config = dict(load_yaml(text))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; copy the run's settings beside {RECORD_FILE}") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: no settings of a run ({str(error).splitlines()[0]})") from None
    data = config.get("data")
    for name, path in data.items() if isinstance(data, dict) else ():
        if name in ("train", "trusted", "validation", "test") and path is not None:
            reading(str(path))
    return text, config


def _missing(record: RunRecord, config: dict[str, Any], *, scored: bool) -> dict[str, str]:
    running, missing = record.status != "finished", dict[str, str]()
    if not scored:
        missing["scores"] = _no_scores(record, running=running)
    if not record.history:
        no_log = "logging_strategy is no, or logging_steps is above the number of steps"
        missing["history"] = "Nothing is logged yet." if running else f"The run logged no losses: {no_log}."
    if not record.rank_events:
        missing["events"] = _no_events(record, config, running=running)
    return missing


def _no_events(record: RunRecord, config: dict[str, Any], *, running: bool) -> str:
    ranks = config.get("ranks")
    if ranks is None:
        return "Ranks did not change: there was no RankCallback."
    if ranks.get("policy") == "fixed":
        return "Ranks never moved: ranks.policy is fixed."
    return "Ranks have not moved yet." if running else "Ranks never moved; the notes on this page say why."


def _no_scores(record: RunRecord, *, running: bool) -> str:
    if not record.quality.get("enabled"):
        why = "there was no QualityCallback" if record.settings else "quality.enabled is false"
        return f"Rows were not scored: {why}, so every draw was random."
    if running:
        return "Rows are not scored yet; this happens before the first step."
    return f"The directory has no {SCORES_FILE}, so the page has no rows."
