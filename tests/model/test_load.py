"""A checkpoint of any kind becomes a model with the task's head, or is refused with the cure."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from models import tiny_llama_classifier
from runs import save_checkpoint
from tsqlora.errors import SettingsError
from tsqlora.libs.bitsandbytes import linear_bits
from tsqlora.model.load import Pretrained, load_pretrained, positions_of
from tsqlora.rows.labels import LabelMap
from tsqlora.tasks import get_task

CLASSES, TWO = get_task("sequence-classification"), LabelMap(("no", "yes"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def copied(checkpoint: Path, folder: Path, *, without: str = "") -> Path:
    for file in checkpoint.iterdir():
        if not without or without not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def without_pooler(checkpoint: Path, folder: Path) -> str:
    file = copied(checkpoint, folder) / "model.safetensors"
    save_file({k: w for k, w in load_file(file).items() if "pooler" not in k}, file, metadata={"format": "pt"})
    return str(folder)


def saved(pretrained: Pretrained, folder: Path) -> str:
    pretrained.model.save_pretrained(folder)
    pretrained.tokenizer.save_pretrained(folder)
    return str(folder)


def error_of(path: str | Path) -> str:
    with pytest.raises(SettingsError) as caught:
        load_pretrained(str(path), CLASSES, labels=TWO)
    return str(caught.value)


def test_the_head_is_new_and_knows_the_labels(checkpoint: Path) -> None:
    loaded = load_pretrained(str(checkpoint), CLASSES, labels=TWO)
    assert loaded.new_modules == ("classifier",)
    assert loaded.model.config.id2label == {0: "no", 1: "yes"}
    assert loaded.model.config.label2id == {"no": 0, "yes": 1}
    assert loaded.positions == 64


def test_without_labels_the_head_is_of_one_number(checkpoint: Path) -> None:
    config = load_pretrained(str(checkpoint), get_task("regression")).model.config
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_a_trained_head_of_the_same_size_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    first = load_pretrained(str(checkpoint), CLASSES, labels=TWO)
    again = load_pretrained(saved(first, tmp_path), CLASSES, labels=TWO)
    assert again.new_modules == ()
    assert torch.equal(again.model.classifier.weight, first.model.classifier.weight)


def test_a_head_of_another_size_is_made_anew(checkpoint: Path, tmp_path: Path) -> None:
    path = saved(load_pretrained(str(checkpoint), CLASSES, labels=TWO), tmp_path)
    again = load_pretrained(path, CLASSES, labels=LabelMap((1, 2, 3)))
    assert again.new_modules == ("classifier",)
    assert again.model.classifier.out_features == 3


def test_a_pooler_that_the_checkpoint_lacks_is_new_too(checkpoint: Path, tmp_path: Path) -> None:
    path = without_pooler(checkpoint, tmp_path)
    assert load_pretrained(path, CLASSES, labels=TWO).new_modules == ("bert.pooler.dense", "classifier")


def test_weights_come_in_the_asked_dtype(checkpoint: Path) -> None:
    loaded = load_pretrained(str(checkpoint), CLASSES, labels=TWO, dtype="bfloat16")
    assert next(loaded.model.parameters()).dtype is torch.bfloat16


def test_a_decoder_without_padding_pads_with_its_end_token(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    model = tiny_llama_classifier(vocab=len(tokenizer), dtype=torch.float32)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path), CLASSES, labels=TWO)
    assert loaded.tokenizer.pad_token == "[SEP]"
    assert loaded.model.config.pad_token_id == tokenizer.eos_token_id
    assert loaded.new_modules == ("score",)


def test_a_class_is_read_before_what_the_tokenizer_pads_with(checkpoint: Path, tmp_path: Path) -> None:
    """As of a config that names another padding than the tokenizer, which would be read at a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.save_pretrained(tmp_path)
    model = tiny_llama_classifier(vocab=len(tokenizer), dtype=torch.float32)
    model.config.pad_token_id = tokenizer.sep_token_id
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path), CLASSES, labels=TWO)
    row = torch.tensor([[5, 6, 7]])
    padded = torch.cat([row, torch.full((1, 3), tokenizer.pad_token_id)], dim=1)
    with torch.no_grad():
        alone = loaded.model.eval()(row).logits
        behind = loaded.model(padded, attention_mask=torch.tensor([[1, 1, 1, 0, 0, 0]])).logits
    torch.testing.assert_close(behind, alone)


def test_positions_of_an_encoder_with_a_decoder_are_the_fewer() -> None:
    small = {
        "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8
    }  # fmt: skip
    parts = [BertConfig(**small, max_position_embeddings=count) for count in (20, 12)]
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*parts))
    assert positions_of(model) == 12


def test_positions_of_robertas_kin_begin_behind_their_padding() -> None:
    config = RobertaConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=14, pad_token_id=1,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config)
    assert positions_of(model) == 12
    model(torch.full((1, 12), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(torch.full((1, 13), 5))


# torch warns of its own script_method, which bitsandbytes imports.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("quantization", "bits"), [("4bit", 4), ("8bit", 8)])
def test_a_packed_body_has_a_whole_head(checkpoint: Path, quantization: str, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_pretrained(str(checkpoint), CLASSES, labels=TWO, quantization=quantization).model
    packed = {name: result for name, module in model.named_modules() if (result := linear_bits(module))}
    assert packed["bert.encoder.layer.0.attention.self.query"] == bits
    assert "classifier" not in packed


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_layer_that_is_new_is_not_packed(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    path = without_pooler(checkpoint, tmp_path)
    with pytest.raises(SettingsError, match=r"4bit packs bert\.pooler\.dense, which the checkpoint lacks"):
        load_pretrained(path, CLASSES, labels=TWO, quantization="4bit")


def test_packing_names_the_package_that_it_needs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'tsqlora\[quantized\]'"):
        load_pretrained(str(checkpoint), CLASSES, labels=TWO, quantization="4bit")


def test_a_model_that_the_first_gpu_holds_stays_whole(checkpoint: Path) -> None:
    model = load_pretrained(str(checkpoint), CLASSES, labels=TWO, gpus=[2**30, 2**30]).model
    assert getattr(model, "hf_device_map", None) is None


def test_a_model_that_all_gpus_cannot_hold_is_refused_before_it_loads(checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match=r"2 GPUs .*model\.quantization"):
        load_pretrained(str(checkpoint), CLASSES, labels=TWO, gpus=[1000, 1000])


def test_a_hub_id_that_cannot_be_reached_is_named() -> None:
    text = error_of("org/nothing")
    assert text.startswith("model.path 'org/nothing' cannot be loaded (there is no such directory, and as a hub id: ")
    assert text.endswith("; correct this, or give another directory or hub id")
    assert "\n" not in text


def test_a_package_that_loading_needs_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise ImportError("Loading a GPTQ quantized model requires optimum")

    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", lacking)
    assert error_of(checkpoint).partition("(")[2].startswith("Loading a GPTQ quantized model requires optimum")


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "cannot be loaded" in error_of(tmp_path)


def test_a_model_without_its_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    assert "holds no tokenizer" in error_of(copied(checkpoint, tmp_path, without="tokenizer"))


def test_a_tokenizer_that_cannot_pad_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = copied(checkpoint, tmp_path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "neither a padding nor an end token" in error_of(path)
