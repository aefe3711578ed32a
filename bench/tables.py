"""Writes the tables of docs/ from bench/results/*.json: python bench/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Where a file of results has several, NAME is
the file's, a hyphen and the table's.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def quality_rules(results: Mapping[str, Any]) -> list[list[str]]:
    """Accuracy minus random's at the same steps, a column a cell; the worst; wrong labels drawn."""
    cells = list(dict.fromkeys((r["data"], r["wrong"], r["seed"]) for r in results["results"].values()))
    cells.sort(key=lambda cell: (cell[1] == 0, cell[0], cell[2]))
    found = {(r["rule"], r["data"], r["wrong"], r["seed"]): r for r in results["results"].values()}
    head = ["rule", *(f"{d} {'20 % wrong' if w else 'clean'}, seed {s}" for d, w, s in cells), "worst", "wrong drawn"]
    rows = [head]
    for rule in dict.fromkeys(r["rule"] for r in results["results"].values()):
        runs = [found.get((rule, *cell)) for cell in cells]
        controls = [found.get(("random", *cell)) for cell in cells]
        gains = [r["accuracy"] - c["accuracy"] if r and c else None for r, c in zip(runs, controls, strict=True)]
        shown = [_shown(rule, r, gain) for r, gain in zip(runs, gains, strict=True)]
        worst = min(gain for gain in gains if gain is not None)
        drawn = [r["wrong_drawn"] for r in runs if r and r["wrong"]]
        rows.append([rule, *shown, f"{100 * worst:+.1f}", f"{np.mean(drawn):.0%}" if drawn else "–"])
    return rows


def _shown(rule: str, run: Mapping[str, Any] | None, gain: float | None) -> str:
    if run is None or gain is None:
        return "–"
    return f"{100 * run['accuracy']:.1f}" if rule == "random" else f"{100 * gain:+.1f}"


def rank_agreement(results: Mapping[str, Any]) -> list[list[str]]:
    """Spearman's correlation of final ranks between seeds, by estimator."""
    rows = [["estimator", "seeds 0, 1", "seeds 0, 2", "seeds 1, 2", "ranks at the end", "slots moved"]]
    for estimator, values in results["spearman"].items():
        runs = [run for key, run in results["runs"].items() if key.startswith(f"{estimator}/")]
        ranks = [rank for run in runs for rank in run["ranks"].values()]
        moved = [sum(run["moved"]) for run in runs]
        rows.append(
            [estimator, *(f"{v:+.2f}" for v in values), f"{min(ranks)} to {max(ranks)}", ", ".join(map(str, moved))]
        )
    return rows


def selection_cells(results: Mapping[str, Any]) -> list[list[str]]:
    """A row a cell: test accuracy of random, and each rule's points above or below it."""
    runs = {run: 100 * accuracy for run, accuracy in _selection(results).items()}
    cells = sorted({cell for _, cell in runs}, key=lambda cell: (-cell[1], -cell[3], cell[0], cell[2]))
    return _cell_by_cell({cell: _cell_name(cell) for cell in cells}, _rules(runs), runs)


def _cell_by_cell(cells: Mapping[Any, str], columns: Sequence[str], points: Mapping[Any, float]) -> list[list[str]]:
    """Points of the first column, and how far the others are above or below them."""
    rows = [["cell", *columns]]
    control, *others = columns
    for cell, name in cells.items():
        base = points[control, cell]
        gains = [f"{points[o, cell] - base:+.1f}" if (o, cell) in points else "–" for o in others]
        rows.append([name, f"{base:.1f}", *gains])
    return rows


def selection_differences(results: Mapping[str, Any]) -> list[list[str]]:
    """Paired differences in points over the cells that both have: mean, 95 % t-interval, worst cell."""
    runs = _selection(results)
    rows = [["labels", "rule", "minus", "cells", "mean", "95 % interval", "worst cell"]]
    for wrong, fraction in sorted({(cell[1], cell[3]) for _, cell in runs}, key=lambda kind: (-kind[0], -kind[1])):
        of = {(r, c): a for (r, c), a in runs.items() if (c[1], c[3]) == (wrong, fraction)}
        for rule in _rules(of):
            for other in ("random", "all"):
                pairs = {c: a - of[other, c] for (r, c), a in of.items() if r == rule and (other, c) in of}
                if rule != other and pairs:
                    labels = f"{wrong:.0%} wrong" if wrong else "clean"
                    labels += "" if fraction == 0.5 else f", fraction {fraction:g}"
                    rows.append([labels, rule, other, *_paired(pairs)])
    return rows


