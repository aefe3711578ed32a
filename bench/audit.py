"""The audit against cleanlab used properly, and against a vote of neighbours, on the same features (issue 30).

    python bench/audit.py [TABLE ...] [--noise even-0.2,weak-0.2] [--seeds 0,1,2] [--deep]

At most 4,000 rows of a table (CLINC150: 6,000), drawn once and read once by the encoder as `tsqlora audit` reads them;
the features are kept under ~/.cache/tsqlora-bench. Each cell is a file in bench/results/audit, and a cell that is there
is not run again. Wrong labels:

- `even-RATE`: rows at random get any other class;
- `pairs-RATE`: each class loses rows to one certain other. Of two classes this is `even`, and is not run;
- `one-RATE`: this share of all rows, of the other classes, gets one class (`bench/judge.py`);
- `weak-RATE`: the labels of a weak model, a logistic regression on a twentieth of the rows and 16 principal
  components, where it is surest and wrong; where that is too few, where it is nearest to being wrong;
- `none`: the table as it is, with whatever is wrong there.

`wnut17` and `goemotions`, which are no default tables, take `none` and `even-RATE`: so many of their entities' tags, or
one label of so many of their rows, are set wrong.

`--deep` fine-tunes in three folds instead, as `tsqlora audit --deep` does, and orders the rows by our probabilities and
by the loss of the models that have not seen them.
"""

import hashlib
import json
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from cleanlab.count import estimate_joint
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from origin import ROOT, commit, machine, parser_of, stored
from scipy.special import log_softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss
from sklearn.model_selection import cross_val_predict, train_test_split
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from tsqlora.files import write_json
from tsqlora.quality.audit import audit_of, audit_of_judgement
from tsqlora.quality.forward_pass import forward_pass
from tsqlora.quality.judge import judge_logits
from tsqlora.quality.rule import Compute
from tsqlora.run.audit import BATCH_SIZE, ENCODER, TOKENS, audit_config, audited
from tsqlora.run.config import Config
from tsqlora.run.deep import out_of_fold_logits
from tsqlora.run.demo import bbc_news, package_folder
from tsqlora.run.job import load
from tsqlora.tasks import get_task
from tsqlora.training.record import versions

SHARED = ROOT / ".." / "shared" / "data"
RESULTS = Path(os.environ.get("RESULTS", ROOT / "bench" / "results" / "audit"))
FEATURES = Path.home() / ".cache" / "tsqlora-bench"
TABLES = {"clinc150": 6000, "bbc": 4000, "sst2": 4000, "mrpc": 4000, "cola": 4000}
"""Rows of each, at most."""
NOISE = ("none", "even-0.05", "even-0.1", "even-0.2", "even-0.4", "pairs-0.2", "weak-0.2")
FOLDS, NEIGHBOURS, ITERATIONS, BINS = 5, 10, 400, 10
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """One method's verdict on each row, in the rows' order; the higher in `order`, the likelier wrong."""

    order: np.ndarray
    probability: np.ndarray
    flagged: np.ndarray
    rate: float | None


def rows_of(table: str, most: int) -> tuple[list[list[str]], np.ndarray]:
    """Texts, or pairs of texts, and labels as numbers; drawn with one seed for all, as files are sorted by class.

    Of GoEmotions the rows with one label.
    """
    if table == "bbc":
        rows = [([text], label) for text, label in bbc_news()]
    else:
        lines = [row for row in lines_of(table) if len(row.get("labels", ["one"])) == 1]
        labels = [row["labels"][0] if "labels" in row else row["label"] for row in lines]
        texts = [[row["text"], *([row["text_pair"]] if "text_pair" in row else [])] for row in lines]
        rows = list(zip(texts, labels, strict=True))
    some = np.sort(np.random.default_rng(30).permutation(len(rows))[:most])
    return [rows[j][0] for j in some], np.unique([rows[j][1] for j in some], return_inverse=True)[1]


