"""What can be compared: methods, policies that choose their rows, and how both are made from a job.

To compare another method, add an entry to `tsqlora.baselines.RIVALS` or to METHODS; for another
choice of rows one to POLICIES.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tsqlora.adapter.slots import active_parameters
from tsqlora.baselines import RIVALS, Built, Setup
from tsqlora.compare.cells import Entry
from tsqlora.errors import SettingsError, nearest
from tsqlora.progress import Progress
from tsqlora.quality.subset import QualitySubset
from tsqlora.run.job import Job, quality_half, ranks_half, subset, with_slots
from tsqlora.training.quality_callback import QualityCallback
from tsqlora.training.rank_callback import RankCallback


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train: a rival's model, or ours whose ranks move."""

    policy: str
    """The rows that it has unless others are asked for."""
    rival: str | None
    """The entry of RIVALS; None is ours."""


METHODS: Mapping[str, Method] = {name: Method("all", name) for name in RIVALS} | {
    "tsqlora": Method("quality", None),
    "tsqlora-quality-only": Method("quality", "lora"),
    "tsqlora-ranks-only": Method("all", None),
}


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a run, and what chooses them."""

    data: QualitySubset
    quality: QualityCallback | None = None


Policy = Callable[[Job, Path, Progress | None], Rows]


def _all(job: Job, scores_path: Path, progress: Progress | None) -> Rows:
    return Rows(subset(job, 1.0))


def _random(job: Job, scores_path: Path, progress: Progress | None) -> Rows:
    return Rows(subset(job, job.config.quality.fraction))


def _quality(job: Job, scores_path: Path, progress: Progress | None) -> Rows:
    q, data = job.config.quality, subset(job, job.config.quality.fraction)
    decides = {
        "weights": q.resolved_weights(),
        "temperature": q.resolved_temperature(),
        "reject": q.resolved_reject(),
        "guard": q.guard,
    }
    return Rows(data, quality_half(job, data, scores_path, progress, **decides))


def _by_term(term: str) -> Policy:
    """A softmax of one term alone, which no guard of ours turns back: of more of it, more rows."""

    def rows(job: Job, scores_path: Path, progress: Progress | None) -> Rows:
        data = subset(job, job.config.quality.fraction)
        decides = {"weights": {term: 1.0}, "temperature": 1.0, "reject": False, "guard": False}
        quality = quality_half(job, data, scores_path, progress, **decides)
        return Rows(data, quality)

    return rows


POLICIES: Mapping[str, Policy] = {
    "all": _all,
    "random": _random,
    "quality": _quality,
    "loss": _by_term("loss"),
    "el2n": _by_term("el2n"),
    "gradnorm": _by_term("gradient_norm"),
}


def entries(methods: Iterable[str], policies: Sequence[str] = ()) -> list[Entry]:
    """What is compared: METHOD, METHOD+POLICY, or with `policies` every method with each.

    Raises SettingsError for unknown names, for two of a kind, and for a policy of its own beside `policies`.

    >>> [entry.name for entry in entries(["lora", "lora+random", "tsqlora"])]
    ['lora+all', 'lora+random', 'tsqlora+quality']
    """
    found: list[Entry] = []
    for given in methods:
        method, plus, policy = given.partition("+")
        if method not in METHODS:
            raise SettingsError(f"--methods: '{method}' is unknown; {nearest(method, METHODS)}")
        if plus and policies:
            raise SettingsError(
                f"--policies crosses every method, and --methods names '{given}' with one of its own; give {method} "
                "alone, or leave out --policies"
            )
        chosen = [policy] if plus else policies or [METHODS[method].policy]
        for name in chosen:
            if name not in POLICIES:
                raise SettingsError(f"policy '{name}' is unknown; {nearest(name, POLICIES)}")
            if Entry(method, name) in found:
                raise SettingsError(f"--methods names {method}+{name} twice")
            found.append(Entry(method, name))
    if not found:
        raise SettingsError(f"--methods is empty; choices: {', '.join(METHODS)}")
    return found


def build(job: Job, method: str, *, steps: int) -> tuple[Built, RankCallback | None]:
    """The method's model, and our ranks where they move; the job's pretrained model is changed in place."""
    config, rival = job.config, METHODS[method].rival
    if rival is None:
        model, ranks = with_slots(config, job.pretrained), ranks_half(job)
        return Built(model, (), lambda: active_parameters(model), lambda: ranks.final), ranks
    setup = Setup(
        pretrained=job.pretrained,
        mean_rank=config.ranks.mean,
        max_rank=config.ranks.resolved_max(),
        alpha=config.adapter.alpha,
        dropout=config.adapter.dropout,
        target_modules=config.adapter.target_modules,
        steps=steps,
        samples=job.data.samples["train"].samples,
        collate=job.collate,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
    )
    return RIVALS[rival](setup), None