HALF = "C at half scale"
LEARNED = {
    "reject": ("all", "random"),
    "random": ("all",),
    "oracle": ("random", "reject"),
    HALF: ("random", "reject"),
    "-loss where evident": ("random", "reject"),
    "reject, second look": ("random", "reject"),
    **dict.fromkeys(("paper", "N", "D", "C", "loss", "EL2N", "InfoBatch"), ("random",)),
}
"""Rules and what each is compared with, where a task was learned."""


def selection_learned(results: Mapping[str, Any]) -> list[list[str]]:
    """The same with 20 % wrong labels and half of the rows, for the tasks that were learned: together, and each.

    The test loss in per cent of the other's, too.
    """
    runs = {(r, c): a for (r, c), a in _selection(results).items() if (c[1], c[3]) == (0.2, 0.5)}
    loss = _selection(results, "loss")
    rows = [["tasks", "rule", "minus", "cells", "mean", "95 % interval", "worst cell", "test loss", "95 % interval"]]
    for tasks in (("sst2", "bbc"), ("sst2",), ("bbc",)):
        for rule, others in LEARNED.items():
            for other in others:
                of = {c: a for (r, c), a in runs.items() if r == rule and c[0] in tasks and (other, c) in runs}
                if of:
                    gains = _paired({c: a - runs[other, c] for c, a in of.items()})
                    losses = np.array([100 * (loss[rule, c] / loss[other, c] - 1) for c in of])
                    lost = [f"{losses.mean():+.0f} %", _interval(losses, 0)]
                    rows.append([", ".join(tasks), rule, other, *gains, *lost])
    return rows


def _paired(pairs: Mapping[tuple[Any, ...], float]) -> list[str]:
    values = 100 * np.array(list(pairs.values()))
    worst = min(pairs, key=lambda cell: pairs[cell])
    name = f"{values.min():+.1f} ({worst[0]}, seed {worst[2]})"
    return [str(len(values)), f"{values.mean():+.1f}", _interval(values, 1), name]


def _interval(values: np.ndarray, digits: int) -> str:
    if len(values) < 2:
        return "–"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean() - half:+.{digits}f} to {values.mean() + half:+.{digits}f}"


Cell = tuple[str, float, int, float]


def _selection(results: Mapping[str, Any], metric: str = "accuracy") -> dict[tuple[str, Cell], float]:
    runs = results["results"].values()
    return {(r["rule"], (r["task"], r["wrong"], r["seed"], r["fraction"])): r["test"][metric] for r in runs}


def _rules(runs: Mapping[tuple[str, Cell], float]) -> list[str]:
    """Random first, then as many cells as a rule has."""
    names = [rule for rule, _ in runs]
    return sorted(dict.fromkeys(names), key=lambda rule: (rule != "random", -names.count(rule)))


def _cell_name(cell: Cell) -> str:
    task, wrong, seed, fraction = cell
    share = "" if fraction == 0.5 else f", fraction {fraction:g}"
    return f"{task} {f'{wrong:.0%} wrong' if wrong else 'clean'}, seed {seed}{share}"


def guard(results: Mapping[str, Any]) -> list[list[str]]:
    """A row a seed and Q: wrong labels drawn and both tests; in bold a decision against that share."""
    rows = [["seed", "Q", "wrong labels drawn", "guard, by doubt", "by convergence"]]
    for r in results["results"].values():
        worse = r["wrong_drawn"] > r["wrong"]
        tests = (r["guard"], r["by_convergence"])
        told = [f"{'drawn' if t['passed'] else 'random'} ({t['standard_errors']:+.1f})" for t in tests]
        shown = [f"**{text}**" if t["passed"] == worse else text for t, text in zip(tests, told, strict=True)]
        rows.append([str(r["seed"]), r["quality"], f"{r['wrong_drawn']:.1%} of {r['wrong']:.0%}", *shown])
    return rows


