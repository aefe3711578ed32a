"""Files of images and recordings: found, decoded, hashed by content, and read in batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoFeatureExtractor,
    ViTImageProcessor,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from made_media import RATE, save_wav2vec2, wav2vec2_config, write_images, write_recordings
from tsqlora.auditing.draw.subset import equals
from tsqlora.errors import DataError, SettingsError
from tsqlora.rows.media import MediaCollator, encode_files, read_audio, read_image, require_reader, why_unread
from tsqlora.rows.rows import Columns, content_hash
from tsqlora.rows.sources import kind_of, open_table, open_tables
from tsqlora.rows.write import write_rows

IMAGES = Columns("image", None, "label", "image")


def test_a_folder_has_a_row_for_each_file_with_its_folder_as_label(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 4)
    (tmp_path / "a" / "red" / ".hidden.png").write_bytes(b"")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "0004.png").write_bytes((tmp_path / "a" / "red" / "0000.png").read_bytes())
    with pytest.warns(UserWarning, match=r"notes\.txt"):
        rows = list(open_table(tmp_path / "a"))
    assert [row.number for row in rows] == [
        "0004.png",
        "blue/0001.png",
        "blue/0003.png",
        "red/0000.png",
        "red/0002.png",
    ]
    assert [row.cells["label"] for row in rows] == [None, "blue", "blue", "red", "red"]
    assert rows[1].place == f"{tmp_path}/a:blue/0001.png"
    assert kind_of(tmp_path) == "image"


def test_folders_of_classes_may_be_links_and_each_folder_counts_once(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 4)
    (tmp_path / "links").mkdir()
    for name in ("red", "blue"):
        (tmp_path / "links" / name).symlink_to(tmp_path / "a" / name)
    (tmp_path / "links" / "rot").symlink_to(tmp_path / "a" / "red")
    (tmp_path / "links" / "loop").symlink_to(tmp_path / "links")
    (tmp_path / "a" / "red" / "other").symlink_to(tmp_path / "links")
    rows = open_table(tmp_path / "links")
    assert [row.cells["label"] for row in rows] == ["blue", "blue", "red", "red"]


def test_folders_of_splits_and_a_metadata_table_are_those_of_datasets(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("dev", 4), ("test", 2)):
        write_recordings(tmp_path / split, count)
    sources = open_tables(str(tmp_path), None, None)
    assert {name: len(source) for name, source in sources.items()} == {"train": 6, "validation": 4, "test": 2}
    write_images(tmp_path / "other", 2)
    write_rows(tmp_path / "other" / "metadata.csv", [{"file_name": "red/0000.png", "label": "pink"}])
    table = open_table(tmp_path / "other").using(Columns("file_name", None, None, "image"))
    assert tuple(row.cells for row in table) == ({"file_name": f"{tmp_path}/other/red/0000.png", "label": "pink"},)


def test_paths_count_from_the_table_and_a_folder_takes_the_names_of_columns(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 2)
    write_rows(tmp_path / "t.csv", [{"f": "a/red/0000.png", "y": "red"}, {"f": "", "y": "red"}])
    columns = Columns("f", None, "y", "image")
    table, folder = ([row.cells for row in open_table(tmp_path / name).using(columns)] for name in ("t.csv", "a"))
    assert (table[0], table[1]["f"]) == (folder[1], "")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "1"])
def test_an_image_of_any_mode_becomes_rgb_or_gray(mode: str, tmp_path: Path) -> None:
    from PIL import Image

    shades = np.array([[0, 255], [128, 255]], dtype=np.uint8)
    wide = Image.fromarray(shades.astype(np.uint16) * 257)
    (wide if mode == "I;16" else Image.fromarray(shades).convert(mode)).save(tmp_path / "a.png")
    image = np.asarray(read_image(str(tmp_path / "a.png")))
    assert image.shape == (2, 2, 3)
    assert (image[0, 0].tolist(), image[0, 1].tolist()) == ([0] * 3, [255] * 3)
    assert np.asarray(read_image(str(tmp_path / "a.png"), gray=True)).shape == (2, 2)


def test_channels_are_averaged_and_a_recording_has_the_rate_that_is_wanted(tmp_path: Path) -> None:
    import soundfile

    tone = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, 0 * tone], axis=1), RATE, subtype="FLOAT")
    wave = read_audio(str(tmp_path / "a.wav"), 16000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) / 2
    np.testing.assert_allclose(wave[500:-500], expected[500:-500], atol=1e-3)


@pytest.mark.parametrize(("name", "media"), [("a.png", "image"), ("a.wav", "audio")])
def test_a_broken_or_missing_file_says_why(name: str, media: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert why_unread(str(path), media) == "no such file"
    (write_images if media == "image" else write_recordings)(tmp_path / "b", 1)
    whole = next((tmp_path / "b").glob("*/*")).read_bytes()
    path.write_bytes(whole)
    assert why_unread(str(path), media) is None
    path.write_bytes(whole[:40])
    assert why_unread(str(path), media) == f"broken {media}"
    with pytest.raises(DataError, match=name):
        (read_image if media == "image" else read_audio)(str(path))


def test_a_copy_of_a_file_is_the_same_row_and_a_changed_file_is_another(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 4)
    (tmp_path / "b" / "red").mkdir(parents=True)
    copy = tmp_path / "b" / "red" / "c.png"
    copy.write_bytes((tmp_path / "a" / "red" / "0002.png").read_bytes())
    pool, other = (
        encode_files(list(open_table(tmp_path / name)), IMAGES, None, max_length=0, labels=None) for name in "ab"
    )
    twins = equals(pool, other)
    assert twins is not None
    assert twins.tolist() == [False, False, False, True]
    assert other.hashes[0] == pool.hashes[3]
    before = content_hash(str(copy))
    copy.write_bytes(b"changed")
    assert content_hash(str(copy)) != before
    assert content_hash(str(tmp_path / "none")) == ""


def test_logits_of_a_recording_do_not_depend_on_its_batch(tmp_path: Path) -> None:
    extractor = AutoFeatureExtractor.from_pretrained(save_wav2vec2(tmp_path / "model"))
    rows = list(open_table(write_recordings(tmp_path / "a", 6)))
    samples = encode_files(rows, Columns("audio", None, "label", "audio"), None, max_length=0, labels=[0] * 6)
    assert all(5 <= sample["length"] <= 10 for sample in samples)
    torch.manual_seed(0)
    model = Wav2Vec2ForSequenceClassification(wav2vec2_config(num_labels=3)).eval()

    def logits(samples: list[dict[str, object]], **how: int) -> torch.Tensor:
        inputs = MediaCollator(extractor, "audio", **how)(samples)
        assert inputs.pop("labels").tolist() == [0] * len(samples)
        return model(**inputs).logits

    together = logits(list(samples))
    alone = torch.cat([logits([sample]) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_without_a_mask_max_length_pads_every_batch_alike_and_cuts(tmp_path: Path) -> None:
    import soundfile

    for name, values in (("short", 10), ("long", 3200)):
        soundfile.write(tmp_path / f"{name}.wav", np.full(values, 0.5), RATE)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=False, do_normalize=False)
    rows = list(open_table(tmp_path))
    split = encode_files(rows, Columns("audio", None, "label", "audio"), None, max_length=10, labels=None)
    assert (split.truncated, split.lengths) == (1, [10, 1])
    for collate, width in ((MediaCollator(extractor, "audio", 10), 1600), (MediaCollator(extractor, "audio"), 800)):
        assert collate([split[1]])["input_values"].shape == (1, width)
    assert MediaCollator(extractor, "audio", 10)(list(split))["input_values"].shape == (2, 1600)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqlora.rows.media.find_spec", lambda name: None)
    for media, extra in (("image", "images"), ("audio", "audio")):
        with pytest.raises(SettingsError, match=rf"tsqlora\[{extra}\]"):
            require_reader.__wrapped__(media)


def test_a_model_of_one_channel_gets_gray_images(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    samples = encode_files(list(open_table(tmp_path)), IMAGES, None, max_length=0, labels=[0, 1])
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    assert MediaCollator(processor, "image", gray=True)(samples)["pixel_values"].shape == (2, 1, 8, 8)
