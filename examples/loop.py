"""A training loop of one's own: accumulation, clipping, half precision, a schedule, and ranks that follow the loss."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from tsqlora import paper

STEPS, ACCUMULATE = 100, 2


def batch(step: int) -> dict[str, Tensor]:
    """Sixteen rows of eight tokens, more of them low (class 0) or high (class 1)."""
    label = torch.arange(16) % 2
    tokens = torch.randint(1, 40, (16, 8), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens + 20 * label[:, None], "labels": label}


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=60, num_labels=2))


if __name__ == "__main__":
    model = paper.wrap(bert(), mean_rank=4).train()  # first the slots, then the optimizer
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    ranks = paper.RankLoop(model, optimizer, total_steps=STEPS, interval=10)
    for step in range(STEPS):
        ranks.before_forward()
        for part in range(ACCUMULATE):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch(ACCUMULATE * step + part)).loss / ACCUMULATE
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ranks.before_optimizer_step()
        optimizer.step()
        ranks.after_optimizer_step()
        schedule.step()
        optimizer.zero_grad()
    model = ranks.finish()
    model.save_pretrained("loop-adapter")

    print("ranks:", {name.removeprefix("bert.encoder.layer."): rank for name, rank in ranks.final.items()})
    loaded = PeftModel.from_pretrained(bert(), "loop-adapter").eval()
    test = batch(-1)
    with torch.no_grad():
        right = loaded(**test).logits.argmax(1) == test["labels"]
    print("accuracy of the adapter in plain PEFT:", float(right.float().mean()))