def selection_bank(results: Mapping[str, Any]) -> list[list[str]]:
    """By cell: contradictions of the most confident, the fit, what is rejected; ROC areas of finding wrong labels."""
    states = sorted(results["results"].values(), key=lambda s: (-s["wrong"], s["task"], s["seed"], -s["fraction"]))
    names = list(dict.fromkeys(name for s in states for name in s["auc"]))
    shares = list(states[0]["contradicted"])
    head = ["cell", "test accuracy", *(f"contradicted, top {float(share):.0%}" for share in shares), "best scale"]
    rows = [[*head, "rate of wrong labels", "rejected", "of them wrong", "of the wrong", *names]]
    for s in states:
        noise = s["noise"]
        rows.append(
            [
                _cell_name((s["task"], s["wrong"], s["seed"], s["fraction"])),
                f"{100 * s['accuracy']:.1f}",
                *(f"{s['contradicted'][share]:.0%}" for share in shares),
                f"{s['best_scale']:.2f}",
                f"{noise['rate']:.1%} ({noise['low']:.1%} to {noise['high']:.1%})",
                *("–" if s[key] is None else f"{s[key]:.0%}" for key in ("rejected", "precision", "recall")),
                *(f"{s['auc'][name]:.2f}" if name in s["auc"] else "–" for name in names),
            ]
        )
    return rows


def label_errors(results: Mapping[str, Any]) -> list[list[str]]:
    """Average precision of finding flipped labels, a column a data set and share: the mean over seeds."""
    runs = list(results["results"].values())
    cells = sorted({(r["data"], r["share"]) for r in runs})
    of = {cell: [r["average_precision"] for r in runs if (r["data"], r["share"]) == cell] for cell in cells}
    rows = [["high where a label may be wrong", *(f"{data} {share:.0%}" for data, share in cells)]]
    for name in runs[0]["average_precision"]:
        rows.append([name, *(f"{np.mean([found[name] for found in of[cell]]):.2f}" for cell in cells)])
    return rows


def scoring_ratios(results: Mapping[str, Any]) -> list[list[str]]:
    """Median seconds of what is timed over those of a training step; for ours, floor and peak memory too."""
    rows = [["tokens", "precision", "what", "of a training step", "of its floor", "peak memory", "largest difference"]]
    for key, cell in results["cells"].items():
        length, dtype, *decoder = key.split("/")
        length += f", {decoder[0]}" if decoder else ""
        for name, ratio in cell["ratio"].items():
            floor, memory, difference = (cell[kind].get(name) for kind in ("floor", "peak", "difference"))
            rows.append(
                [
                    length,
                    dtype,
                    name,
                    f"{ratio:.2f}",
                    "" if floor is None else f"{ratio / floor:.2f}",
                    "" if memory is None else f"{memory / cell['peak']['training step']:.2f}",
                    "" if difference is None else f"{difference:.0e}",
                ]
            )
    return rows


def harvest_cost(results: Mapping[str, Any]) -> list[list[str]]:
    """A training step's cost with a harvest, in units of one without."""
    rows = [["tokens, precision", "seconds of a plain step", "harvest", "of logits alone"]]
    for cell, found in sorted(results["cost"].items(), key=lambda item: int(item[0].split("/")[0])):
        plain, ratio = float(np.median(found["seconds"]["plain"])), found["ratio"]
        name = cell.replace("/", ", ")
        rows.append([name, f"{plain:.2f}", f"{ratio['harvest']:.2f}", f"{ratio['logits alone']:.2f}"])
    return rows


def harvest_picks(results: Mapping[str, Any]) -> list[list[str]]:
    """ROC area for wrong labels, by seed and source of the numbers; the rank correlation with the scoring pass's."""
    names = ("gradient_norm", "convergence", "cosine", "loss")
    rows = [["seed", "numbers of", *names]]
    for seed, found in results["picks"].items():
        for source, areas in found["roc_area"].items():
            rows.append([seed, source, *(f"{areas[n]:.2f}" if n in areas else "–" for n in names)])
        rows.append([seed, "rank correlation of the first two", *(f"{found['correlation'][n]:+.2f}" for n in names)])
    return rows


_OF_RANKS = ["cells", "points", "95 % interval", "worst cell", "test loss", "95 % interval"]


def ranks_differences(results: Mapping[str, Any]) -> list[list[str]]:
    """A variant minus uniform ranks over the cells that both have: points, and test loss in per cent of uniform's."""
    runs = _ranks(results)
    rows = [["mean rank", "variant", *_OF_RANKS]]
    kinds = Counter((cell[2], variant) for variant, cell in runs if variant != "uniform" and ("uniform", cell) in runs)
    for mean, variant in sorted(kinds, key=lambda kind: (kind[0] != 4, kind[0], -kinds[kind])):
        rows.append([f"{mean:g}", variant, *_beside(runs, variant, "uniform", mean)])
    return rows


