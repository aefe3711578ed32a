"""Settings: every error names its key, and what is written reads back the same."""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from tsqlora.errors import SettingsError
from tsqlora.libs.yaml import dump_yaml
from tsqlora.model.request import ScoringRule
from tsqlora.moved import MOVED, what_of
from tsqlora.settings import PRESETS, REFUSED_ARGUMENTS, Config, QualitySettings, dump_config, load_config, template
from tsqlora.settings.settings import CAUSAL_TASKS, TASK_TYPES, _trainer_arguments
from tsqlora.tasks import TASKS, get_task

REQUIRED = {"model": {"path": "org/model"}, "data": {"train": "org/rows"}}


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def loaded(text: str, *overrides: str, required: bool = True) -> Config:
    """`text` in tsq.yaml, below the keys that must be set; none of them may come twice."""
    head = yaml.safe_dump(REQUIRED) if required else ""
    Path("tsq.yaml").write_text(head + text, encoding="utf-8")
    return load_config("tsq.yaml", overrides)


def error_of(text: str, *overrides: str, required: bool = True) -> str:
    with pytest.raises(SettingsError) as caught:
        loaded(text, *overrides, required=required)
    return str(caught.value)


def fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting and section with its dotted key."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")


# ------------------------------------------------------------------------------- defaults


def test_only_the_model_and_the_rows_must_be_set() -> None:
    config = loaded("")
    assert config == Config.model_validate(REQUIRED)
    assert (config.task.type, config.training.epochs, config.ranks.mean) == ("sequence-classification", 6, 8.0)


def test_a_section_with_nothing_under_it_has_its_defaults() -> None:
    assert loaded("quality:\n  weights: {loss: null}\nranks:\n") == loaded("")


def test_numbers_of_numpy_are_numbers() -> None:
    training = {"seed": np.int64(3), "learning_rate": np.float32(0.5), "bf16": np.bool_(False)}
    config = load_config(None, sections={**REQUIRED, "training": training})
    assert (config.training.seed, config.training.learning_rate, config.training.bf16) == (3, 0.5, False)
    assert load_config(None, sections=yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("value", [np.float64(0.5), np.ones(2), 1j, object()])
def test_an_object_that_yaml_lacks_is_named_by_its_key(value: Any) -> None:
    with pytest.raises(SettingsError, match=r"training\.seed"):
        load_config(None, sections={**REQUIRED, "training": {"seed": value}})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        loaded("").quality.fraction = 1.0


def test_every_setting_is_described_in_one_line() -> None:
    for key, field in fields():
        assert field.description, key
        assert "\n" not in field.description, key


def test_task_types_are_all_tasks_and_each_has_a_template() -> None:
    assert set(TASK_TYPES) == set(TASKS)
    assert {name for name in TASK_TYPES if get_task(name).reading.causal} == {*CAUSAL_TASKS}
    for task in TASK_TYPES:
        Path("template.yaml").write_text(template(task))
        config = load_config("template.yaml")
        assert config == Config(model=config.model, data=config.data, task=config.task)
        assert config.task.type == task


def test_a_path_from_home_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert loaded("", "model.path=~/mine").model.path == str(tmp_path / "mine")


# ------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("text", "key", "cure"),
    [
        ("quality: {fractoin: 0.3}", "quality.fractoin", "fraction"),
        ("qualty: {}", "qualty", "quality"),
        ("training: {wieght_decay: 0.1}", "training.wieght_decay", "weight_decay"),
        ("training: {lerning_rate: 0.1}", "training.lerning_rate", "learning_rate"),
        ("training: {lr: 0.1}", "training.lr", "did you mean 'training.learning_rate'?"),
        ("training: {num_epochs: 3}", "training.num_epochs", "did you mean 'training.epochs'?"),
        ("adapter: {lora_r: 8}", "adapter.lora_r", "did you mean 'ranks.mean'?"),
        ("rank: 8", "rank", "did you mean 'ranks.mean'?"),
        ("per_device_train_batch_size: 8", "per_device_train_batch_size", "did you mean 'training.batch_size'?"),
        ("training: {zzz: 1}", "training.zzz", "TrainingArguments"),
        ("quality: {fraction: 1.5}", "quality.fraction is 1.5", "1"),
        ("quality: {fraction: half}", "quality.fraction is half", "number"),
        ("quality: {enabled: yes}", "quality.enabled is yes", "boolean"),
        ("quality: {preset: papers}", "quality.preset is papers", "'paper'"),
        ("ranks: {mean: .nan}", "ranks.mean is .nan", "finite"),
        ("ranks: {max: 2.5}", "ranks.max is 2.5", "integer"),
        ("training: {epochs: true}", "training.epochs is true", "number"),
        ("training: {epochs: 0}", "training.epochs is 0", "greater than 0"),
        ("training: {max_steps: 0.5}", "training.max_steps is 0.5", "whole number"),
        ("training: {max_steps: -1}", "training.max_steps is -1", "1 or more"),
        ("task: {type: 7}", "task.type is 7", "string"),
        ("task: {type: ''}", "task.type is ''", "at least 1"),
        ("adapter: {target_modules: []}", "adapter.target_modules is []", "at least 1"),
        ("adapter: {target_modules: [1]}", "adapter.target_modules", "string"),
        ("adapter: 3", "adapter is 3", "dictionary"),
        ("ranks: {min: 20}", "ranks.min 20", "ranks.mean 8"),
        ("quality: {weights: {loss: 1}}", "quality.weights was removed", "ScoringRule(weights"),
        ("quality: {look: LOOK}", "quality.look was removed", "--look"),
        ("quality: {fraction: 1, fraction: 1}", "line 5", "fraction"),
        ("model: {path: other}", "line 5", "model"),
        ("7: 8", "7", "string"),
        ("task: [", "line 5", ""),
        ("task: !!python/object/apply:os.getcwd []", "line 5", "python/object"),
    ],
)
def test_an_error_names_the_file_the_key_the_value_and_the_cure(text: str, key: str, cure: str) -> None:
    file, _, message = error_of(text).partition(": ")
    assert file == "tsq.yaml"
    assert key in message
    assert cure in message.partition(key)[2]