def features_of(table: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """What the head is given and the mean hidden states of each row, at most so many, and its label as it is."""
    path = FEATURES / f"{table}-{most}-{TOKENS}.npz"
    if not path.exists():
        texts, labels = rows_of(table, most)
        encoder = package_folder(ENCODER) / "model"
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=int(labels.max()) + 1)
        samples = [
            {**tokenizer(*text, truncation=True, max_length=TOKENS), "labels": int(label)}
            for text, label in zip(texts, labels, strict=True)
        ]
        collate, compute = DataCollatorWithPadding(tokenizer), Compute(BATCH_SIZE)
        seen, _ = forward_pass(
            model, samples, collate, task=get_task("sequence-classification"), compute=compute, mean=True
        )
        parts = [part for part in (seen and seen.features, seen and seen.mean) if part is not None]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, features=np.concatenate(parts, axis=1, dtype=np.float32), labels=labels)
    with np.load(path) as stored:
        return stored["features"], stored["labels"]


def spoilt(features: np.ndarray, labels: np.ndarray, noise: str, seed: int) -> np.ndarray:
    """The labels, some of them set wrong."""
    kind, _, rate = noise.partition("-")
    rng, n, k = np.random.default_rng([seed, 30]), len(labels), int(labels.max()) + 1
    rows = rng.permutation(n)[: round(float(rate or 0) * n)]
    others = (labels + rng.integers(1, k, n)) % k
    if kind == "pairs":
        ring = rng.permutation(k)  # each class loses to the next one
        others = ring[(np.argsort(ring)[labels] + 1) % k]
    if kind == "one":
        others = np.full(n, rng.integers(k))
        rows = rng.permutation(np.flatnonzero(labels != others))[: len(rows)]
    if kind == "weak":
        parts = np.asarray(StandardScaler().fit_transform(PCA(16, random_state=seed).fit_transform(features)))
        basis, _ = train_test_split(np.arange(n), train_size=0.05, stratify=labels, random_state=seed)
        probabilities = (
            LogisticRegression(max_iter=ITERATIONS).fit(parts[basis], labels[basis]).predict_log_proba(parts)
        )
        own = probabilities[np.arange(n), labels]
        probabilities[np.arange(n), labels] = -np.inf
        others, rows = probabilities.argmax(axis=1), np.argsort(own - probabilities.max(axis=1))[: len(rows)]
    wrong = labels.copy()
    wrong[rows] = others[rows]
    return wrong


def ours(features: np.ndarray, labels: np.ndarray) -> Verdicts:
    verdicts = audit_of(features, labels)
    order, probability, flagged = np.empty(len(labels)), np.empty(len(labels)), np.zeros(len(labels), dtype=bool)
    order[verdicts.ids], probability[verdicts.ids] = -np.arange(len(labels)), verdicts.probability
    flagged[verdicts.ids[: verdicts.likely_wrong]] = True
    return Verdicts(order, probability, flagged, verdicts.rate)


def cleanlab(features: np.ndarray, labels: np.ndarray) -> Verdicts:
    """The recipe of its tutorials: logistic regression out of fold, self-confidence, pruning by noise rate.

    The strength of the regression is chosen by the loss out of fold, as ours is: scikit-learn's own overfits here.
    """
    scaled = np.asarray(StandardScaler().fit_transform(features))

    def out_of_fold(strength: float) -> np.ndarray:
        model = LogisticRegression(C=strength, max_iter=ITERATIONS)
        return np.asarray(cross_val_predict(model, scaled, labels, cv=FOLDS, method="predict_proba"), dtype=np.float64)

    probabilities = min(map(out_of_fold, STRENGTHS), key=lambda probabilities: log_loss(labels, probabilities))
    doubt = 1 - get_label_quality_scores(labels, probabilities, method="self_confidence")
    flagged = find_label_issues(labels, probabilities, filter_by="prune_by_noise_rate", n_jobs=1)
    return Verdicts(doubt, doubt, np.asarray(flagged), float(1 - np.trace(estimate_joint(labels, probabilities))))


def neighbours(features: np.ndarray, labels: np.ndarray) -> Verdicts:
    """The share of the nearest rows that have another label."""
    centred = features - features.mean(axis=0)
    near = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(centred).kneighbors(return_distance=False)
    doubt = (labels[near] != labels[:, None]).mean(axis=1)
    return Verdicts(doubt, doubt, doubt > 0.5, None)