def ranks_beside(results: Mapping[str, Any]) -> list[list[str]]:
    """The same minus random ranks that come about in the same way, and minus the variant that differs in one thing."""
    runs = _ranks(results)
    pairs = {
        "random once": ("tsqlora", "once"),
        "static, random": ("static, sensitivity", "static, EVA"),
        "tsqlora": ("tsqlora, no band", "tsqlora, often", "tsqlora, frozen early"),
        "once": ("once, adapter", "tsqlora"),
    }
    rows = [["mean rank", "variant", "minus", *_OF_RANKS]]
    for other, variants in pairs.items():
        for variant in variants:
            means = {c[2] for v, c in runs if v == variant and (other, c) in runs}
            rows += [[f"{m:g}", variant, other, *_beside(runs, variant, other, m)] for m in sorted(means, key=_from_4)]
    return rows


def _from_4(mean: float) -> tuple[bool, float]:
    """Mean rank 4 first, of which there is most."""
    return mean != 4, mean


def _beside(runs: Mapping[tuple[str, Any], tuple[float, float]], variant: str, other: str, mean: float) -> list[str]:
    """A variant minus another over the cells of a mean rank that both have."""
    alike = [c for v, c in runs if v == variant and c[2] == mean and (other, c) in runs]
    pairs = {c: (runs[variant, c], runs[other, c]) for c in alike}
    gains = _paired({(c[0], c[2], c[1]): (a[0] - b[0]) / 100 for c, (a, b) in pairs.items()})
    losses = np.array([100 * (a[1] / b[1] - 1) for a, b in pairs.values()])
    return [*gains, f"{losses.mean():+.1f} %", _interval(losses, 1)]


def ranks_cells(results: Mapping[str, Any]) -> list[list[str]]:
    """A row a cell: uniform ranks' points (accuracy; on STS-B 100 times Pearson's r), the others' above or below."""
    runs = _ranks(results)
    cells = sorted({cell for _, cell in runs}, key=lambda cell: (_from_4(cell[2]), cell[0], cell[1]))
    variants = sorted({v for v, _ in runs}, key=lambda v: (v != "uniform", -sum(name == v for name, _ in runs), v))
    names = {cell: f"{cell[0]}, seed {cell[1]}, mean rank {cell[2]:g}" for cell in cells}
    return _cell_by_cell(names, variants, {run: points for run, (points, _) in runs.items()})


def _ranks(results: Mapping[str, Any]) -> dict[tuple[str, tuple[str, int, float]], tuple[float, float]]:
    """Points and test loss of each run, by variant and (task, seed, mean rank)."""
    found = {}
    for run in results["results"].values():
        test = run["test"]
        points = 100 * test.get("accuracy", test.get("pearson"))
        found[run["variant"], (run["task"], run["seed"], run["mean"])] = (points, test["loss"])
    return found


def rank_cost(results: Mapping[str, Any]) -> list[list[str]]:
    """Of a run whose ranks move, in units of one of plain LoRA at the same mean rank: by medians, and by the sum."""
    head = [
        "model, precision",
        "steps",
        "of them measured",
        "a step not measured",
        "one measured",
        "the run, by medians",
    ]
    rows = [[*head, "its seconds", "peak memory"]]
    for cell, found in results["cells"].items():
        if cell.startswith("large rank"):
            continue
        name = cell.replace("/", ", ")
        without, measured = found["ratio of steps without measuring"], found["ratio of steps with"]
        share = found["adjustments"] / found["steps"]
        ratios = (without, measured, (1 - share) * without + share * measured, found["ratio"])
        memory = found["peak"]["ours"] / found["peak"]["plain"]
        counts = (str(found["steps"]), str(found["adjustments"]))
        rows.append([name, *counts, *(f"{ratio:.3f}" for ratio in ratios), f"{memory:.3f}"])
    return rows


def rank_cost_large(results: Mapping[str, Any]) -> list[list[str]]:
    """Seconds of a step where the rank is large, by what is active."""
    cells = {name.split("/")[1]: found for name, found in results["cells"].items() if name.startswith("large rank")}
    names = list(next(iter(cells.values())))
    return [
        ["precision", *names],
        *([precision, *(f"{found[name]:.2f}" for name in names)] for precision, found in cells.items()),
    ]


