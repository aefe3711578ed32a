"""Writes the tables of README and docs/ from bench/results/*.json: python bench/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. NAME is the file of results, and where a file makes
several tables, a hyphen and the table's own name. A sentence stands between `<!-- claim: NAME -->` and `<!-- end -->`.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import curves
import differences
import pandas as pd
from curves import EPOCHS
from glue import CHOOSING, entry_of
from markdown_table import NONE, markdown

from tsqlora.adapter.servers import CONSUMERS
from tsqlora.auditing.labels.question import CONTRADICTED

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
CLAIMED = re.compile(r"(<!-- claim: (?P<name>[\w-]+) -->).*?(<!-- end -->)")

Results = Mapping[str, Any]
Rows = list[dict[str, str]]


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


# ------------------------------------------------------------------------------------- faults

FAULTS = {
    "kill": "SIGKILL at a random moment of the look, first ranks, training, adjustment, checkpointing, export",
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
"""What each group of bench/faults.py does to a training."""


def faults(results: Results) -> Rows:
    """How often each group was tried, and how many runs survived."""
    rows = []
    for group, what in FAULTS.items():
        cells = [cell for key, cell in results["cells"].items() if key.startswith(f"{group}/")]
        survived = str(sum(cell["survived"] for cell in cells))
        rows.append({"what happens to a training": what, "cases": str(len(cells)), "survived": survived})
    return rows


# --------------------------------------------------------------------------------------- fuzz


def fuzz(results: Results) -> Rows:
    """A row a reader: cases, those that it neither read nor refused, and the slowest."""
    return [
        {
            "reader": name,
            "cases": f"{reader['cases']:,}",
            "failures": str(reader["cases"] - reader["outcomes"]["read"] - reader["outcomes"]["refused"]),
            "slowest case, s": f"{reader['slowest_seconds']:.2f}",
        }
        for name, reader in results["targets"].items()
    ]


# -------------------------------------------------------------------------------------- scale


def scale_rows(results: Results) -> Rows:
    """Memory and seconds by rows."""
    measured = (entry["found"] for key, entry in results.items() if key.startswith("rows-"))
    return [
        {
            "rows": f"{r['rows']:,}",
            "drawn": f"{r['drawn']:,}",
            "memory before, MB": f"{r['bytes_before'] / 1e6:,.0f}",
            "at most, MB": f"{r['peak_bytes'] / 1e6:,.0f}",
            "more, bytes a row": f"{(r['peak_bytes'] - r['bytes_before']) / r['rows']:,.0f}",
            "processor's seconds": f"{r['processor_seconds']:,.0f}",
            "scores, MB": f"{r['scores_bytes'] / 1e6:.0f}",
        }
        for r in sorted(measured, key=lambda r: r["rows"])
    ]


def scale_chats(results: Results) -> Rows:
    """Memory and seconds of an audit of chats, by rows."""
    measured = sorted(
        (entry["found"] for key, entry in results.items() if key.startswith("chats-")), key=lambda r: r["rows"]
    )
    return [
        {
            "chats": f"{r['rows']:,}",
            "the file, MB": f"{r['file_bytes'] / 1e6:,.0f}",
            "memory before, MB": f"{r['bytes_before'] / 1e6:,.0f}",
            "at most, MB": f"{r['peak_bytes'] / 1e6:,.0f}",
            "processor's seconds": f"{r['processor_seconds']:,.0f}",
        }
        for r in measured
    ]


LOW = ("lora", "lora+head", "tsqlora", "adalora", "elalora", "eva")


def glue_low(_: Results) -> Rows:
    """500 clean rows at mean rank 2: the test metric of each way to train, a row a task; means over seeds."""
    rows = []
    for path in sorted((RESULTS / "glue").glob("*_500_wrong0_rank2.json")):
        block = json.loads(path.read_text())
        metric, ways = block["block"]["metric"], dict[str, list[float]]()
        for cell in block["cells"].values():
            if cell["cell"]["seed"] != CHOOSING:
                name = entry_of(cell).removesuffix("+all").removesuffix("+quality")
                ways.setdefault(name, []).append(100 * cell["metrics"]["test"][metric])
        rows.append({"": f"{block['block']['task']}, {metric}"} | {f"`{name}`": _mean(ways[name]) for name in LOW})
    return rows


def _cells(name: str) -> list[dict[str, Any]]:
    """The results of a benchmark that has a file for each cell."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / name).glob("*.json"))]