def deep(table: str, labels: np.ndarray) -> dict[str, Verdicts]:
    """`tsqlora audit --deep` on these labels, and the out-of-fold loss of the same models."""
    rows = [
        {"text": text[0], "label": int(label), **({"text_pair": text[1]} if len(text) > 1 else {})}
        for text, label in zip(rows_of(table, TABLES[table])[0], labels, strict=True)
    ]
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "train.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = str(package_folder(ENCODER) / "model")
        data = {"train": str(file), "validation": str(file), "max_length": TOKENS}
        job = load(Config.model_validate({"model": {"path": model}, "data": data}))
        logits = out_of_fold_logits(job.config, job.data, max_length=TOKENS)
    result, order = audit_of_judgement(judge_logits(logits, labels), labels), np.arange(len(labels))
    own = log_softmax(logits, axis=1)[order, labels]
    ours = Verdicts(
        np.empty(len(labels)), np.empty(len(labels)), np.isin(order, result.ids[: result.likely_wrong]), result.rate
    )
    ours.order[result.ids], ours.probability[result.ids] = -order, result.probability
    return {"deep": ours, "deep loss": Verdicts(-own, 1 - np.exp(own), own < np.log(0.5), None)}


def measured(verdicts: Verdicts, wrong: np.ndarray) -> dict[str, float | None]:
    """Against the labels that were set wrong. Where none was, only how many rows are flagged says something."""
    flagged, planted = int(verdicts.flagged.sum()), int(wrong.sum())
    hits = int((verdicts.flagged & wrong).sum())
    bins = np.minimum((verdicts.probability * BINS).astype(int), BINS - 1)
    error = sum(abs((verdicts.probability - wrong)[bins == b].sum()) for b in range(BINS)) / len(wrong)
    return {
        "average_precision": float(average_precision_score(wrong, verdicts.order)) if planted else None,
        "precision": hits / flagged if planted and flagged else None,
        "recall": hits / planted if planted else None,
        "calibration_error": float(error) if planted else None,
        "flagged": flagged / len(wrong),
        "rate": verdicts.rate,
    }


def run(table: str, noise: str, seed: int, *, fine_tune: bool) -> dict[str, Any]:
    features, labels = features_of(table, TABLES[table])
    spoilt_labels = spoilt(features, labels, noise, seed)
    ways: dict[str, Any] = {}
    if fine_tune:
        begun, found_by = time.process_time(), deep(table, spoilt_labels)
        seconds = time.process_time() - begun
        for name, verdicts in found_by.items():
            ways[name] = {**measured(verdicts, spoilt_labels != labels), "processor_seconds": seconds}
    for way in () if fine_tune else (ours, cleanlab, neighbours):
        begun = time.process_time()
        verdicts = way(features, spoilt_labels)
        seconds = time.process_time() - begun
        ways[way.__name__] = {**measured(verdicts, spoilt_labels != labels), "processor_seconds": seconds}
    return {
        "settings": {"table": table, "noise": noise, "seed": seed},
        "rows": len(labels),
        "classes": int(labels.max()) + 1,
        "wrong": int((spoilt_labels != labels).sum()),
        "ways": ways,
        "versions": {**versions(), **{name: version(name) for name in ("cleanlab", "scikit-learn")}},
        "machine": machine(),
        "commit": commit(),
    }


def cell(table: str, noise: str, seed: int, *, fine_tune: bool) -> None:
    basis = json.dumps([TABLES[table], TOKENS, FOLDS, NEIGHBOURS, ITERATIONS, BINS, STRENGTHS])
    mark = hashlib.sha256(basis.encode()).hexdigest()[:8]
    path = RESULTS / f"{table}.{noise}.{seed}.{'deep.' * fine_tune}{mark}.json"
    result = stored(path, lambda: run(table, noise, seed, fine_tune=fine_tune))
    for name, way in result["ways"].items():
        numbers = " ".join(f"{key} {value:.3f}" for key, value in way.items() if value is not None)
        print(table, noise, f"seed {seed}", f"{name}:", numbers, flush=True)