def resume(results: Mapping[str, Any]) -> list[list[str]]:
    """By model and way of saving: runs that were killed, when, and of how many all was the same in the end."""
    rows = [["model", "checkpoints", "runs", "kills", "while writing one", "killed twice", "all the same in the end"]]
    kinds = dict.fromkeys((key.split("/")[0], cell["saves"]) for key, cell in results["cells"].items())
    for model, saves in kinds:
        cells = [c for key, c in results["cells"].items() if (key.split("/")[0], c["saves"]) == (model, saves)]
        kills = [kill for cell in cells for kill in cell["kills"]]
        writing = sum(kill["kind"] == "writing" for kill in kills)
        twice = sum(len(cell["kills"]) > 1 for cell in cells)
        same = sum(all(cell["same"].values()) for cell in cells)
        rows.append([model, saves, *map(str, (len(cells), len(kills), writing, twice, same))])
    return rows


def compare_killed(results: Mapping[str, Any]) -> list[list[str]]:
    """When each SIGKILL came, and whether in the end all was as where nothing was killed."""
    kills, same = results["kills"], results["same"]
    rows = [["SIGKILL", "seconds after the command", f"finished, of {results['cells']} cells"]]
    rows += [[str(j), f"{kill['seconds']:.0f}", str(kill["finished cells"])] for j, kill in enumerate(kills, start=1)]
    return [*rows, ["every number the same in the end", "–", "yes" if all(same.values()) else "no"]]


TABLES: dict[str, Callable[[Mapping[str, Any]], list[list[str]]]] = {
    "compare_killed": compare_killed,
    "guard": guard,
    "harvest-cost": harvest_cost,
    "harvest-picks": harvest_picks,
    "label_errors": label_errors,
    "quality_rules": quality_rules,
    "rank_agreement": rank_agreement,
    "rank_cost": rank_cost,
    "rank_cost-large": rank_cost_large,
    "ranks-cells": ranks_cells,
    "ranks-differences": ranks_differences,
    "ranks-beside": ranks_beside,
    "resume": resume,
    "scoring": scoring_ratios,
    "selection-cells": selection_cells,
    "selection-differences": selection_differences,
    "selection_bank": selection_bank,
    "selection_even-cells": selection_cells,
    "selection_even-learned": selection_learned,
    "selection_even-differences": selection_differences,
}


def recheck(results: Mapping[str, Any]) -> list[list[str]]:
    """Whether wrong labels are evident before each epoch, and of the rows that would be left out how many are wrong."""
    runs = list(results["results"].values())
    epochs = sorted({epoch for run in runs for epoch in run["epochs"]}, key=int)
    rows = [["labels", "seed", "learning rate", *(f"before epoch {epoch}" for epoch in epochs)]]
    for run in runs:
        shown = []
        for found in (run["epochs"][epoch] for epoch in epochs):
            right = "–" if found["precision"] is None else f"{found['precision']:.0%}"
            shown.append(f"{found['rejected']:.0%} out, {right} of them wrong" if found["evident"] else "not evident")
        labels = f"{run['wrong']:.0%} wrong" if run["wrong"] else "clean"
        rows.append([labels, str(run["seed"]), f"{run['rate']:g}", *shown])
    return rows


def recheck_trained(results: Mapping[str, Any]) -> list[list[str]]:
    """What a run came to with a second look and without."""
    rows = [["seed", "second look", "wrong labels evident", "test accuracy", "test loss"]]
    for run in results["trained"]:
        looked, evident = ("yes" if run[name] else "no" for name in ("recheck", "evident"))
        rows.append([str(run["seed"]), looked, evident, f"{100 * run['accuracy']:.1f}", f"{run['loss']:.3f}"])
    return rows


def reject_classes(results: Mapping[str, Any]) -> list[list[str]]:
    """Test accuracy by what is left out, and seed."""
    runs = results["runs"]
    seeds = sorted({run["seed"] for run in runs})
    rows = [["left out", *(f"seed {seed}" for seed in seeds)]]
    for variant in dict.fromkeys(run["variant"] for run in runs):
        of = {run["seed"]: run["accuracy"] for run in runs if run["variant"] == variant}
        rows.append([variant, *(f"{100 * of[seed]:.1f}" if seed in of else "–" for seed in seeds)])
    return rows


