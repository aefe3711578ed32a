"""Which answers do not fit: what a look with a language model detects, and when it must detect nothing.

    python bench/answers.py features [--tables alpaca,scitldr,xsum,chats] [--rows 300] [--model DIR]
    python bench/answers.py coverage
    python bench/answers.py pairs

`features` reads each table with the model: answers behind their prompts, alone, behind those of planted and of real
faults, and behind eight other prompts. Real faults come from other generators than the detector's: answers of the next
row, answers of the row with the nearest prompt, and the first half of an answer. A table is a file in
bench/.cache/answers, and is not read again. `coverage` plants real faults in a share of the rows, many times, and
writes the look's results: bench/results/answers.json. `pairs` has a row's answer as the chosen one and a faulty one as
rejected, and swaps a share: bench/results/answers_pairs.json. Commit 1299620 has further parts, which are finished:
`apply`, `real`, `short` and `cuts`.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import ROOT, commit, machine, parser_of, stored, write
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import average_precision_score
from transformers import AutoModelForCausalLM

from tsqlora.auditing.texts import answers
from tsqlora.auditing.texts.answers import Turn, behind, features_of, read_answers, turns_of
from tsqlora.auditing.texts.command import load_vocabulary
from tsqlora.auditing.texts.faults import (
    Detection,
    cross_fitted,
    cut_place,
    detect,
    donors_of,
    folds_of,
    plantings,
)
from tsqlora.auditing.texts.look import DECOYS
from tsqlora.auditing.texts.raw import prepared_rows
from tsqlora.model.request import Compute
from tsqlora.rows.chat import format_of
from tsqlora.rows.rows import Row as FileRow

DATA, RESULTS = ROOT / ".." / "shared" / "data", ROOT / "bench" / "results"
CACHE = ROOT / "bench" / ".cache" / "answers"
PROMPT, SHORT = {"scitldr": 512, "xsum": 512}, 160
"""Most tokens of a prompt: more for documents, since summaries of a document that is cut seem foreign."""
SHARES, DRAWS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4), 40
Row = dict[str, Any]
Draw = Callable[[dict[str, Any], float, int], dict[str, Any]]


def chat(*contents: str) -> Row:
    return {"messages": [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)]}


def lines(name: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / name / "train.jsonl").read_text().splitlines()]


def prompt_of(row: Row) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]


def summaries(name: str) -> list[Row]:
    return [chat(f"Summarise in one sentence.\n\n{row['document']}", row["summary"]) for row in lines(name)]


def alpaca() -> list[Row]:
    return [chat(prompt_of(row), row["output"]) for row in lines("alpaca")]


def chats() -> list[Row]:
    rows = lines("alpaca")
    return [
        chat(prompt_of(a), a["output"], prompt_of(b), b["output"]) for a, b in zip(rows[::2], rows[1::2], strict=False)
    ]


TABLES: dict[str, Callable[[], list[Row]]] = {
    "alpaca": alpaca,
    "scitldr": partial(summaries, "scitldr"),
    "xsum": partial(summaries, "xsum"),
    "chats": chats,
}


def turns_of_table(name: str, rows: int, vocabulary: Any) -> list[Turn]:
    table = TABLES[name]()
    return turns_of_rows([table[j] for j in np.random.default_rng(3).permutation(len(table))[:rows]], name, vocabulary)


def turns_of_rows(chosen: Sequence[Row], name: str, vocabulary: Any) -> list[Turn]:
    format, turns = format_of(["messages"], name), list[Turn]()
    read = [FileRow(row, name, j + 1, j) for j, row in enumerate(chosen)]
    made = prepared_rows(read, format, vocabulary.tokenizer, max_length=4096)
    for row, one in zip(read, made, strict=True):
        turns += turns_of(format.show(row), one.sequences, vocabulary)
    return turns


def nearest(turns: Sequence[Turn]) -> np.ndarray:
    """The turn with the nearest prompt."""
    prompts = TfidfVectorizer(sublinear_tf=True).fit_transform([turn.question for turn in turns])
    alike = (prompts @ prompts.T).toarray()
    np.fill_diagonal(alike, -1)
    return alike.argmax(1)


def features(name: str, rows: int, model: str) -> dict[str, Any]:
    answers.MOST_PROMPT, answers.MOST_ANSWER = PROMPT.get(name, SHORT), 96
    vocabulary, _ = load_vocabulary(model, None)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    turns, rng = turns_of_table(name, rows, vocabulary), np.random.default_rng(0)
    n, folds = len(turns), folds_of(turns, 0)
    tokens = [[vocabulary.tokens[j] for j in one.answer[answers.ends_of(len(one.answer))]] for one in turns]
    cuts = [cut_place(some, rng) for some in tokens]
    places = [(len(some), cut, max(1, len(some) // 2)) for some, cut in zip(tokens, cuts, strict=True)]
    order = {
        "next": np.arange(1, n + 1) % n,
        "near": nearest(turns),
        "planted": donors_of(turns, folds, np.arange(n), rng),
    }
    samples = {
        "prompted": [behind(one.prompt, one.answer, some) for one, some in zip(turns, places, strict=True)],
        "alone": [behind(one.opening, one.answer) for one in turns],
        **{
            key: [behind(a.prompt, turns[j].answer) for a, j in zip(turns, js, strict=True)]
            for key, js in order.items()
        },
    }
    for k in range(DECOYS):
        others = rng.permutation(n)
        samples[f"decoy{k}"] = [behind(turns[j].prompt, one.answer) for one, j in zip(turns, others, strict=True)]
    columns = {
        key: read_answers(net, some, vocabulary.stops, Compute(16, torch.bfloat16), phase=key)
        for key, some in samples.items()
    }
    return {
        "settings": {"table": name, "rows": rows, "model": Path(model).name}
        | {"prompt": answers.MOST_PROMPT, "answer": answers.MOST_ANSWER},
        "columns": {
            f"{a}.{b}": np.round(value, 5).tolist() for a, some in columns.items() for b, value in some.items()
        },
        "orders": {key: js.tolist() for key, js in order.items()},
        "folds": folds.tolist(),
        "row": [one.row for one in turns],
        "whole": [len(one.answer) <= answers.MOST_ANSWER for one in turns],
        "cuts": cuts,
        "machine": machine(),
        "commit": commit(),
    }


def foreign_draw(cell: dict[str, Any], share: float, order: str, seed: int) -> dict[str, Any]:
    """The look's result where a share of the answers is another row's."""
    own, bad, planted, loss, decoys, faulty = with_foreign(cell, share, order, seed)
    folds = np.array(cell["folds"])
    return judged(looked(own, bad, folds, folds[planted], loss, decoys), faulty)


def part_of(cell: dict[str, Any], key: str) -> dict[str, np.ndarray]:
    return {name: np.array(cell["columns"][f"{key}.{name}"]) for name in ("loss", "tokens", "entropy")}


def with_foreign(cell: dict[str, Any], share: float, order: str, seed: int) -> tuple[np.ndarray, ...]:
    """Features of rows of which a share has another row's answer, those of planted faults and their rows; losses of
    the answers behind their prompts and, the least, behind others; and which are faulty."""

    prompted, alone, other, planted = (part_of(cell, key) for key in ("prompted", "alone", order, "planted"))
    rng, n = np.random.default_rng([seed, 1]), len(cell["folds"])
    faulty = np.zeros(n, np.bool_)
    faulty[rng.permutation(n)[: round(share * n)]] = True
    owner = np.where(faulty, cell["orders"][order], np.arange(n))
    donors = np.array(cell["orders"]["planted"])
    usable = np.flatnonzero(donors >= 0)
    own = np.where(faulty[:, None], features_of(other, alone, owner), features_of(prompted, alone))
    bad = features_of({name: value[usable] for name, value in planted.items()}, alone, donors[usable])
    loss = np.where(faulty, other["loss"], prompted["loss"])
    decoys = np.stack([cell["columns"][f"decoy{k}.loss"] for k in range(DECOYS)], 1)[owner].min(1)
    return own, bad, usable, loss, decoys, faulty


def looked(
    own: np.ndarray,
    bad: np.ndarray,
    folds: np.ndarray,
    bad_folds: np.ndarray,
    loss: np.ndarray,
    decoys: np.ndarray,
) -> Detection:
    """The detection; of planted answers one in nine fits its prompt best, as one of nine equals."""
    scores, planted = cross_fitted(own, bad, folds, bad_folds)
    fits = np.r_[loss < decoys, np.random.default_rng(0).random(len(bad)) < 1 / (1 + DECOYS)]
    return detect(scores, planted, plantings(len(own), np.arange(len(bad))), fits)


def cut_draw(cell: dict[str, Any], share: float, seed: int) -> dict[str, Any]:
    """The look's result where a share of the answers ends in its middle."""
    stops, cuts = np.array(cell["columns"]["prompted.stop"]), np.array(cell["cuts"])
    whole = np.array(cell["whole"])
    rng, folds = np.random.default_rng([seed, 2]), np.array(cell["folds"])[whole]
    stops, cuts = stops[whole], cuts[whole]
    faulty = np.zeros(len(stops), np.bool_)
    faulty[rng.permutation(len(stops))[: round(share * len(stops))]] = True
    own, turn = np.where(faulty, stops[:, 2], stops[:, 0])[:, None], np.flatnonzero(cuts)
    return judged(detect(*cross_fitted(own, stops[turn, 1:2], folds, folds[turn])), faulty)


