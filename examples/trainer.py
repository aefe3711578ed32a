"""The stock Trainer on made-up rows: the better half of them, and ranks that follow the loss."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import tsqlora as tsq
from tsqlora import paper


def rows(n: int, seed: int, wrong: float = 0.0) -> list[dict[str, Tensor]]:
    """Eight tokens, low ones (class 0) or high ones (class 1); a share of the labels is wrong."""
    random = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 2
    tokens = torch.randint(1, 30, (n, 8), generator=random) + 29 * label[:, None]
    label = torch.where(torch.rand(n, generator=random) < wrong, 1 - label, label)
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, label, strict=True)]


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=60, num_labels=2))


if __name__ == "__main__":
    model = tsq.wrap(bert(), mean_rank=4)  # LoRA in every linear layer; the new head trains whole
    data = tsq.QualitySubset(rows(400, seed=0, wrong=0.2), fraction=0.5)
    quality = tsq.QualityCallback(data)
    ranks = paper.RankCallback(interval=10)
    arguments = TrainingArguments(
        "trainer-run",
        num_train_epochs=8,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[quality, ranks]).train()
    model.save_pretrained("trainer-adapter")

    print("ranks:", {name.removeprefix("bert.encoder.layer."): rank for name, rank in ranks.final.items()})
    loaded = PeftModel.from_pretrained(bert(), "trainer-adapter").eval()
    test = rows(256, seed=1)
    with torch.no_grad():
        logits = loaded(input_ids=torch.stack([row["input_ids"] for row in test])).logits
    right = logits.argmax(1) == torch.stack([row["labels"] for row in test])
    print("accuracy of the adapter in plain PEFT:", float(right.float().mean()))
