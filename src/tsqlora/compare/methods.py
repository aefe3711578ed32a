"""Methods and row policies that can be compared, and how a job builds them.

To add a method, add an entry to `tsqlora.baselines.BASELINES` or to METHODS; to add a choice of rows, one to POLICIES.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tsqlora.adapter.slots import active_parameters, active_ranks
from tsqlora.baselines import BASELINES, Built, Setup
from tsqlora.errors import SettingsError, nearest
from tsqlora.progress import Progress
from tsqlora.quality.rule import ScoringRule
from tsqlora.run.callbacks import control_rule, moving, quality_callback, rank_callback, scoring_rule, subset
from tsqlora.run.config import Config
from tsqlora.run.job import Job, with_adapter
from tsqlora.training.fit import Method
from tsqlora.training.rank_callback import RankCallback


@dataclass(frozen=True, slots=True)
class Entry:
    """A method, and the policy that chooses its rows."""

    method: str
    policy: str

    @property
    def name(self) -> str:
        """The entry as `--methods` names it.

        >>> Entry("lora", "random").name
        'lora+random'
        """
        return f"{self.method}+{self.policy}"


@dataclass(frozen=True, slots=True)
class Way:
    """A way to train: a baseline's model, or ours.

    Args:
        policy: the choice of rows, unless `METHOD+POLICY` names another.
        baseline: the entry of BASELINES; None is our model with the config's `ranks`.
        moves: whether ranks move even if the config fixes them.
    """

    policy: str
    baseline: str | None
    moves: bool = False


METHODS: Mapping[str, Way] = {name: Way("all", name) for name in BASELINES} | {
    "tsqlora": Way("quality", None),
    "tsqlora-quality-only": Way("quality", "lora"),
    "tsqlora-ranks-only": Way("all", None, moves=True),
}


@dataclass(frozen=True, slots=True)
class Policy:
    """A choice of rows: `rule` scores and draws them; without a rule they are drawn at random.

    An epoch has the share `quality.fraction` of the rows, or `all_rows`.
    """

    rule: Callable[[Config], ScoringRule] | None = None
    all_rows: bool = False

    def __call__(self, job: Job, scores_path: Path, progress: Progress | None) -> Method:
        data = subset(job, 1.0 if self.all_rows else job.config.quality.fraction)
        if self.rule is None:
            return Method(data)
        return Method(data, quality_callback(job, data, scores_path, progress, rule=self.rule(job.config)))


def _by_term(term: str) -> Policy:
    """Sample by the softmax of one term, without a fallback to random rows."""

    def rule(config: Config) -> ScoringRule:
        return replace(scoring_rule(config), weights={term: 1.0}, temperature=1.0, judge=False)

    return Policy(rule)


POLICIES: Mapping[str, Policy] = {
    "all": Policy(all_rows=True),
    "head": Policy(control_rule, all_rows=True),
    "even": Policy(control_rule),
    "random": Policy(),
    "quality": Policy(scoring_rule),
    "loss": _by_term("loss"),
    "el2n": _by_term("el2n"),
    "gradnorm": _by_term("gradient_norm"),
}


def entries(methods: Iterable[str]) -> list[Entry]:
    """Parse METHOD and METHOD+POLICY.  Raises SettingsError for unknown names and for duplicates.

    >>> [entry.name for entry in entries(["lora", "lora+random", "tsqlora"])]
    ['lora+all', 'lora+random', 'tsqlora+quality']
    """
    parsed: list[Entry] = []
    for name in methods:
        method, plus, policy = name.partition("+")
        if method not in METHODS:
            raise SettingsError(f"--methods: '{method}' is unknown; {nearest(method, METHODS)}")
        entry = Entry(method, policy if plus else METHODS[method].policy)
        if entry.policy not in POLICIES:
            raise SettingsError(f"policy '{entry.policy}' is unknown; {nearest(entry.policy, POLICIES)}")
        if entry in parsed:
            raise SettingsError(f"--methods names {entry.name} twice; remove one")
        parsed.append(entry)
    if not parsed:
        raise SettingsError(f"--methods is empty; choices: {', '.join(METHODS)}")
    return parsed


def build(job: Job, method: str, *, steps: int) -> tuple[Built, RankCallback | None]:
    """Build the method's model, and our RankCallback if ranks move; changes the job's pretrained model in place."""
    config, baseline = job.config, METHODS[method].baseline
    if baseline is None:
        if METHODS[method].moves:
            config = moving(config)
        model, ranks = with_adapter(config, job.pretrained), rank_callback(replace(job, config=config))
        final = (lambda: ranks.final) if ranks else (lambda: active_ranks(model))
        return Built(model, (), lambda: active_parameters(model), final), ranks
    setup = Setup(
        pretrained=job.pretrained,
        mean_rank=config.ranks.mean,
        alpha=config.adapter.alpha,
        dropout=config.adapter.dropout,
        target_modules=config.adapter.target_modules,
        steps=steps,
        seed=config.training.seed,
    )
    return BASELINES[baseline](setup), None