def test_names_of_other_tools_lead_to_settings_that_there_are() -> None:
    for section, name in (key.split(".") for key in MOVED["elsewhere"].values()):
        assert name in type(getattr(loaded(""), section)).model_fields


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_a_training_argument_that_we_decide_is_refused_with_the_cure(name: str) -> None:
    cure = REFUSED_ARGUMENTS[name]
    assert error_of(f"training: {{{name}: 1}}") == f"tsq.yaml: 'training.{name}' cannot be set; {cure}"


@pytest.mark.parametrize("key", MOVED["settings"])
def test_a_removed_setting_is_refused_by_its_name_unless_it_has_its_former_default(key: str) -> None:
    entry = MOVED["settings"][key]
    default = dump_yaml(entry.get("was") if isinstance(entry, dict) else None, inline=True)
    assert loaded("", f"{key}={default}") == loaded("")
    assert key in error_of("", f"{key}=no-such-value")


def test_a_run_with_a_removed_term_still_loads_for_what_needs_no_rows_drawn(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {path: m}\ndata: {train: t.csv}\nquality: {weights: {reducible_loss: 1.0, loss: 2.0}}\n")
    with pytest.raises(SettingsError, match=r"quality\.weights\.reducible_loss was removed"):
        load_config(path)
    assert load_config(path, trained=True).quality == QualitySettings()


def test_a_removed_setting_that_is_a_field_of_the_rule_names_one_that_exists() -> None:
    messages = [what_of(entry) for entry in MOVED["settings"].values()]
    named = [match[1] for why in messages if (match := re.search(r"ScoringRule\((\w+)=", why))]
    assert {"reference", "calibration", "weights", "temperature", "look_again"} == {*named}
    assert {*named} <= {field.name for field in dataclasses.fields(ScoringRule)}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "model.path and data.train must be set"),
        ("model: {path: m}", "data.train must be set"),
        ("- 1", "list"),
        ("model: {pth: m}", "unknown key 'model.pth'"),
        ("learning_rate: 1", "'training.learning_rate'"),
    ],
)
def test_missing_settings_are_named(text: str, key: str) -> None:
    assert key in error_of(text, required=False)


