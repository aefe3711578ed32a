"""What can be compared: methods, policies that choose their rows, and how both are made from a job.

To compare another method, add an entry to `tsqlora.baselines.BASELINES` or to METHODS; for another
choice of rows one to POLICIES.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tsqlora.adapter.slots import active_parameters, find_slots
from tsqlora.baselines import BASELINES, Built, Setup
from tsqlora.compare.cells import Entry
from tsqlora.errors import SettingsError, nearest
from tsqlora.progress import Progress
from tsqlora.quality.subset import QualitySubset
from tsqlora.run.callbacks import control_rule, quality_callback, rank_callback, scoring_rule, subset
from tsqlora.run.job import Job, with_slots
from tsqlora.run.plan import require_ranks
from tsqlora.training.quality_callback import QualityCallback
from tsqlora.training.rank_callback import RankCallback


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train: a baseline's model, or ours."""

    policy: str
    """The rows that it has unless `METHOD+POLICY` names others."""
    baseline: str | None
    """The entry of BASELINES; None is ours, with the config's `ranks`."""
    moves: bool = False
    """Whether ranks move also where the config has them fixed."""


METHODS: Mapping[str, Method] = {name: Method("all", name) for name in BASELINES} | {
    "tsqlora": Method("quality", None),
    "tsqlora-quality-only": Method("quality", "lora"),
    "tsqlora-ranks-only": Method("all", None, moves=True),
}


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a run, and what chooses them."""

    data: QualitySubset
    quality: QualityCallback | None = None


Policy = Callable[[Job, Path, Progress | None], Rows]


def _all(job: Job, scores_path: Path, progress: Progress | None) -> Rows:
    return Rows(subset(job, 1.0))


def _head(job: Job, scores_path: Path, progress: Progress | None) -> Rows:
    data = subset(job, 1.0)
    return Rows(data, quality_callback(job, data, scores_path, progress, rule=control_rule(job.config)))


def _even(job: Job, scores_path: Path, progress: Progress | None) -> Rows:
    data = subset(job, job.config.quality.fraction)
    return Rows(data, quality_callback(job, data, scores_path, progress, rule=control_rule(job.config)))


def _random(job: Job, scores_path: Path, progress: Progress | None) -> Rows:
    return Rows(subset(job, job.config.quality.fraction))


def _quality(job: Job, scores_path: Path, progress: Progress | None) -> Rows:
    data = subset(job, job.config.quality.fraction)
    return Rows(data, quality_callback(job, data, scores_path, progress))


def _by_term(term: str) -> Policy:
    """A softmax of one term alone, which no guard of ours turns back: of more of it, more rows."""

    def rows(job: Job, scores_path: Path, progress: Progress | None) -> Rows:
        data = subset(job, job.config.quality.fraction)
        rule = replace(scoring_rule(job.config), weights={term: 1.0}, temperature=1.0, reject=False, guard=False)
        return Rows(data, quality_callback(job, data, scores_path, progress, rule=rule))

    return rows


POLICIES: Mapping[str, Policy] = {
    "all": _all,
    "head": _head,
    "even": _even,
    "random": _random,
    "quality": _quality,
    "loss": _by_term("loss"),
    "el2n": _by_term("el2n"),
    "gradnorm": _by_term("gradient_norm"),
}


def crossed(methods: Iterable[str], policies: Sequence[str]) -> list[str]:
    """Every method with every policy, as METHOD+POLICY; the methods as they are where no policy is named.

    Raises SettingsError for a method that names a policy of its own beside `policies`.

    >>> crossed(["lora", "dora"], ["all", "random"])
    ['lora+all', 'lora+random', 'dora+all', 'dora+random']
    """
    names = list(methods)
    for name in names:
        method, plus, _ = name.partition("+")
        if plus and policies:
            raise SettingsError(
                f"--policies crosses every method, and --methods names '{name}' with one of its own; give {method} "
                "alone, or leave out --policies"
            )
    return [f"{name}+{policy}" for name in names for policy in policies] if policies else names


def entries(methods: Iterable[str]) -> list[Entry]:
    """What METHOD or METHOD+POLICY names; SettingsError for unknown names, and for two of a kind.

    >>> [entry.name for entry in entries(["lora", "lora+random", "tsqlora"])]
    ['lora+all', 'lora+random', 'tsqlora+quality']
    """
    found: list[Entry] = []
    for name in methods:
        method, plus, policy = name.partition("+")
        if method not in METHODS:
            raise SettingsError(f"--methods: '{method}' is unknown; {nearest(method, METHODS)}")
        entry = Entry(method, policy if plus else METHODS[method].policy)
        if entry.policy not in POLICIES:
            raise SettingsError(f"policy '{entry.policy}' is unknown; {nearest(entry.policy, POLICIES)}")
        if entry in found:
            raise SettingsError(f"--methods names {entry.name} twice")
        found.append(entry)
    if not found:
        raise SettingsError(f"--methods is empty; choices: {', '.join(METHODS)}")
    return found


def build(job: Job, method: str, *, steps: int) -> tuple[Built, RankCallback | None]:
    """The method's model, and our ranks where they move; the job's pretrained model is changed in place."""
    config, baseline = job.config, METHODS[method].baseline
    if baseline is None:
        if METHODS[method].moves and config.ranks.policy == "fixed":
            config = config.model_copy(update={"ranks": config.ranks.model_copy(update={"policy": "tsqlora"})})
            job = replace(job, config=config)
        model, ranks = with_slots(config, job.pretrained), rank_callback(job)
        require_ranks(config, {name: slots.shape for name, slots in find_slots(model).items()})
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
    return BASELINES[baseline](setup), None
