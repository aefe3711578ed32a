"""Images and recordings by the commands: LoRA, with a fitted head, and tsqlora; and wrong labels that the audit finds.

    python bench/media.py [image] [audio]

No pretrained model of either is at hand, so a small one is trained here on the digits 0 to 4, and every method adapts
it to 5 to 9: scikit-learn's digits as pictures, and ../shared/data/spoken_digits. Once with the labels as they are,
once with a fifth of the training labels wrong. Equal steps; one seed. Each kind is a file in bench/results/media.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from origin import ROOT, commit, machine, parser_of
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tsqlora.data.media import MediaCollator
from tsqlora.files import write_json
from tsqlora.run.audit import run_audit
from tsqlora.run.config import load_config
from tsqlora.run.train import train
from tsqlora.training.record import versions

SPOKEN = ROOT / ".." / "shared" / "data" / "spoken_digits"
RESULTS = ROOT / "bench" / "results" / "media"
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
PRETRAINING_EPOCHS = {"image": 40, "audio": 150}
SHIFTS = {"image": (2, 2), "audio": (12, 4)}
"""Most places that a picture, or a spectrogram in time and pitch, is shifted by, as augmentation of few rows."""
STEPS, RATE, BATCH, SEED, WRONG = 60, 2e-3, 16, 0, 0.2
METHODS = {
    "lora": {"enabled": False, "head_start": False, "fraction": 1.0},
    "lora+head": {"enabled": False, "fraction": 1.0},
    "tsqlora": {},
}


def write_files(kind: str, folder: Path) -> None:
    """FOLDER/{pretraining,digits}/{train,test}/DIGIT/FILE."""
    if kind == "image":
        digits = load_digits()
        for j, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            place = folder / _part(label) / ("test" if j % 3 == 0 else "train") / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15).astype(np.uint8)).save(place / f"{j:04d}.png")
        return
    for path in sorted(SPOKEN.glob("*/*/*.wav")):
        place = folder / _part(int(path.parent.name)) / path.parts[-3] / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)


def _part(label: int) -> str:
    return "pretraining" if label < 5 else "digits"


def pretrained(kind: str, data: Path, folder: Path) -> float:
    """Train a small model on the first five digits; save its body; return its accuracy on their test files."""
    torch.manual_seed(SEED)
    if kind == "image":
        model: Any = ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=5))
        processor: Any = ViTImageProcessor(size={"height": 16, "width": 16})
    else:
        bands = {"num_mel_bins": 64, "max_length": 96}
        model = ASTForAudioClassification(ASTConfig(**SIZES, **bands, patch_size=16, num_labels=5))
        processor = ASTFeatureExtractor(**bands)
    collate = MediaCollator(processor, kind)
    train, test = (_encoded(collate, data / split) for split in ("train", "test"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    name, count = next(iter(train)), len(train["labels"])
    steps = PRETRAINING_EPOCHS[kind] * (count // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(PRETRAINING_EPOCHS[kind]):
        for rows in torch.randperm(count)[: count // 32 * 32].split(32):
            x = train[name][rows]
            shift = tuple(int(torch.randint(-most, most + 1, ())) for most in SHIFTS[kind])
            x = torch.roll(x, shift, dims=(-2, -1))
            model.train()(**{name: x, "labels": train["labels"][rows]}).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    with torch.no_grad():
        right = model.eval()(**{name: test[name]}).logits.argmax(1) == test["labels"]
    model.base_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    AutoModel.from_pretrained(folder)
    return float(right.float().mean())


def _encoded(collate: MediaCollator, folder: Path) -> dict[str, torch.Tensor]:
    return collate([{"file": str(path), "labels": int(path.parent.name)} for path in sorted(folder.glob("*/*"))])


def mislabelled(data: Path, folder: Path) -> dict[str, str]:
    """A copy with a fifth of the training files in another class's folder; the true class of each of these."""
    shutil.copytree(data, folder)
    rng, true = np.random.default_rng(SEED), {}
    classes = sorted(path.name for path in (folder / "train").iterdir())
    files = sorted((folder / "train").glob("*/*"))
    for j in rng.permutation(len(files))[: round(WRONG * len(files))]:
        path = files[j]
        other = rng.choice([label for label in classes if label != path.parent.name])
        # Recordings of two digits may have one name: of 280 files 5 are lost here.
        moved = folder / "train" / str(other) / f"m{path.name}"
        path.rename(moved)
        true[str(moved)] = path.parent.name
    return true


def trained(method: str, model: Path, data: Path, run: Path) -> float:
    sections = {
        "model": {"path": str(model)},
        "data": {"train": str(data)},
        "quality": METHODS[method],
        "training": {
            "max_steps": STEPS,
            "learning_rate": RATE,
            "batch_size": BATCH,
            "seed": SEED,
            "bf16": False,
            "save_strategy": "no",
        },
    }
    return train(load_config(None, sections=sections), run).metrics["test"]["accuracy"]


def audited(model: Path, data: Path, true: dict[str, str], out: Path) -> dict[str, float]:
    """How the audit orders wrong labels, over all its rows."""
    import csv

    about = run_audit(str(data), model=str(model), out=out, review=10**6)
    with open(out / "suspects.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = np.array([row["text"] in true for row in rows])
    p = np.array([float(row["wrong_probability"]) for row in rows])
    named = [row["suggested_label"] == true[row["text"]] for row, is_wrong in zip(rows, wrong, strict=True) if is_wrong]
    flagged = p > 0.5
    return {
        "area": float(roc_auc_score(wrong, p)),
        "average_precision": float(average_precision_score(wrong, p)),
        "flagged": int(flagged.sum()),
        "precision": float(wrong[flagged].mean()) if flagged.any() else 0.0,
        "recall": float(flagged[wrong].mean()),
        "suggestion_right": float(np.mean(named)),
        "rate": about["rate"],
        "rows": len(rows),
    }


def measure(kind: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_files(kind, place)
        before = pretrained(kind, place / "pretraining", place / "model")
        true = mislabelled(place / "digits", place / "wrong")
        accuracy = {
            labels: {
                method: trained(method, place / "model", place / folder, place / f"{labels}-{method}")
                for method in METHODS
            }
            for labels, folder in (("clean", "digits"), ("wrong20", "wrong"))
        }
        audit = audited(place / "model", place / "wrong", true, place / "audit")
        rows = {split: len(list((place / "digits" / split).glob("*/*"))) for split in ("train", "test")}
    settings = {"steps": STEPS, "rate": RATE, "batch": BATCH, "seed": SEED, "wrong": WRONG, "model": SIZES}
    return {
        "settings": settings | {"pretraining_epochs": PRETRAINING_EPOCHS[kind]},
        "rows": rows,
        "pretraining_accuracy": before,
        "accuracy": accuracy,
        "audit": audit,
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("kinds", nargs="*", default=["image", "audio"])
    for kind in parser.parse_args().kinds:
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(RESULTS / f"{kind}.json", result := measure(kind))
        print(kind, result["pretraining_accuracy"], result["accuracy"], result["audit"])