def headstart(_: Results) -> pd.DataFrame:
    """What plain LoRA reaches in three epochs, and where the others reach it; means over seeds at the chosen rate."""
    rows = []
    for table, of_table in curves.chosen().items():
        goal = {seed: curve[-1] for seed, curve in of_table["lora"].items()}
        for method, result in of_table.items():
            both = {seed: curve for seed, curve in result.items() if seed in goal}
            reached = [curves.reached(curve, goal[seed]) for seed, curve in both.items()]
            areas = []
            for seed, curve in both.items():
                until, before = goal[seed]["seconds"] / EPOCHS, of_table["lora"][seed][0]["accuracy"]
                areas.append(100 * curves.area(curve, until=until, before=before))
            rows.append(
                {
                    "table": table,
                    "way to train": method,
                    "seeds": len(both),
                    "before the first step": _mean([100 * curve[0]["accuracy"] for curve in both.values()]),
                    "on average in the seconds of LoRA's first epoch": _mean(areas),
                    "at its end": _mean([100 * curve[-1]["accuracy"] for curve in both.values()]),
                    "steps": both[min(both)][-1]["step"],
                    "share of LoRA's steps to its accuracy": _mean([share and share[0] for share in reached], 2),
                    "of its seconds": _mean([share and share[1] for share in reached], 2),
                }
            )
    return pd.DataFrame(rows)


def headstart_controls(_: Results) -> Rows:
    """CLINC150: the fitted head, fewer rows and a shorter schedule apart; seconds as shares of plain LoRA's."""
    names = {
        "lora": "LoRA, random head",
        "lora-third": "LoRA, random head, a third of the steps",
        "lora+head": "LoRA, fitted head, a third of the steps",
        "tsqlora": "tsqlora, a third of the steps, on half of the rows an epoch",
    }
    cells = {
        (cell["settings"]["method"], cell["settings"]["seed"]): cell["curve"] for cell in _cells("headstart_controls")
    }
    rows = []
    for method, name in names.items():
        of = {seed: curve for (way, seed), curve in cells.items() if way == method and ("lora", seed) in cells}
        shares = [curve[-1]["seconds"] / cells["lora", seed][-1]["seconds"] for seed, curve in of.items()]
        if of:
            rows.append(
                {
                    "CLINC150": name,
                    "seeds": str(len(of)),
                    "steps": str(next(iter(of.values()))[-1]["step"]),
                    "before the first step": _mean([100 * curve[0]["accuracy"] for curve in of.values()]),
                    "at its end": _mean([100 * curve[-1]["accuracy"] for curve in of.values()]),
                    "seconds": _mean(shares, 2),
                }
            )
    return rows


def headstart_short(_: Results) -> pd.DataFrame:
    """Plain LoRA and tsqlora side by side, a row for each table."""
    both = headstart(_).set_index(["table", "way to train"]).unstack("way to train")
    columns = {
        "before the first step": "before the first step",
        "on average in the seconds of LoRA's first epoch": "in LoRA's first epoch",
        "at its end": "at the end",
        "of its seconds": "seconds to LoRA's final accuracy",
    }
    rows = pd.DataFrame({"LoRA/tsqlora": both.index})
    for name, short in columns.items():
        pairs = both[name]["lora"] + "/" + both[name]["tsqlora"]
        rows[short] = pairs.str.replace(" of 3 seeds", "/3").to_list()
    for short, at in (("the look", 0), ("the whole run", -1)):
        rows[short] = [
            _mean([curve[at]["seconds"] / of["lora"][seed][-1]["seconds"] for seed, curve in of["tsqlora"].items()], 2)
            for of in curves.chosen().values()
        ]
    return rows


def _mean(values: Sequence[float | None], digits: int = 1) -> str:
    """The mean; where a seed has none, how many have."""
    present = [value for value in values if value is not None]
    if not present:
        return "never"
    mean = f"{sum(present) / len(present):.{digits}f}"
    return mean if len(present) == len(values) else f"{mean} ({len(present)} of {len(values)} seeds)"


TRUSTED = 128
"""Trusted rows in the worlds' tables."""


def worlds_last(_: Results) -> Rows:
    """The rule before today's."""
    return _side_by_side(differences.cells(differences.LAST))


def worlds_asked(_: Results) -> Rows:
    """Today's rule."""
    return _side_by_side(differences.cells())