def swapped_draw(cell: dict[str, Any], share: float, kind: str, seed: int) -> dict[str, Any]:
    """The look's result where a share of the pairs has the chosen answer as the rejected one."""
    folds, stops = np.array(cell["folds"]), np.array(cell["columns"]["prompted.stop"])
    if kind == "cut":
        right = (stops[:, 0] - stops[:, 2])[:, None]
    else:
        prompted, alone, other = (part_of(cell, key) for key in ("prompted", "alone", kind))
        right = features_of(prompted, alone) - features_of(other, alone, np.array(cell["orders"][kind]))
    faulty = np.zeros(len(right), np.bool_)
    faulty[np.random.default_rng([seed, 5]).permutation(len(right))[: round(share * len(right))]] = True
    pairs = np.where(faulty[:, None], -right, right)
    return judged(detect(*cross_fitted(pairs, -pairs, folds, folds)), faulty)


def judged(detection: Detection, faulty: np.ndarray) -> dict[str, Any]:
    chosen = detection.listed
    return {
        "share": float(faulty.mean()),
        "rate": detection.rate,
        "high": detection.high,
        "recall": detection.recall,
        "usable": detection.usable,
        "evident": bool(len(chosen)),
        "listed": len(chosen),
        "right": int(faulty[chosen].sum()),
        "average_precision": float(average_precision_score(faulty, detection.score)) if faulty.any() else None,
    }