def reject_small(results: Mapping[str, Any]) -> list[list[str]]:
    """By task, share of wrong labels and rows: how often wrong labels are evident, and means over all askings."""
    runs = list(results["results"].values())
    kinds = sorted({(run["task"], run["wrong"], run["rows"]) for run in runs})
    names = {"today": "as it is", "older": "before"}
    told = [f"{told}, {name}" for name in names.values() for told in ("evident", "left out", "wrong", "found")]
    rows = [["task", "labels", "rows", "model right on", *told]]
    for task, wrong, size in kinds:
        askings = [p for r in runs if (r["task"], r["wrong"], r["rows"]) == (task, wrong, size) for p in r["passes"]]
        fitted = [p["fitted"] for p in askings]
        shown = [task, f"{wrong:.0%} wrong" if wrong else "clean", str(size), f"{min(fitted):.0%} to {max(fitted):.0%}"]
        for name in names:
            of = [p[name] for p in askings]
            means = [_mean_of(of, key) for key in ("rejected", "precision", "recall")]
            shown += [f"{sum(o['evident'] for o in of)} of {len(of)}", *means]
        rows.append(shown)
    return rows


def _mean_of(askings: Sequence[Mapping[str, Any]], key: str) -> str:
    known = [asking[key] for asking in askings if asking[key] is not None]
    return f"{sum(known) / len(known):.0%}" if known else "–"


TABLES["reject_small"] = reject_small
TABLES["reject_classes"] = reject_classes
TABLES["recheck"] = recheck
TABLES["recheck-trained"] = recheck_trained


def servers(results: Mapping[str, Any]) -> list[list[str]]:
    """What each server's own code made of each kind of adapter."""
    found = results["servers"]
    rows = [["adapter", *found]]
    for kind in dict.fromkeys(kind for kinds in found.values() for kind in kinds):
        rows.append([kind, *(_applied(kinds[kind]) for kinds in found.values())])
    return rows


def _applied(seen: Mapping[str, Any]) -> str:
    """A verdict, with the factors at which updates are applied."""
    factors = sorted({f"{factor:.3g}" for factor in seen.get("factors", {}).values()})
    return seen["verdict"] + (f": × {', '.join(factors)}" if factors else "")


TABLES["servers"] = servers


def llamacpp(results: Mapping[str, Any]) -> list[list[str]]:
    """How far llama.cpp's log-probabilities are from PEFT's, by file of weights and adapter."""
    adapters = {"none": "none", "gguf": "`--format gguf`", "converted": "one alpha for all layers"}
    rows = [["weights", "adapter", "largest difference", "mean difference", "KL, nats", "same best token"]]
    for key, found in results["results"].items():
        weights, _, adapter = key.partition(", ")
        rows.append([weights, adapters[adapter], *(f"{found[n]:.2g}" for n in ("largest", "mean", "kl"))])
        rows[-1].append(f"{found['same_best']:.0%}")
    return rows


TABLES["llamacpp"] = llamacpp


def generation(results: Mapping[str, Any]) -> list[list[str]]:
    """Test metrics of each training, by task and seed."""
    shown = {"loss": 3, "perplexity": 2, "token_accuracy": 3, "rouge1": 3, "rouge2": 3, "rougeL": 3, "chrf": 1}
    rows = [["rows", "seed", "method", *shown]]
    for name, found in results["cells"].items():
        cell, metrics = found["cell"], found["metrics"]["test"]
        method = f"`{cell['method']}+{cell['policy']}`"
        values = (f"{metrics[metric]:.{digits}f}" for metric, digits in shown.items())
        rows.append([name.split()[0], str(cell["seed"]), method, *values])
    return rows


TABLES["generation"] = generation


FAULTS = {
    "kill": "SIGKILL at a random moment of warm-up, scoring, first ranks, training, adjustment, checkpointing, export",
    "signal": "SIGTERM and Ctrl-C in each of them",
    "disk": "a full disk (six sizes), no inodes, a read-only disk, a folder that becomes unwritable",
    "damage": "each file of a checkpoint, and the run's own, cut off, with a bit flipped, missing",
    "lock": "a second run into the directory, at the same moment and later",
    "clock": "the clock set back by a year before each checkpoint",
    "locale": "a locale without UTF-8, another time zone; labels and paths beyond ASCII",
    "process": "one of two processes killed under DDP",
    "number": "losses that are not finite, with a kill among them",
    "memory": "allocations that fail from a random pass on, and a real limit of the address space",
}
"""What was done in each group of bench/faults.py."""


def faults(results: Mapping[str, Any]) -> list[list[str]]:
    """By what was done: how often, and how many survived."""
    rows = [["what happens to a training", "model", "cases", "survived"]]
    for group, what in FAULTS.items():
        for model in ("tiny", "minilm"):
            cells = [cell for key, cell in results["cells"].items() if key.startswith(f"{group}/{model}/")]
            if cells:
                rows.append([what, model, str(len(cells)), str(sum(cell["survived"] for cell in cells))])
    return rows


