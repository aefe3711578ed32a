"""What adapters in the top blocks only buy and cost: accuracy against processor seconds, at equal steps and parameters.

    python bench/depth.py [--tables clinc150-3000,sst2-2000] [--depths all,3,2,1] [--seeds 0,1,2] [--rates 5e-4]

MiniLM or the encoder that MODEL names, `tsqlora` by default, tables and curves as in bench/headstart.py. Each depth has
its learning rate chosen on validation rows, on the first seed. One core a cell. Each cell is a file in
bench/results/depth, and a cell that is there is not run again.
"""

import os
from pathlib import Path
from typing import Any

import torch
from headstart import MARK, finished, run, sweep
from origin import ROOT, parser_of

RESULTS = Path(os.environ.get("RESULTS", ROOT / "bench" / "results" / "depth"))
TABLES = ("clinc150-3000", "sst2-2000", "mrpc-2000", "stsb-2000")
DEPTHS = ("all", "3", "2", "1")
"""Of MiniLM's six blocks."""


def run_at(table: str, depth: str, rate: float, seed: int) -> dict[str, Any]:
    result = run(table, "tsqlora", rate, seed, depth=depth if depth == "all" else int(depth))
    result["settings"]["depth"] = depth
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--depths", default=",".join(DEPTHS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rates", default="5e-4,1e-3,2e-3")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for table in args.tables.split(","):
        for depth in args.depths.split(","):

            def cell(rate: float, seed: int, table: str = table, depth: str = depth) -> dict[str, Any]:
                path = RESULTS / f"{table}{MARK}.{depth}.{rate:g}.{seed}.json"
                return finished(path, lambda: run_at(table, depth, rate, seed))

            sweep(cell, args.rates, args.seeds)


if __name__ == "__main__":
    main()