def covered(kinds: Mapping[str, Draw]) -> dict[str, Any]:
    """Means over draws, for each table, kind of fault and share."""
    results, settings = dict[str, Any](), list[Any]()
    for path in sorted(CACHE.glob("*.json")):
        cell = json.loads(path.read_text())
        settings.append(cell["settings"])
        for share, (kind, of) in itertools.product(SHARES, kinds.items()):
            some = [of(cell, share, k) for k in range(DRAWS)]
            key = f"{cell['settings']['table']}, {kind}, {share:g}"
            results[key] = {
                name: float(np.mean([one[name] for one in some if one[name] is not None] or [np.nan]))
                for name in some[0]
            } | {"under_high": float(np.mean([one["share"] <= one["high"] for one in some]))}
            print(key, {name: round(value, 3) for name, value in results[key].items()}, flush=True)
    return {"settings": settings, "draws": DRAWS, "results": results, "machine": machine(), "commit": commit()}


KINDS: dict[str, dict[str, Draw]] = {
    "answers": {
        "foreign, next": lambda cell, share, seed: foreign_draw(cell, share, "next", seed),
        "foreign, near": lambda cell, share, seed: foreign_draw(cell, share, "near", seed),
        "cut": cut_draw,
    },
    "answers_pairs": {
        f"swapped, {kind}": lambda cell, share, seed, kind=kind: swapped_draw(cell, share, kind, seed)
        for kind in ("next", "near", "cut")
    },
}
"""By the name of the result."""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=("features", "coverage", "pairs"))
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--model", default="")
    request = parser.parse_args()
    torch.set_num_threads(1)
    if result := {"coverage": "answers", "pairs": "answers_pairs"}.get(request.what):
        write(RESULTS / f"{result}.json", covered(KINDS[result]))
        return
    for name in request.tables.split(","):
        path = CACHE / f"{name}.{Path(request.model).name}.json"
        stored(path, partial(features, name, request.rows, request.model))
        print(name, flush=True)


if __name__ == "__main__":
    main()