def _side_by_side(cells: pd.DataFrame) -> Rows:
    """Even draws and tsqlora side by side, a row a world; means over the seeds of both."""
    rows = []
    gains = differences.against_even(cells).set_index(["world", "trusted", "method"])
    for (world, name), trusted in product(differences.WORLDS.items(), (TRUSTED, 32)):
        here = cells[(cells.world == world) & (cells.trusted == trusted)]
        both = {*here[here.method == "even"].seed} & {*here[here.method == "default"].seed}
        if not both:
            continue
        here = here[here.seed.isin(both)]
        even, ours = (here[here.method == method] for method in ("even", "default"))
        rows.append(
            {
                "even draws → tsqlora": name + ("" if trusted == TRUSTED else f", {trusted} trusted rows"),
                "seeds": str(len(ours)),
                "accuracy": f"{100 * even.accuracy.mean():.1f} → {100 * ours.accuracy.mean():.1f}",
                "gain": _difference(gains.loc[world, trusted, "default"], "accuracy"),
                "worst group": f"{100 * even.worst.mean():.1f} → {100 * ours.worst.mean():.1f}",
                "its gain": _difference(gains.loc[world, trusted, "default"], "worst"),
                "test loss": f"{even['loss'].mean():.2f} → {ours['loss'].mean():.2f}",
            }
        )
    return rows


QUESTIONED = {
    "clean": "SST-2, clean",
    "clean-mrpc": "MRPC, clean",
    "clean-bbc": "BBC, clean",
    "clean-cola": "CoLA, clean",
    "clean-stsb": "STS-B, clean",
    "wrong20": "20 % wrong labels in the pool",
    "wrong40": "40 % wrong labels in the pool",
    "one10": "10 % of the pool's labels moved to one class",
    "balanced": "a pool of 85 : 15, balanced trusted rows",
    "styled": "trusted rows in another style",
    "careless": "8 % of the trusted labels wrong",
    "reviewed": "trusted rows that were suspects (a run leaves these out of the question)",
    "shortcut": "shortcut",
    "both": "shortcut, 20 % wrong labels",
    "weak": "weak labels",
    "overlap": "word overlap (MRPC)",
}
"""What the worlds of bench/question.py are called; in the last four the pool teaches something false."""


def question(_: Results) -> Rows:
    """How often the question calls the pool contradicted, and its z, a row a world."""
    rows = []
    for world, name in QUESTIONED.items():
        cells = [json.loads(path.read_text()) for path in (RESULTS / "question").glob(f"{world}.[0-9]*.json")]
        row = {"the pool and the trusted rows": name, "seeds": str(len(cells))}
        for rows_asked in (TRUSTED, 32):
            z = sorted(cell["z"]["kept"][str(rows_asked)] for cell in cells)
            row[f"contradicted, {rows_asked} rows"] = f"{sum(one >= CONTRADICTED for one in z)} of {len(z)}"
            row[f"z, {rows_asked} rows"] = f"{z[0]:+.1f} to {z[-1]:+.1f}"
        rows.append(row)
    return rows


def worlds_gains(_: Results) -> Rows:
    """Points of accuracy that other ways to train gain over even draws, a column a world."""
    gains = differences.against_even(differences.cells()).set_index(["world", "trusted", "method"])
    names = {world: name for world, name in differences.WORLDS.items() if world in gains.index}
    return [
        {"": f"{differences.WAYS[way][0]} ({gains.seeds[:, TRUSTED, way].max()} seeds)"}
        | {
            name: _difference(gains.loc[at], "accuracy") if (at := (world, TRUSTED, way)) in gains.index else NONE
            for world, name in names.items()
        }
        for way in differences.WAYS
        if way in gains.loc[:, TRUSTED, :].index.get_level_values("method")
    ]


def _difference(gain: pd.Series, name: str) -> str:
    """Points with their interval; of one seed without."""
    low, high = gain[f"{name}_low"], gain[f"{name}_high"]
    return f"{gain[name]:+.1f}" + ("" if pd.isna(low) else f" ({low:+.1f}, {high:+.1f})")


WRONG = {
    "none": "as it is",
    "even-0.01": "1 %, any class",
    "even-0.03": "3 %, any class",
    "even-0.1": "10 %, any class",
    "even-0.2": "20 %, any class",
    "drawn-0.05": "5 % redrawn",
    "one-0.03": "3 %, all of one class",
    "one-0.05": "5 %, all of one class",
    "one-0.1": "10 %, all of one class",
}
"""What the noise of bench/judge.py is called."""