@pytest.mark.parametrize("path", ["absent.yaml", "."])
def test_a_file_that_cannot_be_read_says_how_to_make_one(path: str) -> None:
    with pytest.raises(SettingsError, match="tsqlora init"):
        load_config(path)


def test_bytes_that_are_no_text_are_not_yaml() -> None:
    Path("latin.yaml").write_bytes(b"task: {type: \xff}")
    with pytest.raises(SettingsError, match=r"^latin\.yaml: not valid YAML"):
        load_config("latin.yaml")


# ------------------------------------------------------------------------------ overrides


def test_overrides_win_over_the_file_and_the_last_one_wins() -> None:
    config = loaded("quality: {fraction: 0.2, head_start: false}", "quality.fraction=0.3", "quality.fraction=0.4")
    assert (config.quality.fraction, config.quality.head_start) == (0.4, False)


def test_override_values_are_yaml() -> None:
    config = loaded(
        "",
        "training.learning_rate=1e-3",
        "training.lr_scheduler_kwargs={gamma: 1}",
        "adapter.target_modules=[query, value]",
        "data.label=",
        "task.type=a=b",
    )
    assert config.training.learning_rate == 1e-3
    assert config.training.further_arguments() == {"lr_scheduler_kwargs": {"gamma": 1}}
    assert config.adapter.target_modules == ["query", "value"]
    assert config.data.label is None
    assert config.task.type == "a=b"


@pytest.mark.parametrize("text", [",", "|", "\t", ":", "#", "*", '","', "';'"])
def test_what_is_not_a_text_in_yaml_is_the_text_of_a_setting_that_takes_one(text: str) -> None:
    assert loaded("", f"data.delimiter={text}").data.delimiter == text.strip("\"'")
    assert (loaded("", "data.text=7").data.text, loaded("", "data.text=[a").data.text) == ("7", "[a")
    assert [loaded("", f"data.text={none}").data.text for none in ("", "null", "~")] == [None] * 3


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("quality", "'quality'"),
        ("=3", "'=3'"),
        ("a..b=3", "'a..b=3'"),
        ("quality.fraction=2", "quality.fraction is 2"),
        ("ranks.min=20", "ranks.min 20"),
        ("training.zzz=1", "'training.zzz'"),
        ("model.path.x=1", "'model.path.x'"),
        ("quality.fraction=[", "'quality.fraction=['"),
        ("data.encoding=klingon", "data.encoding is 'klingon', which Python does not support"),
        ("data.encoding=rot13", "data.encoding is 'rot13', which Python does not support"),
    ],
)
def test_an_error_in_an_override_says_so(override: str, key: str) -> None:
    message = error_of("", override)
    assert message.startswith("--set: ")
    assert key in message


def test_an_error_of_the_file_is_not_an_overrides_whose_key_begins_alike() -> None:
    text = "model: {path: org/model}\ndata: {train: org/rows, text_pair: 3}\n"
    assert error_of(text, "data.text=t", required=False).startswith("tsq.yaml: data.text_pair is 3")


# ---------------------------------------------------------------------------------- paths


def test_a_path_is_looked_for_here_then_beside_the_file_else_it_is_a_hub_id(tmp_path: Path) -> None:
    beside = tmp_path / "configs"
    beside.mkdir()
    for file in (tmp_path / "both.jsonl", beside / "both.jsonl", beside / "near.jsonl"):
        file.touch()
    (beside / "tsq.yaml").write_text(
        "model: {path: org/model}\n"
        "data: {train: both.jsonl, validation: near.jsonl, trusted: near.jsonl, test: org/rows}"
    )
    config = load_config("configs/tsq.yaml")
    assert config.data.train == str(tmp_path / "both.jsonl")
    assert config.data.validation == config.data.trusted == str(beside / "near.jsonl")
    assert config.data.test == "org/rows"
    assert config.model.path == "org/model"


