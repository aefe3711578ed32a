"""adapter_config.json of a stranger: which settings are read, which are refused, and what PEFT gets of them."""

import dataclasses
import json
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig

from loras import lora_config, save_base, save_lora, tiny_llama
from models import tiny_bert
from tsqlora.adapter import lora
from tsqlora.adapter.base import Base, attach
from tsqlora.adapter.config import SETTINGS
from tsqlora.adapter.doctor import examine
from tsqlora.adapter.files import CONFIG, WEIGHTS, read_adapter
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.libs.peft import VARIANTS
from tsqlora.model.load import load_pretrained
from tsqlora.tasks import get_task
from tsqlora.training.export import export
from words import tokenizer

Q = [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)]
ENDLESS = r"(([\w]+\.?)+)+#"
"""Takes practically for ever on the name of any module."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter."""
    folder = tmp_path_factory.mktemp("sound")
    save_base(folder / "base", tiny_llama())
    save_lora(folder / "a", tiny_llama(), lora_config(target_modules=["q_proj"]))
    return folder


@pytest.fixture
def base(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound / "base", tmp_path / "base")


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound / "a", tmp_path / "a")


@pytest.fixture
def in_time() -> Iterator[None]:
    """Python's re can be interrupted by a signal."""

    def late(*_: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def edit(folder: Path, **settings: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | settings))
    return folder


PATTERNS = {
    "target_modules": f"{ENDLESS}|.*q_proj",
    "exclude_modules": ENDLESS,
    "layers_to_transform": [0, 1],
    "layers_pattern": [ENDLESS, "layers"],
    "rank_pattern": {ENDLESS.replace("#", "x"): 8},
    "alpha_pattern": {f"{'a' * 60}|(.*a){{20}}b": 3, "1.*": 5},
}


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize(
    ("bombs", "format"), [(PATTERNS, "peft"), (PATTERNS, "merged"), ({"target_parameters": [ENDLESS]}, "merged")]
)
def test_peft_reads_no_settings_of_a_stranger_and_matches_no_pattern(
    bombs: Mapping[str, Any], format: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeftConfig, "from_json_file", lambda *_, **__: pytest.fail("PEFT read the file"))
    report = export(edit(adapter, **bombs), tmp_path / "out", format=format, base=str(base))
    assert report["logits_difference"] < 1e-4 < report["largest_logit"]
    if format == "peft":
        assert ENDLESS[:8] not in (tmp_path / "out" / CONFIG).read_text()
        scales = [target.scale for target in read_adapter(tmp_path / "out").targets.values()]
        assert scales == [2, 5 / 8], "as PEFT would match them"


def test_no_module_of_a_strangers_choice_is_imported(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "payload.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(adapter, megatron_core="payload", megatron_config={"hidden_size": 1})
    for reads in (read_adapter, lambda folder: attach(tiny_llama(), folder)):
        with pytest.raises(DataError, match="megatron_config"):
            reads(adapter)
    edit(adapter, megatron_config=None, runtime_config={"ephemeral_gpu_offload": True}, peft_version="payload")
    model: Any = attach(tiny_llama(), adapter)
    config = model.peft_config["default"]
    assert (config.megatron_core, config.megatron_config) == ("megatron.core", None)
    assert not config.runtime_config.ephemeral_gpu_offload
    assert "payload" not in sys.modules


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa_niter_99999999"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 10**9}},
        {"layer_replication": [[0, 10**9]]},
        {"modules_to_save": [ENDLESS]},
        {"monteclora_config": {"buffer_size": 10**9}},
        {"arrow_config": {"top_k": {"a": 1}}},
        {"qalora_group_size": 10**12},
        {"alora_invocation_tokens": [10**12]},
        {"trainable_token_indices": {"embed_tokens": ["x"]}},
        {"target_parameters": [["a"]]},
        {"lora_dropout": 2},
        {"use_dora": "yes"},
        {"fan_in_fan_out": {}},
        {"peft_type": "XLORA"},
        {"bias": "some"},
        {"r": "8"},
        {"r": 0},
        {"r": 10**400},
        {"lora_alpha": float("nan")},
        {"rank_pattern": {"q_proj": 2.5}},
        {"base_model_name_or_path": {"a": 1}},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_values_that_peft_has_no_use_for_or_would_never_finish_are_refused(
    settings: Mapping[str, Any], adapter: Path
) -> None:
    with pytest.raises(DataError, match=f": {next(reversed(settings))} is ") as refused:
        read_adapter(edit(adapter, **settings))
    assert len(str(refused.value)) < 600


def test_what_a_stranger_wrote_for_the_next_reader_is_not_passed_on(base: Path, adapter: Path, tmp_path: Path) -> None:
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "payload"}
    edit(adapter, auto_mapping=mapping, megatron_core="payload", use_dora=False, corda_config={"cache_file": "payload"})
    export(adapter, tmp_path / "out", format="peft", base=str(base))
    assert "payload" not in (tmp_path / "out" / CONFIG).read_text()
    mapping["parent_library"] = "transformers.models.llama.modeling_llama"
    assert read_adapter(edit(adapter, auto_mapping=mapping)).config["auto_mapping"] == mapping


