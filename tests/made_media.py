"""Small images and recordings in folders of classes, and checkpoints of models that read them, without a head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTImageProcessor, ViTModel, Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

pytest.importorskip("PIL", reason="needs tsqlora[images]")
pytest.importorskip("soundfile", reason="needs tsqlora[audio]")

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
RATE = 8000


def write_images(folder: Path, n: int, seed: int = 0) -> Path:
    """Noise with more red or more blue in it: red/0001.png, blue/0002.png …"""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for j in range(n):
        pixels = rng.normal(100, 30, (8, 8, 3))
        pixels[..., 2 * (j % 2)] += 60
        place = folder / ("red", "blue")[j % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{j:04d}.png")
    return folder


def write_recordings(folder: Path, n: int, seed: int = 0) -> Path:
    """A low tone or a high one, for 0.1 to 0.2 seconds: low/0001.wav, high/0002.wav …"""
    import soundfile

    rng = np.random.default_rng(seed)
    for j in range(n):
        t = np.arange(rng.integers(RATE // 10, RATE // 5)) / RATE
        wave = 0.3 * np.sin(2 * np.pi * (300, 1500)[j % 2] * t + rng.uniform(0, 6)) + rng.normal(0, 0.02, len(t))
        place = folder / ("low", "high")[j % 2]
        place.mkdir(parents=True, exist_ok=True)
        soundfile.write(place / f"{j:04d}.wav", wave, RATE)
    return folder


def save_vit(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(**SIZES, hidden_size=16, intermediate_size=32, image_size=8, patch_size=4)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def wav2vec2_config(**options: Any) -> Wav2Vec2Config:
    """With layer norm and a mask of attention, so that logits do not depend on the padding."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "classifier_proj_size": 8, "vocab_size": 10}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (40, 8), "conv_stride": (20, 4), "conv_bias": True}
    convolutions |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    further = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "mask_time_prob": 0.0}
    return Wav2Vec2Config(**SIZES, **options, **sizes, **convolutions, **further)


def save_wav2vec2(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Wav2Vec2Model(wav2vec2_config()).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=2 * RATE, return_attention_mask=True).save_pretrained(folder)
    return folder


MAKE: dict[str, tuple[Callable[..., Path], Callable[[Path], Path]]] = {
    "image": (write_images, save_vit),
    "audio": (write_recordings, save_wav2vec2),
}
"""Of each kind the files and the checkpoint."""
