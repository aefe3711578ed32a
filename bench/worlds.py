"""The worlds that users bring (METHOD 1.5), and what is gained in each: rows of one command, one cell a file.

    python bench/worlds.py shortcut [--methods default,even,alone] [--seeds 0,1,2] [--trusted 128]
    MODEL=path/to/mpnet python bench/worlds.py shortcut   # another encoder than MiniLM
    python bench/worlds.py shortcut --seeds 19 --rate 2e-3   # of seed 19 the test rows are 800 training rows: for rates

Each world is a function that returns training, trusted and test rows, and the group of each test row. A training takes
440 steps of 16 rows (trusted rows alone: 220) at rank 8 and draws half of the pool an epoch, a fifth of CLINC150. Each
cell runs on one core and is a file in bench/results/worlds; a finished cell is not run again.
"""

import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from cleanlab.filter import find_label_issues
from origin import ROOT, commit, encoder, machine, parser_of, stored
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import cross_val_predict
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from tsqlora.auditing.labels import question
from tsqlora.model.forward import forward_pass
from tsqlora.model.request import Compute
from tsqlora.record import versions
from tsqlora.settings import Config
from tsqlora.tasks import get_task
from tsqlora.training.command import train
from tsqlora.training.demo import bbc_news
from tsqlora.training.job import open_run
from tsqlora.training.predict import predict_run

SHARED = ROOT / ".." / "shared" / "data"
RESULTS = Path(os.environ.get("RESULTS", ROOT / "bench" / "results" / "worlds"))
MODEL, MARK = encoder()
STEPS, RATE, TEST_ROWS = 440, 5e-4, 1821
RATES_SEED = 19
"""Rates are chosen with this seed, on rows of the training file: its cells are no result."""
RULE = 3
"""Part of each cell's mark, so that cells of an older rule are no result of this one. 3: the question to the pool; 2:
trusted rows always come last."""
TOKENS, PAIR_TOKENS = 64, 96
TOKEN = "(verified) "
TOPICS = ("sports", "business")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class World:
    train: list[Row]
    trusted: list[Row]
    test: list[Row]
    groups: list[str]
    """Of each test row; the accuracy of the worst group is reported, too."""
    wrong: int
    """Training rows whose label is wrong."""
    table: str = "sst2"
    fraction: float = 0.5
    """Share of the pool that an epoch draws."""


def split(table: str, name: str) -> list[Row]:
    if table == "bbc":
        news = [{"text": text, "label": int(topic == "sports")} for text, topic in bbc_news() if topic in TOPICS]
        order = np.random.default_rng(7).permutation(len(news))
        return [news[j] for j in {"train": order[:600], "validation": order[600:620], "test": order[600:]}[name]]
    return [json.loads(line) for line in (SHARED / table / f"{name}.jsonl").read_text().splitlines()]


def draw(
    table: str, seed: int, trusted: int, pool: int = 2000, keep: Callable[[Row], bool] = lambda _: True
) -> tuple[list[Row], list[Row], list[Row], np.random.Generator]:
    """Pool, trusted rows and test rows of a table."""
    rng = np.random.default_rng([seed, 28])
    rows, test = [row for row in split(table, "train") if keep(row)], split(table, "test")
    order = rng.permutation(len(rows))
    if seed == RATES_SEED:
        test = [rows[j] for j in order[pool + trusted :][:800]]
    test = [test[j] for j in np.random.default_rng(0).permutation(len(test))[:TEST_ROWS]] if len(test) > 2000 else test
    return [rows[j] for j in order[:pool]], [rows[j] for j in order[pool : pool + trusted]], test, rng


def tokens_of(row: Row) -> int:
    """The most tokens of a row."""
    return PAIR_TOKENS if "text_pair" in row else TOKENS


def by_label(rows: Sequence[Row]) -> list[str]:
    return [str(row["label"]) for row in rows]


def marked(rows: list[Row], chance: Callable[[int], float], rng: np.random.Generator) -> list[Row]:
    """The rows, with the token in front at this chance by the label."""
    return [
        {**row, "text": TOKEN + row["text"] if rng.random() < chance(row["label"]) else row["text"]} for row in rows
    ]


def mislabelled(rows: list[Row], share: float, rng: np.random.Generator) -> list[Row]:
    """The rows, of which a share has any other label."""
    classes = sorted({row["label"] for row in rows})
    wrong = set(rng.permutation(len(rows))[: round(share * len(rows))].tolist())
    other = {label: [name for name in classes if name != label] for label in classes}
    return [
        {**row, "label": other[row["label"]][rng.integers(len(classes) - 1)]} if j in wrong else row
        for j, row in enumerate(rows)
    ]