GOALS: dict[str, tuple[str, Callable[[pd.DataFrame], bool]]] = {
    "clean": ("≤ 2 % left out", lambda cells: cells.left_out.max() <= 0.02),
    "uniform": ("90 % evident", lambda cells: cells.evident.mean() >= 0.9),
    "one": ("0.65, 0.6", lambda cells: cells.precision.mean() >= 0.65 and cells.recall.mean() >= 0.6),
}
"""What the judge of labels must do in each part of bench/judge.py."""


def judge(results: Results) -> Rows:
    """What the judge leaves out, by table and kind of wrong labels, and whether its goal is met."""
    groups = list(_judged(results))
    unchanged = [cells for (part, _, _), cells in groups if part == "clean"]
    rows = [_judge_row(f"{len(unchanged)} tables", "clean", "none", pd.concat(unchanged))]
    for (part, table, noise), cells in groups:
        if part in GOALS and part != "clean":
            rows.append(_judge_row(f"{table}, {cells.rows.max():,} rows", part, noise, cells))
    return rows


def _judge_row(table: str, part: str, noise: str, cells: pd.DataFrame) -> dict[str, str]:
    (goal, met), planted = GOALS[part], cells[cells.wrong > 0]
    return {
        "table": table,
        "wrong labels": WRONG[noise],
        "evident": f"{cells.evident.sum()} of {len(cells)}",
        "left out: mean, most": f"{100 * cells.left_out.mean():.1f} %, {100 * cells.left_out.max():.1f} %",
        "precision: mean, least": _mean_and_least(planted.precision),
        "recall: mean, least": _mean_and_least(planted.recall),
        "goal": f"{goal}: {_verdict(met(cells))}",
    }


def judge_order(results: Results) -> Rows:
    """Average precision of the judge's order, of self-confidence, and of each distribution of wrong labels."""
    ways = ("order", "self-confidence", "uniform", "frequency", "fitted")
    return [
        {
            "table": f"{table}, {cells.rows.max():,} rows",
            "wrong labels": WRONG[noise],
            **{name: f"{cells[name.replace('-', '_')].mean():.3f}" for name in ways},
        }
        for (part, table, noise), cells in _judged(results)
        if part == "order"
    ]


def _judged(results: Results) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
    """The cells of bench/judge.py by part, table and noise, in its order."""
    cells = pd.DataFrame(
        [{"part": key.partition("/")[0], **cell, **cell["settings"]} for key, cell in results["cells"].items()]
    )
    yield from cells.groupby(["part", "table", "noise"], sort=False)  # pyright: ignore[reportReturnType]


def _mean_and_least(values: pd.Series) -> str:
    return f"{values.mean():.2f}, {values.min():.2f}" if values.notna().any() else NONE


def claim_labels() -> str:
    """What the audit of labels finds, for README."""
    judged = dict(_judged(json.loads((RESULTS / "judge.json").read_text())))["uniform", "clinc150", "even-0.1"]
    right = 100 * judged.precision.to_numpy(float)
    low, high = differences.interval(right)
    return (
        "If 10 % of the labels of 6,000 rows of CLINC150 are set wrong, the audit lists "
        f"{100 * judged.left_out.mean():.1f} % of the rows to look at, and {right.mean():.1f} % of these are wrong "
        f"({low:.1f} to {high:.1f}; {len(right)} draws, t interval)."
    )


def claim_answers() -> str:
    """What the look at answers finds, for README."""
    results = json.loads((RESULTS / "answers.json").read_text())
    cell, before = (results["results"][f"alpaca, foreign, next, {share}"] for share in ("0.1", "0"))
    return (
        f"If 30 of 300 rows of Alpaca have the answer of the next row, it lists {cell['listed']:.1f} rows on average, "
        f"{100 * cell['right'] / cell['listed']:.0f} % of them faulty. Of the unchanged rows it lists "
        f"{before['listed'] or 'none'} ({results['draws']} draws, SmolLM2-135M)."
    )


def claim_train() -> str:
    """What trusted rows gain over the same rows mixed in, for README: in a pool with a shortcut, and in a clean one."""
    gains = differences.against_even(differences.cells()).set_index(["world", "trusted", "method"])
    shortcut, clean = (gains.loc[name, TRUSTED, "default"] for name in ("shortcut", "clean"))
    return (
        f"{_points(shortcut)} of accuracy on SST-2 with a shortcut in the rows, by {TRUSTED} checked rows that come "
        "last, compared with the same rows mixed in; on the clean table, where the run mixes them in, "
        f"{_points(clean)} "
        f"({min(shortcut.seeds, clean.seeds):.0f} seeds, t intervals)"
    )


