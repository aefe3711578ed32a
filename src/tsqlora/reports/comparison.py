"""What the runs of a comparison say together: means over seeds, differences from LoRA, and verdicts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tsqlora.reports.metrics import lower_is_better
from tsqlora.training.record import RunRecord

COMPARISON_FILE = "comparison.json"
CONFIDENCE = 0.95
FEWEST = 3
"""Seeds that a verdict needs: one or two may agree by chance."""
CHOSEN_ON_SHOWN = (
    "There are no test rows: the first seed's numbers come from the validation rows that chose its learning rate, so "
    "they are the best of several. Set data.test for an independent measure."
)


class Mean(NamedTuple):
    """A mean over n seeds and the half width of its 95 % interval; None for one seed."""

    mean: float
    half: float | None
    n: int


def interval(values: Sequence[float]) -> Mean:
    """Student's t-interval of the mean of at least one value.

    >>> interval([1.0, 2.0, 3.0])
    Mean(mean=2.0, half=2.484..., n=3)
    """
    import scipy.stats  # half a second that a run's report need not wait for

    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Mean(mean, None, n)
    # Not ttest_rel's interval: it warns if all values are equal, as for runs with the same draws.
    half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * scipy.stats.sem(values)
    return Mean(mean, float(half), n)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Mean | None:
    """The paired difference, ours minus theirs, over common seeds; None if there are none."""
    seeds = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def verdict(difference: Mean | None, other: str, *, lower_is_better: bool = False) -> str:
    """The difference in words.

    >>> verdict(Mean(0.02, 0.03, 3), "lora")
    'within noise of lora'
    >>> verdict(Mean(0.05, 0.03, 3), "lora")
    'better than lora'
    >>> verdict(Mean(0.05, 0.03, 3), "lora", lower_is_better=True)
    'worse than lora'
    """
    if difference is None:
        return f"no seed in common with {other}"
    if difference.half is None or difference.n < FEWEST:
        return f"{difference.n} seed{'s' if difference.n > 1 else ''}: too few to tell from {other}"
    if abs(difference.mean) <= difference.half:
        return f"within noise of {other}"
    return f"{'better' if (difference.mean > 0) != lower_is_better else 'worse'} than {other}"


def name_of(run: RunRecord) -> str:
    """METHOD+POLICY."""
    return f"{run.compared['method']}+{run.compared['policy']}"


def measured_on(run: RunRecord) -> str:
    """The split whose metrics count: test rows if there are any, else validation rows."""
    return "test" if "test" in run.metrics else "validation"


def seconds_of(run: RunRecord) -> float:
    """Of all phases but the evaluation."""
    return sum(cost.seconds for phase, cost in run.cost.items() if phase != "evaluation")


@dataclass(frozen=True, slots=True)
class Method:
    """The runs of a method with a choice of rows, one a seed; a failed seed counts only in `failed`.

    `difference` is from the reference in the metric; None for the reference itself and without a common seed. Means
    need at least one run that did not fail.
    """

    name: str
    runs: list[RunRecord]
    verdict: str = "the reference"
    difference: Mean | None = None

    @property
    def trained(self) -> list[RunRecord]:
        return [run for run in self.runs if run.status != "failed"]

    @property
    def failed(self) -> dict[int, str]:
        """Why, by seed."""
        return {run.seed: str(run.compared["failed"]) for run in self.runs if run.status == "failed"}

    @property
    def at_random(self) -> dict[int, str]:
        """By seed, why rows were drawn at random although the policy scores."""
        return {run.seed: str(why) for run in self.trained if (why := run.compared.get("random"))}

    @property
    def metrics(self) -> dict[str, Mean]:
        """The mean of each metric; empty if every seed failed."""
        names = self.trained[0].metrics[measured_on(self.trained[0])] if self.trained else ()
        return {name: interval([*self.by_seed(name).values()]) for name in names}

    def by_seed(self, metric: str) -> dict[int, float]:
        return {run.seed: run.metrics[measured_on(run)][metric] for run in self.trained}

    @property
    def steps(self) -> int:
        return max(run.plan["steps"] for run in self.trained)

    @property
    def trainable(self) -> tuple[float, int, int]:
        """Parameters at the end: the mean, the least and the most."""
        counts = [run.parameters["trainable"] for run in self.trained]
        return math.fsum(counts) / len(counts), min(counts), max(counts)

    @property
    def memory(self) -> int:
        return max(run.compared["peak_memory_bytes"] for run in self.trained)

    @property
    def learning_rates(self) -> list[float]:
        return sorted({run.compared["learning_rate"] for run in self.runs})

    def row(self) -> dict[str, Any]:
        """The method's row of the table, ready for JSON."""
        about = self.runs[0].compared
        row: dict[str, Any] = {
            "name": self.name,
            "method": about["method"],
            "policy": about["policy"],
            "seeds": [run.seed for run in self.trained],
            "failed": [*self.failed],
            "random": [*self.at_random],
            "learning_rates": self.learning_rates,
        }
        if self.trained:
            mean, least, most = self.trainable
            row |= {
                "split": measured_on(self.trained[0]),
                "metrics": {name: mean._asdict() for name, mean in self.metrics.items()},
                "seconds": interval([*map(seconds_of, self.trained)])._asdict(),
                "steps": self.steps,
                "trainable": most,
                "trainable_mean": mean,
                "trainable_range": [least, most],
                "peak_memory_bytes": self.memory,
            }
            if self.verdict != "the reference":
                row["difference"] = None if self.difference is None else self.difference._asdict()
        return row | {"verdict": self.verdict}


def methods_of(runs: Sequence[RunRecord], metric: str) -> list[Method]:
    """One method a name, in the order of the runs, each compared with LoRA on all rows, else LoRA, else the first."""
    names = list(dict.fromkeys(map(name_of, runs)))
    of = {name: [run for run in runs if name_of(run) == name] for name in names}
    loras = [name for name in names if name.startswith("lora+")]
    against = "lora+all" if "lora+all" in loras else (loras or names)[0]
    theirs = Method(against, of[against]).by_seed(metric)
    methods: list[Method] = []
    for name in names:
        method = Method(name, of[name])
        if not method.trained:
            method = Method(name, of[name], "every seed failed")
        elif name != against:
            difference = paired(method.by_seed(metric), theirs)
            words = verdict(difference, against, lower_is_better=lower_is_better(metric))
            method = Method(name, of[name], words, difference)
        methods.append(method)
    return methods


def made_by(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """How the runs were made: their commits, versions of libraries, and precisions."""
    values: dict[str, set[str]] = {}
    for run in runs:
        about = {"commit": run.compared["commit"] or "an installed package", **run.versions}
        about["precision"] = "bfloat16" if run.compared["bf16"] else "float32"
        for name, value in about.items():
            values.setdefault(name, set()).add(str(value))
    return {name: sorted(several) for name, several in values.items()}


def counted(mean: float, low: int, high: int) -> str:
    """A mean count over seeds, with minimum and maximum if they differ.

    >>> counted(1010.0, 1000, 1020), counted(1000.0, 1000, 1000)
    ('1,010 (1,000 to 1,020)', '1,000')
    """
    return f"{mean:,.0f} ({low:,} to {high:,})" if low != high else f"{mean:,.0f}"


def short(commit: str) -> str:
    """
    >>> short("0123456789abcdef0123456789abcdef01234567-dirty"), short("an installed package")
    ('0123456789ab-dirty', 'an installed package')
    """
    return commit if " " in commit else commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")