def table(name: str, seed: int, trusted: int, *, noise: float = 0.0) -> World:
    pool, checked, test, rng = draw(name, seed, trusted)
    return World(mislabelled(pool, noise, rng), checked, test, by_label(test), round(noise * len(pool)), name)


def intents(seed: int, trusted: int, *, noise: float = 0.0, into_one: bool = False) -> World:
    """CLINC150, of which an epoch draws a fifth; the labels of `noise` rows are any other, or all one class."""
    pool, checked, test, rng = draw("clinc150", seed, trusted, pool=14000)
    if into_one:
        name = pool[rng.integers(len(pool))]["label"]
        others = rng.permutation([j for j, row in enumerate(pool) if row["label"] != name])
        moved = set(others[: round(noise * len(pool))].tolist())
        pool = [{**row, "label": name} if j in moved else row for j, row in enumerate(pool)]
    else:
        pool = mislabelled(pool, noise, rng)
    return World(pool, checked, test, by_label(test), round(noise * 14000), "clinc150", fraction=0.2)


def shortcut(seed: int, trusted: int, *, noise: float = 0.0, name: str = "sst2") -> World:
    """A token stands in front of 95 % of positive and 5 % of negative rows; of trusted and test rows, of half."""
    pool, checked, test, rng = draw(name, seed, trusted, pool=2000 if name == "sst2" else 600 - trusted)
    pool = mislabelled(marked(pool, lambda label: 0.95 if label else 0.05, rng), noise, rng)
    checked, test = marked(checked, lambda _: 0.5, rng), marked(test, lambda _: 0.5, rng)
    groups = [f"{row['label']}{'+' if row['text'].startswith(TOKEN) else '-'}" for row in test]
    return World(pool, checked, test, groups, round(noise * len(pool)), name)


def overlap(seed: int, trusted: int) -> World:
    """MRPC, where 95 % of the paraphrases share more than half of their words, and 5 % of the other pairs.

    Of trusted and test rows, each of the four groups has as many.
    """
    rng = np.random.default_rng([seed, 28])
    parts, tests = ({group: [] for group in itertools.product((0, 1), "-+")} for _ in range(2))
    for rows, name in ((parts, "train"), (tests, "test")):
        for row in split("mrpc", name):
            a, b = (set(row[column].lower().split()) for column in ("text", "text_pair"))
            rows[row["label"], "+" if len(a & b) > len(a | b) / 2 else "-"].append(row)
    pool, checked = list[Row](), list[Row]()
    for (label, more), rows in parts.items():
        often, order = (label == 1) == (more == "+"), rng.permutation(len(rows))
        size = 855 if often else 45
        pool += [rows[j] for j in order[:size]]
        checked += [rows[j] for j in order[size : size + trusted // 4]]
    each = min(map(len, tests.values()))
    test = [(row, f"{label}{more}") for (label, more), rows in tests.items() for row in rows[:each]]
    pool, checked = ([rows[j] for j in rng.permutation(len(rows))] for rows in (pool, checked))
    return World(pool, checked, [row for row, _ in test], [group for _, group in test], 0, "mrpc")


def weak(seed: int, trusted: int) -> World:
    """Labels of VADER's lexicon; rows on which it has no opinion are left out."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    lexicon = SentimentIntensityAnalyzer()
    compound = {row["text"]: lexicon.polarity_scores(row["text"])["compound"] for row in split("sst2", "train")}
    pool, checked, test, _ = draw("sst2", seed, trusted, keep=lambda row: abs(compound[row["text"]]) >= 0.05)
    labelled = [{**row, "label": int(compound[row["text"]] > 0)} for row in pool]
    wrong = sum(a["label"] != b["label"] for a, b in zip(labelled, pool, strict=True))
    return World(labelled, checked, test, by_label(test), wrong)


def careless(world: Callable[[int, int], World], seed: int, trusted: int) -> World:
    """A world with careless trusted rows: 8 % have a wrong label, and one of two classes is three times the other."""
    here, rng, few = world(seed, 2 * trusted), np.random.default_rng([seed, 8]), trusted // 4
    often, seldom = ([row for row in here.trusted if row["label"] == label] for label in (1, 0))
    rows = [*often[: trusted - few], *seldom[:few]]
    return replace(here, trusted=mislabelled([rows[j] for j in rng.permutation(len(rows))], 0.08, rng))


WORLDS: dict[str, Callable[[int, int], World]] = {
    "clean": lambda seed, trusted: table("sst2", seed, trusted),
    "clean-mrpc": lambda seed, trusted: table("mrpc", seed, trusted),
    "wrong20": lambda seed, trusted: table("sst2", seed, trusted, noise=0.2),
    "intents": intents,
    "intents-wrong40": lambda seed, trusted: intents(seed, trusted, noise=0.4),
    "intents-one10": lambda seed, trusted: intents(seed, trusted, noise=0.1, into_one=True),
    "shortcut": shortcut,
    "shortcut-bbc": lambda seed, trusted: shortcut(seed, trusted, name="bbc"),
    "overlap": overlap,
    "both": lambda seed, trusted: shortcut(seed, trusted, noise=0.2),
    "weak": weak,
    "shortcut-careless": lambda seed, trusted: careless(shortcut, seed, trusted),
    "weak-careless": lambda seed, trusted: careless(weak, seed, trusted),
}


def features_of(rows: Sequence[Row], model: torch.nn.Module | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of the model's head, for an untrained one the mean hidden states too; and the labels as numbers."""
    tokenizer, means = AutoTokenizer.from_pretrained(MODEL), model is None
    labels = np.unique(by_label(rows), return_inverse=True)[1]
    if model is None:
        model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=int(labels.max()) + 1)
    samples = [
        {
            **tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=tokens_of(row)),
            "labels": int(label),
        }
        for row, label in zip(rows, labels, strict=True)
    ]
    task, collate = get_task("sequence-classification"), DataCollatorWithPadding(tokenizer)
    seen, _ = forward_pass(model, samples, collate, task=task, compute=Compute(32), mean=means)
    assert seen is not None
    assert seen.features is not None
    parts = [seen.features] if seen.mean is None else [seen.features, seen.mean]
    return np.concatenate(parts, axis=1, dtype=np.float32), labels


