"""A tag for each token in the stock Trainer: half of the rows, and ranks that follow the loss."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainingArguments

import tsqlora as tsq
from tsqlora import paper

NAMES = {0: "O", 1: "B-person", 2: "B-place"}


def rows(n: int, seed: int) -> list[dict[str, Tensor]]:
    """Eight tokens: of twenty, the first ten are O, then five persons and five places; the first has no tag (-100)."""
    tokens = torch.randint(1, 21, (n, 8), generator=torch.Generator().manual_seed(seed))
    tags = (tokens > 10).long() + (tokens > 15)
    tags[:, 0] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, tags, strict=True)]


def bert() -> BertForTokenClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForTokenClassification(BertConfig(**sizes, vocab_size=21, id2label=NAMES, label2id={}))


if __name__ == "__main__":
    model = tsq.wrap(bert(), mean_rank=4)  # LoRA in every linear layer; the new head trains whole
    data = tsq.QualitySubset(rows(400, seed=0), fraction=0.5)
    quality = tsq.QualityCallback(data)
    ranks = paper.RankCallback(interval=10)
    arguments = TrainingArguments(
        "tokens-run",
        num_train_epochs=8,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[quality, ranks]).train()
    model.save_pretrained("tokens-adapter")

    print("ranks:", {name.removeprefix("bert.encoder.layer."): rank for name, rank in ranks.final.items()})
    loaded = PeftModel.from_pretrained(bert(), "tokens-adapter").eval()
    test = rows(256, seed=1)
    with torch.no_grad():
        predicted = loaded(input_ids=torch.stack([row["input_ids"] for row in test])).logits.argmax(2)
    tags = torch.stack([row["labels"] for row in test])
    print("accuracy of the adapter in plain PEFT:", float((predicted == tags)[tags != -100].float().mean()))
