"""A Wav2Vec2 on made-up tones: the better half of the rows, and ranks that follow the loss."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainingArguments, Wav2Vec2Config, Wav2Vec2ForSequenceClassification

import tsqlora as tsq
from tsqlora import paper


def tones(n: int, seed: int, wrong: float = 0.0) -> list[dict[str, Tensor]]:
    """A low tone (class 0) or a high one (class 1) in noise; a share of the labels is wrong."""
    random = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 2
    pitch = torch.where(label == 0, 0.1, 0.5)[:, None]
    waves = torch.sin(pitch * torch.arange(800) + 6 * torch.rand(n, 1, generator=random))
    waves += 0.3 * torch.randn(n, 800, generator=random)
    label = torch.where(torch.rand(n, generator=random) < wrong, 1 - label, label)
    return [{"input_values": x, "labels": y} for x, y in zip(waves, label, strict=True)]


def wav2vec2() -> Wav2Vec2ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    front = {"conv_dim": (16, 16), "conv_kernel": (40, 8), "conv_stride": (20, 4), "num_conv_pos_embeddings": 8}
    rest = {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16, "mask_time_prob": 0.0, "num_labels": 2}
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**sizes, **front, **rest))


if __name__ == "__main__":
    model = tsq.wrap(wav2vec2(), mean_rank=4)  # LoRA in every linear layer; the new head trains whole
    data = tsq.QualitySubset(tones(400, seed=0, wrong=0.2), fraction=0.5)
    quality = tsq.QualityCallback(data)
    ranks = paper.RankCallback(interval=10)
    arguments = TrainingArguments(
        "audio-run",
        num_train_epochs=6,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[quality, ranks]).train()
    model.save_pretrained("audio-adapter")

    print("ranks:", {name.removeprefix("wav2vec2.encoder.layers."): rank for name, rank in ranks.final.items()})
    loaded = PeftModel.from_pretrained(wav2vec2(), "audio-adapter").eval()
    test = tones(256, seed=1)
    with torch.no_grad():
        logits = loaded(input_values=torch.stack([row["input_values"] for row in test])).logits
    right = logits.argmax(1) == torch.stack([row["labels"] for row in test])
    print("accuracy of the adapter in plain PEFT:", float(right.float().mean()))