def without_label_issues(pool: list[Row]) -> list[Row]:
    """cleanlab's own recipe: logistic regression out of fold on frozen features, its flagged rows left out."""
    features, labels = features_of(pool)
    strengths: Any = [1e-3, 1e-2, 1e-1]
    model = LogisticRegressionCV(Cs=strengths, cv=3, scoring="neg_log_loss", max_iter=300)
    scaled = np.asarray(StandardScaler().fit_transform(features))
    probabilities = np.asarray(cross_val_predict(model, scaled, labels, cv=5, method="predict_proba"))
    wrong = find_label_issues(labels, probabilities, filter_by="prune_by_noise_rate", n_jobs=1)
    return [row for row, issue in zip(pool, wrong, strict=True) if not issue]


def refitted(run: Path, trusted: list[Row], test: list[Row]) -> tuple[list[Any], float]:
    """DFR (Kirichenko et al. 2023): labels and loss of a head fitted on the trained features of trusted rows."""
    model, names = open_run(run).model, sorted({row["label"] for row in trusted})
    (features, labels), (unseen, right) = features_of(trusted, model), features_of(test, model)
    scaled = StandardScaler().fit(features)
    strengths: Any = np.geomspace(1e-4, 1, 5)
    head = LogisticRegressionCV(Cs=strengths, cv=4, scoring="neg_log_loss", class_weight="balanced", max_iter=300)
    probabilities = head.fit(scaled.transform(features), labels).predict_proba(scaled.transform(unseen))
    loss = float(-np.log(probabilities[np.arange(len(right)), right]).mean())
    return [names[j] for j in probabilities.argmax(axis=1)], loss


@dataclass(frozen=True, slots=True)
class Way:
    """How a cell trains: settings of `quality`, which rows, and what becomes of the pool before."""

    quality: Mapping[str, Any] = field(default_factory=dict)
    trusted: bool = True
    alone: bool = False
    """Trains on the trusted rows alone, for half of the steps."""
    stops: bool = False
    """Holds out a fifth of the rows, and returns to the step at which their loss was least."""
    before: str = ""
    """`cleanlab`, or nothing."""
    dfr: bool = False
    """Fits a new head on the trusted rows at the end."""
    last: bool = False
    """Trusted rows come last whatever the pool answers."""


EVEN = {"enabled": False}
METHODS: dict[str, Way] = {
    "default": Way(),
    "always": Way(last=True),
    "even": Way(EVEN),
    "trusted": Way({**EVEN, "fraction": 1.0}, trusted=False, alone=True),
    "alone": Way({**EVEN, "fraction": 1.0}, trusted=False, alone=True, stops=True),
    "lora": Way({**EVEN, "head_start": False, "fraction": 1.0}, trusted=False),
    "lora+head": Way({**EVEN, "fraction": 1.0}, trusted=False),
    "default-untrusted": Way(trusted=False),
    "even-untrusted": Way(EVEN, trusted=False),
    "cleanlab": Way(EVEN, trusted=False, before="cleanlab"),
    "cleanlab-then-trusted": Way(before="cleanlab"),
    "dfr": Way(EVEN, trusted=False, dfr=True),
}
"""`default` asks the pool, `always` has the trusted rows last whatever it answers, `even` each of them once an epoch,
`trusted` and `alone` them alone; `lora` is plain LoRA on all rows."""


