"""Two processes, each with half of every weight: FSDP2 in a loop of one's own, with ranks that follow the loss.

Run it by itself, it starts both. On GPUs a launcher starts them: torchrun, and dist.init_process_group("nccl").
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loop import batch, bert
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from tsqlora import paper

STEPS, PROCESSES = 60, 2


def train(process: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=process, world_size=PROCESSES)
    model = paper.wrap(bert(), mean_rank=4).train()  # first the slots, then the parts, then the optimizer
    for layer in model.get_base_model().bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    ranks = paper.RankLoop(model, optimizer, total_steps=STEPS, interval=10)
    for step in range(STEPS):
        ranks.before_forward()
        model(**batch(PROCESSES * step + process)).loss.backward()
        ranks.before_optimizer_step()
        optimizer.step()
        ranks.after_optimizer_step()
        optimizer.zero_grad()
    ranks.finish(finalize_model=False)  # slots stay: weights are in parts
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if process == 0:
        model.save_pretrained("loop_fsdp-adapter", state_dict=state)
        print("ranks:", {name.removeprefix("bert.encoder.layer."): rank for name, rank in ranks.final.items()})
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (f"{folder}/rendezvous",), nprocs=PROCESSES)
    loaded = PeftModel.from_pretrained(bert(), "loop_fsdp-adapter").eval()
    test = batch(-1)
    with torch.no_grad():
        right = loaded(**test).logits.argmax(1) == test["labels"]
    print("accuracy of the adapter in plain PEFT:", float(right.float().mean()))