def faults_kills(results: Mapping[str, Any]) -> list[list[str]]:
    """Where SIGKILL hit."""
    kills = [kill for key, cell in results["cells"].items() if key.startswith("kill/") for kill in cell["kills"]]
    counts = Counter(kill["phase"] for kill in kills)
    return [["phase in which SIGKILL came", "kills"], *([phase, str(count)] for phase, count in sorted(counts.items()))]


def faults_mended(results: Mapping[str, Any]) -> list[list[str]]:
    """Failures that were found, what mends them, and the test that holds it."""
    return [
        ["found", "now", "test"],
        *([each["found"], each["now"], f"`{each['test']}`"] for each in results["mended"]),
    ]


def faults_summary(results: Mapping[str, Any]) -> list[list[str]]:
    """All cases, for README."""
    cells = results["cells"].values()
    kills = sum(len(cell.get("kills", ())) for cell in cells)
    told = f"{sum(cell['survived'] for cell in cells)} of {len(cells)}"
    return [
        ["faults tried", "of which SIGKILLs", "survived", "failures found, all mended"],
        [str(len(cells)), str(kills), told, str(len(results["mended"]))],
    ]


TABLES |= {
    "faults": faults,
    "faults-kills": faults_kills,
    "faults-mended": faults_mended,
    "faults-summary": faults_summary,
}


def fuzz(results: Mapping[str, Any]) -> list[list[str]]:
    """Cases and what came of them, a row a reader."""
    rows = [["reader", "cases", "read", "refused", "failures", "slowest case, s", "failures found before and mended"]]
    totals = Counter[str]()
    for name, target in results["targets"].items():
        outcomes = target["outcomes"]
        failed = target["cases"] - outcomes.get("read", 0) - outcomes.get("refused", 0)
        found = len(results["found"].get(name, ()))
        totals.update(cases=target["cases"], read=outcomes.get("read", 0), refused=outcomes.get("refused", 0))
        totals.update(failed=failed, found=found)
        counts = (target["cases"], outcomes.get("read", 0), outcomes.get("refused", 0), failed)
        rows.append([name, *(f"{count:,}" for count in counts), f"{target['slowest_seconds']:.2f}", str(found)])
    for name, found in results["found"].items():
        if name not in results["targets"]:
            totals.update(found=len(found))
            rows.append([name, "by reading", "", "", "", "", str(len(found))])
    counts = (totals[name] for name in ("cases", "read", "refused", "failed"))
    return [*rows, ["**all**", *(f"{count:,}" for count in counts), "", str(totals["found"])]]


def fuzz_summary(results: Mapping[str, Any]) -> list[list[str]]:
    """The row of all readers, for README."""
    _, cases, read, refused, failed, _, found = fuzz(results)[-1]
    return [
        ["hostile files tried", "read", "refused in two lines", "anything else", "found before, all mended"],
        [cases, read, refused, failed, found],
    ]


def fuzz_found(results: Mapping[str, Any]) -> list[list[str]]:
    """What was found and mended, a row each."""
    return [
        ["reader", "what a file could do"],
        *([name, what] for name, found in results["found"].items() for what in found),
    ]


def scale_model(results: Mapping[str, Any]) -> list[list[str]]:
    """Operations counted over those of the formulas, and bytes held."""
    head = ["rows", "tokens", "width", "depth", "forward, MFLOP", "of the formula", "step, MFLOP", "of the formula"]
    rows = [[*head, "held, MB", "c, bytes"]]
    for p in results["model"]["found"]:
        size = [str(p[name]) for name in ("rows", "tokens", "width", "depth")]
        counted = [
            text
            for name in ("forward", "step")
            for text in (f"{p[name] / 1e6:,.0f}", f"{p[name] / p[f'{name}_predicted']:.3f}")
        ]
        rows.append([*size, *counted, f"{p['held_bytes'] / 1e6:.1f}", f"{p['held_a_token_and_layer_of_width']:.0f}"])
    return rows


def scale_processes(results: Mapping[str, Any]) -> list[list[str]]:
    """Bytes of gradients a step and rows passed forward, by how many processes."""
    rows = [["processes", "bytes of gradients a step", "4 × what trains", "rows forward, each process"]]
    for found in results.get("processes", {"found": []})["found"]:
        each = found["each"]
        passed = ", ".join(str(one["rows_forward"]) for one in each)
        rows.append([str(found["processes"]), f"{each[0]['bytes_a_step']:,}", f"{4 * each[0]['trainable']:,}", passed])
    return rows


