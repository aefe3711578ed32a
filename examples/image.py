"""A vision transformer on made-up images: the better half of the rows, and ranks that follow the loss."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import tsqlora as tsq
from tsqlora import paper


def images(n: int, seed: int, wrong: float = 0.0) -> list[dict[str, Tensor]]:
    """Noise with more red (class 0) or more blue (class 1) in it; a share of the labels is wrong."""
    random = torch.Generator().manual_seed(seed)
    pixels, label = torch.randn(n, 3, 16, 16, generator=random), torch.arange(n) % 2
    pixels[torch.arange(n), 2 * label] += 0.5
    label = torch.where(torch.rand(n, generator=random) < wrong, 1 - label, label)
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, label, strict=True)]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=2))


if __name__ == "__main__":
    model = tsq.wrap(vit(), mean_rank=4)  # LoRA in every linear layer; the new head trains whole
    data = tsq.QualitySubset(images(400, seed=0, wrong=0.2), fraction=0.5)
    ranks = paper.RankCallback(interval=10)
    quality = tsq.QualityCallback(data)
    arguments = TrainingArguments(
        "image-run",
        num_train_epochs=8,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data, data_collator=collate, callbacks=[quality, ranks]).train()
    model.save_pretrained("image-adapter")

    print("ranks:", {name.removeprefix("vit.layers."): rank for name, rank in ranks.final.items()})
    loaded = PeftModel.from_pretrained(vit(), "image-adapter")
    test = collate(images(256, seed=1))
    with torch.no_grad():
        logits = loaded.eval()(pixel_values=test["pixel_values"]).logits
    print("accuracy of the adapter in plain PEFT:", float((logits.argmax(1) == test["labels"]).float().mean()))
