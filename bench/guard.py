"""Does the guard fall back to random draws where a Q draws more wrong labels than they do?

    python bench/guard.py [--seeds 0,1] [--wrong 0.2]

A cell of bench/selection.py (SST-2, 2,000 rows, MiniLM) is warmed up on one pass, and all terms of its rows are
measured in float32; nothing is trained further. For each Q: the share of wrong labels that half of the rows would
have, what the guard decides by doubt, and what it would by convergence. Scores are kept in bench/.cache.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import commit, machine
from selection import CACHE, Classification, control, prepare, train_epoch
from selection_data import PASSES, Cell

from tsqlora.files import write_json
from tsqlora.quality.asked import PAPER_TERMS
from tsqlora.quality.fallback import guard_test, guarded
from tsqlora.quality.rows import reference_indices
from tsqlora.quality.sampling import expected_inclusion
from tsqlora.quality.score import score
from tsqlora.quality.scores import Scores, from_terms
from tsqlora.training.record import versions

QUALITIES: dict[str, dict[str, float]] = {
    "paper": dict.fromkeys(PAPER_TERMS, 1 / 3),
    "N": {"gradient_norm": 1.0},
    "D": {"loss_reduction": 1.0},
    "C": {"convergence": 1.0},
    "(C - loss)/3": {"convergence": 1 / 3, "loss": -1 / 3},
    "-loss": {"loss": -1.0},
}


def scored(cell: Cell, shared: Path) -> Scores:
    """All terms after warm-up; which labels are wrong is in the record."""
    path = CACHE / f"guard-{cell.task}-{cell.seed}-{cell.wrong:g}.parquet"
    if not path.exists():
        warm = prepare(cell, shared, passes=PASSES)
        for epoch in range(round(1 / cell.fraction)):
            train_epoch(warm, epoch, control(cell, len(warm.train), epoch))
        exact = prepare(cell, shared, passes=PASSES, exact=True)
        with torch.no_grad():
            for name, parameter in exact.trained.items():
                parameter.copy_(warm.trained[name])
        CACHE.mkdir(exist_ok=True)
        score(
            exact.model,
            exact.train,
            exact.collate,
            reference=reference_indices(len(exact.train), 512, cell.seed),
            task=Classification(),
            weights=QUALITIES["paper"],
            seed=cell.seed,
            record={"bad": exact.bad},
        ).save(path)
    return Scores.load(path)


def decided(scores: Scores, name: str, fraction: float) -> dict[str, Any]:
    bad = np.array(scores.record["bad"])
    by_name = from_terms(
        scores.terms,
        labels=scores.labels,
        stratified=True,
        weights=QUALITIES[name],
        temperature=1.0,
        record={},
        predictions=scores.predictions,
    )
    chance = expected_inclusion(by_name.quality, fraction=fraction, temperature=1.0, strata=by_name.strata)
    convergence = scores.terms["convergence"].astype(np.float64)
    return {
        "quality": name,
        "wrong": float(bad.mean()),
        "wrong_drawn": float((chance * bad).sum() / chance.sum()),
        "guard": guarded(by_name, fraction)[0].record["guard"],
        "by_convergence": guard_test("convergence", convergence, chance=chance, kept=by_name.kept).to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("/work/shared"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "guard.json")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--wrong", default="0.2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = [Cell("sst2", int(seed), float(wrong)) for wrong in args.wrong.split(",") for seed in args.seeds.split(",")]
    results = {
        f"{cell.name}/{name}": {"seed": cell.seed, **decided(scored(cell, args.shared), name, cell.fraction)}
        for cell in cells
        for name in QUALITIES
    }
    write_json(args.out, {"versions": versions(), "commit": commit(), "machine": machine(), "results": results})


if __name__ == "__main__":
    main()