def test_a_setting_of_a_later_peft_is_left_out_and_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit(adapter, use_later=True, later_config={}, later_size=None)
    assert "use_later" not in read_adapter(adapter).config
    notes = examine(adapter)["notes"]
    assert any("use_later" in note and "later_config" not in note for note in notes)
    report = export(adapter, tmp_path / "out", format="peft", base=str(base))
    assert any("use_later" in note for note in report["notes"])


def test_every_setting_of_this_peft_is_judged() -> None:
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= SETTINGS.keys()
    assert set(VARIANTS) <= {*lora.VARIANTS}


def test_a_variant_that_this_peft_lacks_is_not_left_out(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqlora.adapter.base.OPTIONS", frozenset({"r", "lora_alpha", "target_modules"}))
    with pytest.raises(UnsupportedError, match="use_dora"):
        attach(tiny_llama(), edit(adapter, use_dora=True))


def test_a_base_that_is_an_adapter_is_not_given_to_transformers(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers would load it with PEFT, from its own settings.
    monkeypatch.setattr(PeftConfig, "from_json_file", lambda *_, **__: pytest.fail("PEFT read the file"))
    named = read_adapter(edit(adapter, base_model_name_or_path=str(base)))
    for name in (CONFIG, WEIGHTS):
        (base / name).write_bytes((adapter / name).read_bytes())
    for load in (lambda: Base(str(base)).load(named), lambda: load_pretrained(str(base), get_task("regression"))):
        with pytest.raises(SettingsError, match=CONFIG):
            load()


def test_modules_that_were_saved_whole_are_loaded(tmp_path: Path) -> None:
    options = {
        "target_modules": "bert.encoder.*query",
        "modules_to_save": ["pooler", "nowhere"],
        "task_type": "SEQ_CLS",
    }
    source = save_lora(tmp_path / "a", tiny_bert().float(), lora_config(**options))
    model: Any = attach(tiny_bert().float(), source)
    config = model.peft_config["default"]
    assert set(config.modules_to_save) == {"pooler", "classifier", "score"}
    assert config.target_modules == {f"bert.encoder.layer.{block}.attention.self.query" for block in (0, 1)}


# ---------------------------------------------------------------------------------- processors


@pytest.mark.parametrize("name", ["additional_chat_templates/tool.jinja", "tokenizer.json"])
def test_a_link_out_of_an_adapter_is_not_followed_into_an_export(
    name: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("swordfish")
    tokenizer().save_pretrained(adapter)
    (adapter / name).parent.mkdir(exist_ok=True)
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=Path(name).name):
        export(adapter, tmp_path / "out", format="merged", base=str(base))


def test_files_that_a_tokenizer_names_elsewhere_are_not_read(base: Path, adapter: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "swordfish"]))
    (adapter / "vocab.txt").write_text(secret.read_text().replace("swordfish", "word"))
    settings = {"tokenizer_class": "BertTokenizer", "vocab_file": str(secret), "special_tokens_map_file": "/nowhere"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    export(adapter, tmp_path / "out", format="merged", base=str(base))
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert b"word" in written["tokenizer.json"]
    assert not [name for name, content in written.items() if b"swordfish" in content]


def test_code_that_comes_with_a_tokenizer_is_not_run(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    (adapter / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass C: pass\n")
    places = {"tokenizer_config.json": "AutoTokenizer", "preprocessor_config.json": "AutoImageProcessor"}
    for name, kind in places.items():
        code = {"tokenizer_class": "C", "image_processor_type": "C", "feature_extractor_type": "C"}
        code |= {"auto_map": {kind: ["evil.C", "evil.C"] if kind == "AutoTokenizer" else "evil.C"}}
        (adapter / name).write_text(json.dumps(code))
    export(adapter, tmp_path / "out", format="merged", base=str(base))
    assert not (tmp_path / "owned").exists()


@pytest.mark.usefixtures("in_time")
def test_a_chat_template_is_copied_and_not_run(base: Path, adapter: Path, tmp_path: Path) -> None:
    bomb = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer().save_pretrained(adapter)
    (adapter / "chat_template.jinja").write_text(bomb)
    export(adapter, tmp_path / "out", format="merged", base=str(base))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == bomb