def scale_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Memory and seconds by rows."""
    rows = [
        ["rows", "drawn", "memory before, MB", "at most, MB", "more, bytes a row", "processor's seconds", "scores, MB"]
    ]
    measured = sorted(
        (entry["found"] for key, entry in results.items() if key.startswith("rows-")), key=lambda r: r["rows"]
    )
    for r in measured:
        before, peak = r["bytes_before"], r["peak_bytes"]
        shown = [f"{before / 1e6:,.0f}", f"{peak / 1e6:,.0f}", f"{(peak - before) / r['rows']:,.0f}"]
        rows.append(
            [
                f"{r['rows']:,}",
                f"{r['drawn']:,}",
                *shown,
                f"{r['processor_seconds']:,.0f}",
                f"{r['scores_bytes'] / 1e6:.0f}",
            ]
        )
    return rows


def scale_steps(results: Mapping[str, Any]) -> list[list[str]]:
    """What grew in a run of many steps."""
    head = ["steps", "growth, bytes a step", "open files", "threads", "adjustments kept", "slots moved"]
    if "steps" not in results:
        return [head]
    run = results["steps"]["found"]
    return [
        head,
        [
            f"{run['steps']:,}",
            f"{run['growth_bytes_a_step']:,.0f}",
            " to ".join(map(str, run["handles"])),
            " to ".join(map(str, run["threads"])),
            f"{run['adjustments_kept']:,}",
            f"{run['slots_moved']:,}",
        ],
    ]


_PLAN: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "P": lambda m: f"{m['linear'] / 1e9:.1f} · 10⁹",
    "A": lambda m: f"{m['lora'] / 1e6:.0f} · 10⁶",
    "forward pass of a row, TFLOP": lambda m: f"{m['forward'] / 1e12:.1f}",
    "training step of a row, checkpointed, TFLOP": lambda m: f"{m['step_checkpointed'] / 1e12:.1f}",
    "hours to score 10⁶ rows, default rule": lambda m: f"{m['hours_to_score_a_million']:.0f}",
    "all three terms": lambda m: f"{m['hours_to_score_a_million_all_terms']:.0f}",
    "hours to train three epochs of half of 10⁶ rows": lambda m: f"{m['hours_to_train_three_epochs_of_half']:.0f}",
    "weights a device, GB": lambda m: f"{m['bytes_of_weights_a_device'] / 1e9:.1f}",
    "gathered at a time, GB": lambda m: f"{m['bytes_gathered_at_a_time'] / 1e9:.1f}",
    "adapter and Adam a device, GB": lambda m: f"{m['bytes_of_adapter_and_adam_a_device'] / 1e9:.2f}",
    "checkpoints of activations a device, GB": lambda m: f"{m['bytes_of_checkpoints_a_device'] / 1e9:.1f}",
    "received a micro-batch, GB": lambda m: f"{m['bytes_received_a_micro_batch'] / 1e9:.0f}",
}


def scale_plan(results: Mapping[str, Any]) -> list[list[str]]:
    """The cost model's numbers, a column a model."""
    models = results["plan"]["found"]["models"]
    return [["", *models], *([name, *(shown(m) for m in models.values())] for name, shown in _PLAN.items())]


TABLES |= {
    "fuzz": fuzz,
    "fuzz-found": fuzz_found,
    "fuzz-summary": fuzz_summary,
    "scale-model": scale_model,
    "scale-plan": scale_plan,
    "scale-processes": scale_processes,
    "scale-rows": scale_rows,
    "scale-steps": scale_steps,
}


def glue_summary(_: Mapping[str, Any]) -> list[list[str]]:
    """What docs/results.md says over tasks at 2,000 rows and mean rank 4, with wrong labels and without."""
    import results_page

    return results_page.summary(rows=2000, mean=4)


TABLES["glue-summary"] = glue_summary


def markdown(rows: list[list[str]]) -> str:
    """Rows as a Markdown table; the first is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rendered(text: str) -> str:
    """The text with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        path = RESULTS / f"{name.partition('-')[0]}.json"
        results = json.loads(path.read_text()) if path.exists() else {}  # of glue there are many
        return f"{match[1]}\n{markdown(TABLES[name](results))}\n{match[3]}"

    return MARKED.sub(table, text)


def main() -> None:
    stale: list[str] = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        if (new := rendered(text)) != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale and "--check" in sys.argv:
        sys.exit(f"tables are not those of bench/results: {', '.join(stale)}; run python bench/tables.py")


if __name__ == "__main__":
    main()