Spoilt = tuple[list[dict[str, Any]], set[tuple[int, int | str]]]
"""Rows, and the row of each wrong label, with its token, or itself where a row has several labels."""


def lines_of(table: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHARED / table / "train.jsonl").read_text().splitlines()]


def spoilt_tags(rng: np.random.Generator, rate: float) -> Spoilt:
    """WNUT17 with this share of the tags of entities set to another tag."""
    rows = lines_of("wnut17")
    places = [(j, k) for j, row in enumerate(rows) for k, tag in enumerate(row["tags"]) if tag != "O"]
    names, wrong = sorted({tag for row in rows for tag in row["tags"]}), set[tuple[int, int | str]]()
    for place in rng.permutation(len(places))[: round(rate * len(places))]:
        j, k = places[place]
        others = [name for name in names if name != rows[j]["tags"][k]]
        rows[j]["tags"][k] = others[rng.integers(len(others))]
        wrong.add((j, k))
    return rows, wrong


def spoilt_sets(rng: np.random.Generator, rate: float) -> Spoilt:
    """GoEmotions with one label of this share of the rows replaced by a label that the row does not have."""
    rows = lines_of("goemotions")
    names, wrong = sorted({name for row in rows for name in row["labels"]}), set[tuple[int, int | str]]()
    for j in rng.permutation(len(rows))[: round(rate * len(rows))].tolist():
        others = [name for name in names if name not in rows[j]["labels"]]
        rows[j]["labels"][0] = others[rng.integers(len(others))]
        wrong.add((j, rows[j]["labels"][0]))
    return rows, wrong


SEVERAL = {
    "wnut17": ("token-classification", spoilt_tags),
    "goemotions": ("multi-label-classification", spoilt_sets),
}
"""Tables of tags and of several labels a row: the task, and how noise is made."""


def several(table: str, noise: str, seed: int) -> dict[str, Any]:
    """A table of tags or of several labels a row, audited as `tsqlora audit` does it."""
    task, spoil = SEVERAL[table]
    rows, wrong = spoil(np.random.default_rng([seed, 30]), float(noise.partition("-")[2] or 0))
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "train.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = audit_config(str(file), None, [f"task.type={task}"])
        result = audited(config, deep=False, progress=None)[1]
    names = [result.classes[label] for label in result.labels] if result.tokens is None else result.tokens.tolist()
    hits = np.array([place in wrong for place in zip(result.ids.tolist(), names, strict=True)])
    order, flagged = -np.arange(len(hits)), np.arange(len(hits)) < result.likely_wrong
    verdicts = Verdicts(order, result.probability, flagged, result.rate)
    return {
        "settings": {"table": table, "noise": noise, "seed": seed},
        "judged": len(hits),
        "wrong": len(wrong),
        "wrong_judged": int(hits.sum()),
        **measured(verdicts, hits),
        "precision_of_first_100": float(hits[:100].mean()),
        "evident": result.evident,
        "low": result.low,
        "high": result.high,
        "processor_seconds": time.process_time() - begun,
        "versions": {**versions(), "scikit-learn": version("scikit-learn")},
        "machine": machine(),
        "commit": commit(),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("tables", nargs="*", default=list(TABLES))
    parser.add_argument("--noise", default=",".join(NOISE))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--deep", action="store_true")
    request = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for seed in map(int, request.seeds.split(",")):
        for table in request.tables:
            for noise in request.noise.split(","):
                if table in SEVERAL:
                    (RESULTS / "tags").mkdir(parents=True, exist_ok=True)
                    path = RESULTS / "tags" / f"{table}.{noise}.{seed}.json"
                    write_json(path, result := several(table, noise, seed))
                    print({name: value for name, value in result.items() if isinstance(value, float | int)}, flush=True)
                    continue
                two = features_of(table, TABLES[table])[1].max() == 1
                if (noise == "none" and seed) or (noise.startswith("pairs") and two):
                    continue  # the same again: no way draws at random
                cell(table, noise, seed, fine_tune=request.deep)


if __name__ == "__main__":
    main()