@pytest.mark.parametrize(
    ("row", "settings", "task"),
    [
        ('{"messages": []}', "", "causal-lm"),
        ('{"prompt": "a", "completion": "b"}', "", "causal-lm"),
        ('{"q": "a", "a": "b"}', "data: {prompt: q, target: a}", "causal-lm"),
        ('{"prompt": "a", "completion": "b"}', "data: {label: completion}", "sequence-classification"),
        ('{"prompt": "a", "completion": "b"}', "task: {type: seq2seq}", "seq2seq"),
        ('{"question": "a", "answer": "b", "label": 1}', "", "sequence-classification"),
        ('{"text": "a", "sentiment": "b"}', "", "sequence-classification"),
        ("broken", "", "sequence-classification"),
    ],
)
def test_a_model_that_writes_text_learns_the_answers_of_a_file_that_has_them(
    row: str, settings: str, task: str
) -> None:
    Path("rows.jsonl").write_text(row)
    sections = {"model": {"path": "writer"}, "data": {"train": "rows.jsonl"}}
    Path("tsq.yaml").write_text(settings)
    Path("writer").mkdir()
    assert load_config("tsq.yaml", sections=sections).task.type in (task, "sequence-classification")
    Path("writer", "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert load_config("tsq.yaml", sections=sections).task.type == task
    Path("writer", "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    assert load_config("tsq.yaml", sections=sections).task.type != "causal-lm"


# ------------------------------------------------------------------------------ round trip

# A leading word keeps drawn names from being those of files, which are made absolute.
names = st.text(min_size=1).map(lambda text: f"no file {text}")
text_or_null = st.none() | st.text(min_size=1)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
configs = st.builds(
    lambda **sections: Config.model_validate(sections),
    model=st.fixed_dictionaries(
        {"path": names, "revision": st.none() | st.from_regex(r"[a-z0-9]{1,9}", fullmatch=True)}
    ),
    data=st.fixed_dictionaries({"train": names, "test": st.none() | names, "text": text_or_null}),
    task=st.fixed_dictionaries({"type": st.text(min_size=1)}),
    quality=st.fixed_dictionaries(
        {"fraction": st.floats(0, 1, exclude_min=True), "preset": st.sampled_from(sorted(PRESETS))}
    ),
    adapter=st.fixed_dictionaries({"target_modules": st.text(min_size=1) | st.lists(st.text(min_size=1), min_size=1)}),
    training=st.fixed_dictionaries({"seed": st.integers(0, 2**32 - 1), "lr_scheduler_kwargs": anything}),
)


def test_whole_epochs_are_written_as_integers() -> None:
    assert [loaded(f"training: {{epochs: {text}}}").training.epochs for text in ("6", "6.0", "0.5")] == [6, 6, 0.5]
    for text in ("6", "6.0"):
        assert "epochs: 6\n" in dump_config(loaded(f"training: {{epochs: {text}}}"))


@given(configs)
@example(Config.model_validate(REQUIRED | {"task": {"type": "\x85"}}))
@example(Config.model_validate(REQUIRED | {"task": {"type": "5e-4"}}))
@example(Config.model_validate(REQUIRED | {"training": {"lr_scheduler_kwargs": -(2**63)}}))
def test_a_dumped_config_loads_back_equal(config: Config) -> None:
    Path("dumped.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config("dumped.yaml") == config


def test_the_template_has_every_setting_with_description_type_and_default() -> None:
    text = template()
    for key, field in fields():
        assert f"# {field.description}\n" in text, key
        assert f"{key.rpartition('.')[2]}:" in text, key
    described = "  # Share of the rows in an epoch.\n"
    assert f"{described}  fraction: 0.5  # a number > 0 and <= 1; default 0.5\n" in text
    assert "  path: sentence-transformers/all-MiniLM-L6-v2  # text; required\n" in text


def test_further_training_arguments_are_fields_of_the_trainer() -> None:
    from transformers import TrainingArguments

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    config = loaded("training: {weight_decay: 0.1, warmup_steps: 0.06}")
    assert config.training.further_arguments() == {"weight_decay": 0.1, "warmup_steps": 0.06}
    assert set(REFUSED_ARGUMENTS) <= theirs == _trainer_arguments()
    assert PRESETS["paper"] is not None
    assert math.isclose(sum(PRESETS["paper"].values()), 1)
