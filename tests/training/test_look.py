"""`tsqlora look`, and `train --look` with what it wrote."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from string import ascii_letters
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, modeling_utils

from families import FAMILIES, tokenizer_of
from runs import make_rows, run_cli, set_up, write_jsonl
from texts.test_before import Repeats
from tsqlora.auditing.draw.select import select_rows
from tsqlora.auditing.saved_look import SavedLook
from tsqlora.auditing.scores import Scores
from tsqlora.errors import SettingsError
from tsqlora.record import RunRecord
from tsqlora.settings import load_config
from tsqlora.training import command as pipeline
from tsqlora.training import look as run_look
from tsqlora.training.look import look_at, score_by_look
from words import llama

TRAINING: dict[str, Any] = {"batch_size": 8, "epochs": 2, "bf16": False, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("look")
    return set_up(folder, training=TRAINING)


@pytest.fixture(scope="module")
def look(place: Path) -> Path:
    look_at(load_config(place / "c.yaml"), place / "LOOK")
    return place / "LOOK"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_training_with_a_look_is_training_that_looks(
    place: Path, look: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.train(load_config(place / "c.yaml"), tmp_path / "inline")
    code, out, err = run_cli(capsys, "train", place / "c.yaml", "--look", look, "--out", tmp_path / "run", "--json")
    assert code == 0, err
    assert any(str(look) in note for note in json.loads(out)["notes"])
    one, other = weights(tmp_path / "inline"), weights(tmp_path / "run")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert RunRecord.load(tmp_path / "run").plan["look"] == str(look)


def test_a_model_in_4_bits_takes_the_look_for_the_whole_one(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    saved = look_at(load_config(place / "c.yaml", ["model.quantization=4bit"]), tmp_path / "LOOK")
    assert saved.about["bits"] == 4
    pipeline.train(load_config(place / "c.yaml"), tmp_path / "run", look=tmp_path / "LOOK")
    notes = RunRecord.load(tmp_path / "run").notes
    assert any("in 4 bits" in note for note in notes)


def test_a_model_that_one_gpu_does_not_hold_is_spread_over_all(
    place: Path, look: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = list[dict[str, Any]]()

    def on_cpu(*args: Any) -> dict[str, Any]:
        maps.append(chosen(*args))
        return dict.fromkeys(maps[-1], "cpu") | {"classifier": "cpu:0"}  # two names of one device

    def hooked(model: Any, quantizer: Any, devices: dict[str, Any], *args: Any) -> None:
        dispatch_model(model, dict.fromkeys(devices, "cpu"), force_hooks=True)
        model.hf_device_map = devices

    chosen = modeling_utils._get_device_map
    monkeypatch.setattr(modeling_utils, "_get_device_map", on_cpu)
    monkeypatch.setattr(modeling_utils, "accelerate_dispatch", hooked)
    monkeypatch.setattr(run_look, "gpus_of", lambda config: [30_000, 200_000])
    saved = look_at(load_config(place / "c.yaml"), tmp_path / "LOOK")
    assert {*maps[0].values()} == {0, 1}
    assert saved.about["spread"] == 2
    one = SavedLook.load(look)
    np.testing.assert_array_equal(saved.scores.quality, one.scores.quality)
    assert all(torch.equal(value, saved.head[name]) for name, value in one.head.items())
    score_by_look(str(place / "train.jsonl"), saved.path, tmp_path / "scores.parquet")
    assert len(maps) == 2
    pipeline.train(load_config(place / "c.yaml"), tmp_path / "run", look=saved.path)
    assert any("on 2 devices" in note for note in RunRecord.load(tmp_path / "run").notes)


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
def test_a_launcher_that_shards_ends_before_it_begins(
    engine: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    with pytest.raises(SettingsError, match=rf"^{engine} .*tsqlora look .*--look LOOK"):
        pipeline.train(load_config(place / "c.yaml"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_of_a_look_says_what_to_type_next_and_one_that_is_gone_is_refused(
    place: Path, look: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("look", place / "train.jsonl", "--model", place / "model", "--out", tmp_path / "OTHER")
    code, _, err = run_cli(capsys, *arguments)
    assert (code, "--look" in err) == (0, True)
    other = SavedLook.load(tmp_path / "OTHER")
    assert sorted(other.head) == ["classifier.bias", "classifier.weight"]
    assert other.about["rows"] == SavedLook.load(look).about["rows"]
    code, _, err = run_cli(capsys, "train", place / "c.yaml", "--look", tmp_path / "none", "--out", tmp_path / "run")
    assert code == 3
    assert "tsqlora look" in err
    assert not (tmp_path / "run").exists()


def test_a_look_at_other_rows_is_refused(place: Path, look: Path, tmp_path: Path) -> None:
    config = load_config(place / "c.yaml", ["training.seed=3"])  # holds out other rows
    with pytest.raises(Exception, match="rows differ"):
        pipeline.train(config, tmp_path / "run", look=look)


def test_a_look_scores_the_rows_of_another_file(look: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_rows(60, seed=3)
    rows[5]["label"] = 1 - rows[5]["label"]
    for name, some in (("a", rows[:30]), ("b", rows[30:])):
        part = write_jsonl(tmp_path / f"{name}.jsonl", some)
        code, out, err = run_cli(
            capsys, "score", part, "--look", look, "--out", tmp_path / "parts" / f"{name}.parquet", "--json"
        )
        assert code == 0, err
        assert "leaks" in json.loads(out)["missing"]
    scores = Scores.load(tmp_path / "parts" / "a.parquet")
    assert len(scores) == 30
    wrong = scores.predictions["label_probability"]
    assert 5 in np.argsort(wrong)[:2]
    whole = write_jsonl(tmp_path / "whole.jsonl", rows)
    together = score_by_look(str(whole), look, tmp_path / "whole.parquet")
    np.testing.assert_allclose(together.predictions["label_probability"][:30], wrong, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("some", [[4], [*range(20)]])
def test_a_row_of_an_unseen_class_is_null_with_a_reason_and_never_drawn(
    some: list[int], look: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, label = make_rows(20, seed=3), max(row["label"] for row in make_rows(20, seed=3)) + 1
    part = write_jsonl(
        tmp_path / "a.jsonl", [row | {"label": label} if j in some else row for j, row in enumerate(rows)]
    )
    score_by_look(str(part), look, tmp_path / "parts" / "a.parquet")
    scores = Scores.load(tmp_path / "parts" / "a.parquet")
    assert np.flatnonzero(scores.left_out_as("unseen class")).tolist() == some
    assert (scores.probability[some] == 0).all()
    table = pq.read_table(tmp_path / "parts" / "a.parquet")
    for name in ("loss", "label_probability"):
        assert table[name].is_null().to_pylist() == [j in some for j in range(20)]
    code, out, err = run_cli(capsys, "explain", tmp_path / "parts" / "a.parquet", "--row", "4", "--json")
    assert code == 0, err
    assert json.loads(out)["reason"] == "unseen class"
    assert json.loads(out)["label"] is None
    assert run_cli(capsys, "explain", tmp_path / "parts" / "a.parquet", "--row", "4")[0] == 0
    other = write_jsonl(tmp_path / "b.jsonl", make_rows(20, seed=4))
    score_by_look(str(other), look, tmp_path / "parts" / "b.parquet")
    select_rows(tmp_path / "parts", tmp_path / "subset.jsonl", fraction=0.5, data=tmp_path)
    drawn = [json.loads(line) for line in (tmp_path / "subset.jsonl").read_text().splitlines()]
    assert label not in [row["label"] for row in drawn]


def chats(file: Path, moved: range, *, seed: int, count: int = 240) -> Path:
    """Answers that repeat the letters of their prompts; those of `moved` repeat the next row's."""
    rng = np.random.default_rng(seed)
    words = [rng.permutation([*ascii_letters])[:8] for _ in range(count + 1)]
    rows = [(" ".join(words[j]), " ".join(rng.permutation(words[j + (j in moved)]))) for j in range(count)]
    write_jsonl(
        file, [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in rows]
    )
    return file


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A look at chats of which a tenth has the answers of the rows after them."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer, config = tokenizer_of(FAMILIES["qwen 2.5"]), llama().config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 200
    Repeats(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    chats(folder / "train.jsonl", range(10, 34), seed=0)
    settings = {"model.path": folder / "model", "data.train": folder / "train.jsonl", "task.type": "causal-lm"}
    with repeating():
        look_at(load_config(None, [f"{key}={value}" for key, value in settings.items()]), folder / "LOOK")
    return folder / "LOOK"


@contextmanager
def repeating() -> Iterator[None]:
    """Load the model as Repeats."""
    info: dict[str, Any] = {"missing_keys": [], "mismatched_keys": []}

    def load(path: str, **_: Any) -> Any:
        return Repeats.from_pretrained(path), info

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", load)
        yield


def test_a_look_scores_the_answers_of_another_file(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved, part = range(0, 30, 2), chats(tmp_path / "a.jsonl", range(0, 30, 2), seed=7, count=60)
    with repeating():
        code, out, err = run_cli(
            capsys, "score", part, "--look", written, "--out", tmp_path / "parts" / "a.parquet", "--json"
        )
    assert code == 0, err
    scores = Scores.load(tmp_path / "parts" / "a.parquet")
    wrong = {*np.flatnonzero(scores.left_out_as("foreign answer")).tolist()}
    assert wrong <= {*moved}
    assert len(wrong) >= 0.7 * len(moved)
    assert json.loads(out)["dropped"]["foreign answer"] == len(wrong)
    assert (scores.predictions["wrong_probability"][[*wrong]] > 0.5).all()
    select_rows(tmp_path / "parts", tmp_path / "subset.jsonl", fraction=0.5, data=tmp_path)
    drawn, rows = ((tmp_path / name).read_text().splitlines() for name in ("subset.jsonl", "a.jsonl"))
    assert len(drawn) == 30
    assert not {json.dumps(json.loads(rows[j])) for j in wrong} & {json.dumps(json.loads(row)) for row in drawn}


def test_a_look_that_draws_by_trusted_texts_is_not_applied_by_row(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = SavedLook.load(written)
    scores = replace(saved.scores, record=replace(saved.scores.record, draw="softmax"))
    monkeypatch.setattr(SavedLook, "load", lambda _: replace(saved, scores=scores))
    with pytest.raises(SettingsError, match=r"data\.trusted"):
        score_by_look(str(written.parent / "train.jsonl"), written, tmp_path / "s.parquet")
    assert not (tmp_path / "s.parquet").exists()
