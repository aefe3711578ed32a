"""Images and recordings: check the files of rows, and decode them batch by batch for a model's processor."""

import inspect
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsqlora.errors import DataError, SettingsError
from tsqlora.files import reading
from tsqlora.libs.shapes import Float
from tsqlora.rows.rows import Columns, Row, content_hash, text_at
from tsqlora.rows.table import Samples, of_rows

TOKENS_A_SECOND = 50
"""Lengths of recordings are in steps of 20 ms, as speech models read them."""
SHORTEST = 0.1
"""Seconds; silence follows shorter recordings, which the first layers of a speech model cannot read."""
_READERS = {"image": ("PIL", "pillow", "tsqlora[images]"), "audio": ("soundfile", "soundfile", "tsqlora[audio]")}


@cache
def require_reader(media: str) -> None:
    """Raises SettingsError where the package that reads these files is not installed."""
    module, package, extra = _READERS[media]
    if find_spec(module) is None:
        raise SettingsError(f"{media}-classification needs {package}; pip install '{extra}'")


def why_unread(path: str, media: str) -> str | None:
    """Say why a file cannot be used; None if it decodes whole."""
    if not os.path.isfile(path):
        return "no such file"
    reading(path)
    try:
        _ = read_image(path) if media == "image" else read_audio(path)
    except DataError:
        return f"broken {media}"
    return None


def read_image(path: str, *, gray: bool = False) -> Any:
    """An RGB image, or a gray one, turned as its camera was held.  Raises DataError for a file that is no image."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore")  # of large images, and of palettes with transparency
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # pillow would clip its 16 bits to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("L" if gray else "RGB")
    except Exception as error:  # pillow's readers raise whatever a broken file makes them
        raise DataError(f"{path} cannot be read as an image ({error}); replace it or remove its row") from error


def read_audio(path: str, rate: int | None = None) -> Float[np.ndarray, " t"]:
    """The mean of the channels, at `rate` values a second or the file's own.  Raises DataError for a broken file."""
    import soundfile
    from scipy.signal import resample_poly

    try:
        channels, own = soundfile.read(path, dtype="float32", always_2d=True)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read as audio ({error}); replace it or remove its row") from error
    wave = channels.mean(axis=1)
    if not len(wave) or not np.isfinite(wave).all():
        raise DataError(f"{path} holds no sound, or values that are not finite; replace it or remove its row")
    if rate is None or rate == own:
        return wave
    factor = math.gcd(rate, own)
    return resample_poly(wave, rate // factor, own // factor).astype(np.float32)


def as_paths(dataset: Any, media: str, folder: str) -> Any:
    """A `datasets.Dataset` with a column `media` of paths in place of its first column of images or recordings.

    What has no file is written to `folder`. Without such a column, as where there are paths already, nothing changes.
    """
    kinds = {name: type(feature) for name, feature in dataset.features.items()}
    column = next((name for name, kind in kinds.items() if kind.__name__.lower() == media), None)
    if column is None:
        return dataset
    paths = list[str]()
    for j, row in enumerate(dataset.select_columns([column]).cast_column(column, kinds[column](decode=False))):
        path, content = row[column]["path"] or "", row[column]["bytes"]
        if content is not None:
            path = os.path.join(folder, f"{j}{os.path.splitext(path)[1]}")
            with open(path, "wb") as file:
                file.write(content)
        paths.append(os.path.abspath(path))
    return dataset.remove_columns([*{column, media} & {*kinds}]).add_column(media, paths)


def thumbnail(path: str) -> bytes:
    """A small PNG of an image; empty if it cannot be read."""
    from io import BytesIO

    try:
        image = read_image(path)
    except DataError:
        return b""
    image.thumbnail((96, 96))
    image.save(written := BytesIO(), "PNG")
    return written.getvalue()


def encode_files(
    rows: Sequence[Row], columns: Columns, _: Any, *, max_length: int, labels: Sequence[Any] | None
) -> Samples:
    """One sample a row: the file, its content's hash, and its length; `MediaCollator` decodes it.

    Recordings are cut to `max_length` steps of 20 ms, unless it is 0; images have length 0.
    """
    samples, truncated = list[dict[str, Any]](), 0
    for i, row in enumerate(rows):
        path = text_at(row, columns.text)
        length = 0
        if columns.media == "audio":
            import soundfile

            about = soundfile.info(path)
            length = math.ceil(about.frames / about.samplerate * TOKENS_A_SECOND)
        truncated += length > max_length > 0
        sample = {"file": path, "content": content_hash(path), "length": min(length, max_length or length)}
        samples.append(sample if labels is None else {**sample, "labels": labels[i]})
    return of_rows(samples, rows, columns, truncated=truncated)


@dataclass(frozen=True, slots=True)
class MediaCollator:
    """Decode the files of a batch with a model's own processor.

    Args:
        gray: the model reads one channel.
        max_length: most steps of a recording; 0 reads it whole. With it, recordings of models that have no attention
            mask are all padded to it, so that logits do not depend on the batch.
    """

    processor: Any
    media: str
    max_length: int = 0
    gray: bool = False

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        files = [sample["file"] for sample in samples]
        if self.media == "image":
            inputs = self.processor([read_image(file, gray=self.gray) for file in files], return_tensors="pt")
        else:
            rate = int(self.processor.sampling_rate)
            most, least = self.max_length * rate // TOKENS_A_SECOND, int(SHORTEST * rate)
            waves = [read_audio(file, rate)[: most or None] for file in files]
            waves = [np.pad(wave, (0, max(least - len(wave), 0))) for wave in waves]
            how: dict[str, Any] = {}
            # Processors with a fixed length, as Whisper's, pad by themselves.
            padding = inspect.signature(self.processor.__call__).parameters.get("padding")
            if padding is not None and padding.default is False:
                masked = self.processor.return_attention_mask or not most
                how = {"padding": True} if masked else {"padding": "max_length", "max_length": max(most, least)}
            inputs = self.processor(waves, sampling_rate=rate, return_tensors="pt", **how)
        batch = {name: values for name, values in inputs.items() if isinstance(values, Tensor)}
        if "labels" in samples[0]:
            batch["labels"] = torch.tensor([sample["labels"] for sample in samples])
        return batch
