"""Several labels a row in the stock Trainer: the better half of the rows, and ranks that follow the loss."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import tsqlora as tsq
from tsqlora import paper


def rows(n: int, seed: int, wrong: float = 0.0) -> list[dict[str, Tensor]]:
    """Six tokens; each of three labels is 1 where one of its own four tokens occurs. A share of the labels is wrong."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.rand(n, 3, generator=random) < 0.5
    tokens = torch.randint(1, 5, (n, 6), generator=random)
    tokens[:, :3] += 4 * labels * torch.arange(1, 4)
    flipped = torch.rand(n, 3, generator=random) < wrong
    return [{"input_ids": x, "labels": y.float()} for x, y in zip(tokens, labels ^ flipped, strict=True)]


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    # By its problem_type the model, and tsqlora, use a binary cross-entropy for each label.
    kind = {"num_labels": 3, "problem_type": "multi_label_classification"}
    return BertForSequenceClassification(BertConfig(**sizes, **kind, vocab_size=20))


if __name__ == "__main__":
    model = tsq.wrap(bert(), mean_rank=4)  # LoRA in every linear layer; the new head trains whole
    data = tsq.QualitySubset(rows(1200, seed=0, wrong=0.1), fraction=0.5)
    quality = tsq.QualityCallback(data)
    ranks = paper.RankCallback(interval=10)
    arguments = TrainingArguments(
        "multi_label-run",
        num_train_epochs=12,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[quality, ranks]).train()
    model.save_pretrained("multi_label-adapter")

    print("ranks:", {name.removeprefix("bert.encoder.layer."): rank for name, rank in ranks.final.items()})
    loaded = PeftModel.from_pretrained(bert(), "multi_label-adapter").eval()
    test = rows(256, seed=1)
    with torch.no_grad():
        logits = loaded(input_ids=torch.stack([row["input_ids"] for row in test])).logits
    right = (logits > 0) == torch.stack([row["labels"] for row in test]).bool()
    print("accuracy of the adapter in plain PEFT:", float(right.float().mean()))