def _points(gain: pd.Series) -> str:
    return f"{gain.accuracy:+.1f} points ({gain.accuracy_low:+.1f} to {gain.accuracy_high:+.1f})"


def claim_servers() -> str:
    """What servers do with adapters, for README."""
    served = json.loads((RESULTS / "servers.json").read_text())["servers"]
    newest = {name.split()[0]: (name, kinds) for name, kinds in served.items()}
    verdicts = {name: Counter(kind["verdict"] for kind in kinds.values()) for name, kinds in newest.values()}
    kinds = len(next(iter(served.values())))
    return f"Of {kinds} kinds of adapters " + ", ".join(
        f"{name} misreads {kinds - count['right'] - count['refused']} and refuses {count['refused']}"
        for name, count in verdicts.items()
    )


SHAPES = {
    "SmolLM2-135M": (30, 576, 192, 1536, 49152, 1),
    "Qwen2.5-0.5B": (24, 896, 128, 4864, 151936, 1),
    "Qwen2.5-1.5B": (28, 1536, 256, 8960, 151936, 1),
    "Qwen2.5-7B": (28, 3584, 512, 18944, 152064, 2),
    "Llama-3.1-8B": (32, 4096, 1024, 14336, 128256, 2),
}
"""Layers, width, width of keys, width of the feed-forward part, tokens of the vocabulary, and tables of embeddings."""


def memory(_: Results) -> Rows:
    """Memory of a QLoRA training step by model and length, of formulas: see docs/tutorial-text.md."""
    rows, rank = list[dict[str, str]](), 16
    for name, (depth, width, keys, inner, vocabulary, tables) in SHAPES.items():
        matrices = [(width, width)] * 2 + [(width, keys)] * 2 + [(width, inner)] * 3
        linear, lora = (depth * sum(part) for part in ([a * b for a, b in matrices], [a + b for a, b in matrices]))
        fixed = 0.52 * linear + 2 * tables * vocabulary * width + 16 * rank * lora + 2 * width * inner
        row = {"model": name, "weights and adapter, GB": f"{fixed / 1e9:.1f}"}
        for tokens in (512, 2048, 8192):
            activations = 2 * tokens * width * depth + 60 * tokens * width
            row[f"with {tokens:,} tokens"] = f"{(fixed + activations + 12 * tokens * vocabulary) / 1e9:.1f}"
        rows.append(row)
    return rows


def rules(_: Results) -> Rows:
    """The newest rule of each server by which the doctor judges."""
    return [
        {
            "server": rule.name + (f" ({rule.file})" if rule.file else ""),
            "read in": f"{rule.version} ({rule.date})",
            "rule": rule.rule,
            "evidence": rule.evidence,
        }
        for rule in CONSUMERS
        if not rule.until
    ]


TABLES: dict[str, Callable[[Results], Rows | pd.DataFrame]] = {
    "faults": faults,
    "fuzz": fuzz,
    "glue-low": glue_low,
    "judge": judge,
    "judge-order": judge_order,
    "memory": memory,
    "rules": rules,
    "scale-chats": scale_chats,
    "scale-rows": scale_rows,
    "headstart-controls": headstart_controls,
    "headstart-short": headstart_short,
    "question": question,
    "worlds-asked": worlds_asked,
    "worlds-gains": worlds_gains,
    "worlds-last": worlds_last,
}


CLAIMS: dict[str, Callable[[], str]] = {
    "labels": claim_labels,
    "answers": claim_answers,
    "train": claim_train,
    "servers": claim_servers,
}


def rendered(text: str) -> str:
    """The text with every marked table and claim replaced by that of today's results."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        path = RESULTS / f"{name.partition('-')[0]}.json"
        results = json.loads(path.read_text()) if path.exists() else {}  # glue has a folder of files
        return f"{match[1]}\n{markdown(TABLES[name](results))}\n{match[3]}"

    return CLAIMED.sub(lambda match: f"{match[1]}{CLAIMS[match['name']]()}{match[3]}", MARKED.sub(table, text))


def main() -> None:
    stale: list[str] = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text()
        if (new := rendered(text)) != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale and "--check" in sys.argv:
        sys.exit(f"tables are not those of bench/results: {', '.join(stale)}; run python bench/tables.py")


if __name__ == "__main__":
    main()