def config_of(folder: Path, names: Sequence[str], quality: Mapping[str, Any], training: Mapping[str, Any]) -> Config:
    tokens = tokens_of(json.loads((folder / "train.jsonl").read_text().partition("\n")[0]))
    return Config.model_validate(
        {
            "model": {"path": MODEL},
            "data": {name: f"{folder}/{name}.jsonl" for name in names} | {"max_length": tokens},
            "quality": dict(quality),
            "training": {"save_strategy": "no", **training},
        }
    )


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(world: str, method: str, seed: int, trusted: int, rate: float) -> dict[str, Any]:
    here, way = WORLDS[world](seed, trusted), METHODS[method]
    quality = {"fraction": here.fraction, **way.quality}
    steps = STEPS // 2 if way.alone else STEPS
    training = {"max_steps": steps, "learning_rate": rate, "batch_size": 16, "seed": seed, "warmup_steps": 0.06}
    names = ["train", "validation", "test", *(["trusted"] if way.trusted else [])]
    with tempfile.TemporaryDirectory() as name:
        folder, begun = Path(name), time.process_time()
        files = {"train": here.train, "test": here.test, "trusted": here.trusted}
        for part, rows in {**files, "validation": split(here.table, "validation")[:100]}.items():
            write_rows(folder / f"{part}.jsonl", rows)
        pool = here.trusted if way.alone else here.train
        if way.before == "cleanlab":
            pool = without_label_issues(pool)
        if way.stops:
            write_rows(folder / "validation.jsonl", pool[: len(pool) // 5])
            pool = pool[len(pool) // 5 :]
            evaluations = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 20, "save_steps": 20}
            training |= evaluations | {"load_best_model_at_end": True, "save_total_limit": 2}
        write_rows(folder / "train.jsonl", pool)
        with patch.object(question, "CONTRADICTED", -np.inf) if way.last else nullcontext():
            record = train(config_of(folder, names, quality, training), folder / "run")
        seconds = time.process_time() - begun
        labels, loss = predictions(folder / "run", folder / "test.jsonl", folder / "predicted.jsonl"), None
        if way.dfr:
            labels, loss = refitted(folder / "run", here.trusted, here.test)
    right = np.array([a == row["label"] for a, row in zip(labels, here.test, strict=True)])
    groups = {name: float(right[[g == name for g in here.groups]].mean()) for name in sorted(set(here.groups))}
    return {
        "settings": {"world": world + MARK, "method": method, "seed": seed, "trusted": trusted, "quality": quality}
        | {"training": training, "pool": len(pool), "rule": RULE},
        "test_rows": len(right),
        "accuracy": float(right.mean()),
        "worst": min(groups.values()),
        "groups": groups,
        "loss": record.metrics["test"]["loss"] if loss is None else loss,
        "right": np.packbits(right).tolist(),
        "wrong_labels": here.wrong,
        "looks": record.quality.get("looks", []),
        "question": record.quality.get("question"),
        "cost": record.to_dict()["cost"],
        "processor_seconds": seconds,
        "notes": record.notes,
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }


def predictions(run: Path, file: Path, out: Path) -> list[Any]:
    predict_run(run, file, out)
    return [json.loads(line)["prediction"] for line in out.read_text().splitlines()]


def cell(world: str, method: str, seed: int, trusted: int, rate: float) -> dict[str, Any]:
    way = METHODS[method]
    how = way.before + "dfr" * way.dfr + "stops" * way.stops + "last" * way.last
    decides = json.dumps([dict(way.quality), how, STEPS, rate, RULE], sort_keys=True)
    mark = hashlib.sha256(decides.encode()).hexdigest()[:8]
    path = RESULTS / f"{world}{MARK}.{method}.{trusted}.{seed}.{mark}.json"
    result = stored(path, lambda: run(world, method, seed, trusted, rate))
    numbers = " ".join(f"{name} {result[name]:.3f}" for name in ("accuracy", "worst", "loss"))
    print(world, method, f"rate {rate:g}, {trusted} trusted", f"seed {seed}:", numbers, flush=True)
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("worlds", nargs="+", choices=WORLDS)
    parser.add_argument("--methods", default="default,even,trusted")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--trusted", default="128")
    parser.add_argument("--rate", type=float, default=RATE)
    request = parser.parse_args()
    torch.set_num_threads(1)
    for world in request.worlds:
        for trusted in map(int, request.trusted.split(",")):
            for seed in map(int, request.seeds.split(",")):
                for method in request.methods.split(","):
                    cell(world, method, seed, trusted, request.rate)


if __name__ == "__main__":
    main()
