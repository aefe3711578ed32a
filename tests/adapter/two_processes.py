"""Two processes: each probes its half of the rows, then they change ranks. Run by test_change.py."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import collate, samples
from slotted import QUERY, WIDE, backward, wrapped
from tsqlora.adapter.change import change_ranks
from tsqlora.adapter.importance import Importance
from tsqlora.adapter.slots import active_ranks, find_slots
from tsqlora.probe import probe_pass


def main(rank: int, folder: Path) -> None:
    rows = samples(8, 3)
    model = wrapped()
    if rank == 0:
        torch.save(dict(probe_pass(model, rows, collate).sensitivity().values), folder / "alone.pt")
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=50))
    probe = probe_pass(model, rows[rank * 4 :][:4], collate)
    measured, layers = probe.sensitivity(), find_slots(model)
    importance = Importance(layers)
    # Two different sets of gradients: what is decided must not differ all the same.
    for step in range(2):
        backward(model, samples(4, 3, seed=10 * rank + step))
        importance.update()
    target = {name: slots.rank for name, slots in layers.items()} | {QUERY: 2, WIDE: 6}
    sketches = probe.directions()
    if rank == 1:
        sketches = {name: -sketch.roll(1) for name, sketch in sketches.items()}
    change_ranks(layers, target, importance=importance, sketches=sketches, optimizer=None, min_age=0, seed=0)
    ranks = active_ranks(model)
    told = {
        "ranks": {name: ranks[name] for name in (QUERY, WIDE)},
        "sensitivity": dict(measured.values),
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name},
    }
    torch.save(told, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, since importing everything twice would take the longest.
    child = os.fork()
    main(1 if child == 0 else 0, Path(sys.argv[1]))
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
