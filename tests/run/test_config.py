"""Settings: every error's text, and that what is written reads back the same."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from tsqlora.compat.yaml12 import inline_yaml
from tsqlora.errors import SettingsError
from tsqlora.run.config import (
    PRESETS,
    REFUSED_ARGUMENTS,
    REMOVED_SETTINGS,
    Config,
    PresetName,
    QualitySettings,
    RankSettings,
    WeightSettings,
    dump_config,
    load_config,
    template,
)

REQUIRED = {"model": {"path": "org/model"}, "data": {"train": "org/rows"}}
TRAINING_CHOICES = (
    "choices: epochs, learning_rate, batch_size, eval_batch_size, bf16, seed, "
    "or a field of transformers.TrainingArguments"
)


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
    assert (config.task.type, config.training.epochs, config.ranks.mean) == (
        "sequence-classification",
        6,
        8.0,
    )


def test_a_section_with_nothing_under_it_has_its_defaults() -> None:
    assert loaded("quality:\n  weights:\nranks:\n") == loaded("")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        loaded("").quality.fraction = 1.0


def test_every_setting_is_described_in_one_line() -> None:
    for key, field in fields():
        assert field.description, key
        assert "\n" not in field.description, key


def test_presets_are_those_that_the_type_names() -> None:
    assert set(PRESETS) == set(get_args(PresetName))


def test_weights_and_temperature_come_from_the_preset_unless_set() -> None:
    assert QualitySettings().resolved_weights() is None
    assert QualitySettings(weights=WeightSettings(loss=-1.0)).weighted_terms() == ["loss"]
    paper = QualitySettings(preset="paper", weights=WeightSettings(convergence=2.0), temperature=3.0)
    assert paper.resolved_weights() == {
        "gradient_norm": 1 / 3,
        "loss_reduction": 1 / 3,
        "convergence": 2.0,
        "loss": 0.0,
        "ifd": 0.0,
    }
    assert paper.resolved_temperature() == 3.0
    assert QualitySettings(preset="paper").resolved_temperature() == 1.0


def test_suspect_rows_are_left_out_unless_a_softmax_of_quality_decides() -> None:
    assert QualitySettings().resolved_reject() is None  # of classes
    assert QualitySettings(reject=True).resolved_reject() is True
    assert QualitySettings(reject=False).resolved_reject() is False
    assert QualitySettings(preset="paper").resolved_reject() is False
    assert QualitySettings(weights=WeightSettings(loss=-1.0)).resolved_reject() is False
    assert QualitySettings(preset="paper", reject=True).resolved_reject() is True


def test_a_temperature_of_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"temperature 2\.0 is of a softmax over Q, and every weight of Q is 0"):
        loaded("quality: {temperature: 2.0}")


def test_a_path_from_home_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert loaded("", "model.path=~/mine").model.path == str(tmp_path / "mine")


def test_the_greatest_rank_is_twice_the_mean_unless_set() -> None:
    assert RankSettings(mean=2.3).resolved_max() == 5
    assert RankSettings(mean=2.3, max=9).resolved_max() == 9


# ------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "quality: {fractoin: 0.3}",
            "unknown key 'quality.fractoin'; did you mean 'fraction'? choices: calibrate, enabled, fraction, "
            "guard, preset, reference, reject, resample, scope, temperature, warmup, warmup_limit, weights",
        ),
        (
            "quality: {weights: {convergense: 1}}",
            "unknown key 'quality.weights.convergense'; did you mean 'convergence'? "
            "choices: convergence, gradient_norm, ifd, loss, loss_reduction",
        ),
        (
            "qualty: {}",
            "unknown key 'qualty'; did you mean 'quality'? "
            "choices: adapter, data, model, quality, ranks, task, training",
        ),
        (
            "training: {wieght_decay: 0.1}",
            f"unknown key 'training.wieght_decay'; did you mean 'weight_decay'? {TRAINING_CHOICES}",
        ),
        (
            "training: {lerning_rate: 0.1}",
            f"unknown key 'training.lerning_rate'; did you mean 'learning_rate'? {TRAINING_CHOICES}",
        ),
        ("training: {zzz: 1}", f"unknown key 'training.zzz'; {TRAINING_CHOICES}"),
        ("quality: {fraction: 1.5}", "quality.fraction is 1.5; it takes a number > 0 and <= 1"),
        ("quality: {fraction: half}", "quality.fraction is 'half'; it takes a number > 0 and <= 1"),
        ("quality: {enabled: yes}", "quality.enabled is 'yes'; it takes true or false"),
        ("quality: {scope: head}", "quality.scope is 'head'; it takes adapter or full"),
        ("quality: {temperature: 0}", "quality.temperature is 0; it takes a number > 0, or null"),
        ("ranks: {mean: .nan}", "ranks.mean is .nan; it takes a number > 0 and <= 65536"),
        ("ranks: {max: 2.5}", "ranks.max is 2.5; it takes a whole number >= 1 and <= 65536, or null"),
        ("training: {epochs: true}", "training.epochs is true; it takes a whole number >= 1"),
        ("training: {epochs: null}", "training.epochs is null; it takes a whole number >= 1"),
        ("task: {type: 7}", "task.type is 7; it takes text, in quotes"),
        ("task: {type: ''}", "task.type is ''; it takes text, not empty"),
        (
            "adapter: {target_modules: []}",
            "adapter.target_modules is []; it takes text, or a list of texts, not empty",
        ),
        (
            "adapter: {target_modules: [1]}",
            "adapter.target_modules is [1]; it takes text, or a list of texts",
        ),
        ("adapter: 3", "adapter is 3; it takes settings under it: alpha, dropout, target_modules, init_from"),
        ("ranks: {min: 20}", "ranks.min 20 is above ranks.max 16; lower it or raise ranks.max"),
        (
            "ranks: {warmup: 0.5, freeze: 0.5}",
            "ranks.warmup 0.5 and ranks.freeze 0.5 leave no steps in which ranks change; make their sum less than 1",
        ),
        (
            "quality: {fraction: 1, fraction: 1}",
            "not valid YAML: line 5: key 'fraction' is there twice; keep one",
        ),
        ("model: {path: other}", "not valid YAML: line 5: key 'model' is there twice; keep one"),
        ("7: 8", "not valid YAML: line 5: a key is not text; put it in quotes"),
        ("task: [", "not valid YAML: line 5: expected the node content, but found '<stream end>'"),
    ],
)
def test_an_error_names_the_file_the_key_the_value_and_the_cure(text: str, message: str) -> None:
    assert error_of(text) == f"tsq.yaml: {message}"


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_a_training_argument_that_we_decide_is_refused_with_the_cure(name: str) -> None:
    cure = REFUSED_ARGUMENTS[name]
    assert error_of(f"training: {{{name}: 1}}") == f"tsq.yaml: 'training.{name}' cannot be set; {cure}"


@pytest.mark.parametrize("key", REMOVED_SETTINGS)
def test_a_removed_setting_is_refused_by_its_name_unless_it_has_its_former_default(key: str) -> None:
    default = inline_yaml(REMOVED_SETTINGS[key].default)
    assert loaded("", f"{key}={default}") == loaded("")
    assert key in error_of("", f"{key}=no-such-value")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "model.path and data.train must be set; 'tsqlora init' prints an example"),
        ("model: {path: m}", "data.train must be set; 'tsqlora init' prints an example"),
        ("- 1", "holds a list, not settings; write sections, such as 'model:'"),
        (
            "model: {pth: m}",
            "unknown key 'model.pth'; did you mean 'path'? choices: dtype, path, quantization, revision, "
            "trust_remote_code",
        ),
    ],
)
def test_what_must_be_set_is_named(text: str, message: str) -> None:
    assert error_of(text, required=False) == f"tsq.yaml: {message}"


def test_a_file_that_cannot_be_read_says_how_to_make_one() -> None:
    cure = "'tsqlora init -o FILE' writes a file to start from"
    with pytest.raises(SettingsError) as caught:
        load_config("absent.yaml")
    assert str(caught.value) == f"absent.yaml: cannot be read (No such file or directory); {cure}"
    with pytest.raises(SettingsError, match=r"^\.: cannot be read \(Is a directory\)"):
        load_config(".")


def test_bytes_that_are_no_text_are_not_yaml() -> None:
    Path("latin.yaml").write_bytes(b"task: {type: \xff}")
    with pytest.raises(SettingsError, match=r"^latin\.yaml: not valid YAML: unacceptable character"):
        load_config("latin.yaml")


def test_yaml_runs_no_code() -> None:
    assert "is not taken; write the plain value" in error_of("task: !!python/object/apply:os.getcwd []")


# ------------------------------------------------------------------------------ overrides


def test_overrides_win_over_the_file_and_the_last_one_wins() -> None:
    config = loaded("quality: {fraction: 0.2, warmup: 2}", "quality.fraction=0.3", "quality.fraction=0.4")
    assert (config.quality.fraction, config.quality.warmup) == (0.4, 2.0)


def test_override_values_are_yaml() -> None:
    config = loaded(
        "",
        "training.learning_rate=1e-3",
        "quality.weights={gradient_norm: 1}",
        "adapter.target_modules=[query, value]",
        "data.label=",
        "task.type=a=b",
    )
    assert config.training.learning_rate == 1e-3
    assert config.quality.weights.gradient_norm == 1.0
    assert config.adapter.target_modules == ["query", "value"]
    assert config.data.label is None
    assert config.task.type == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quality", "'quality' is not key.key=value, such as quality.fraction=0.3"),
        ("=3", "'=3' is not key.key=value, such as quality.fraction=0.3"),
        ("a..b=3", "'a..b=3' is not key.key=value, such as quality.fraction=0.3"),
        ("quality.fraction=2", "quality.fraction is 2; it takes a number > 0 and <= 1"),
        ("ranks.min=20", "ranks.min 20 is above ranks.max 16; lower it or raise ranks.max"),
        ("training.zzz=1", f"unknown key 'training.zzz'; {TRAINING_CHOICES}"),
        ("model.path.x=1", "unknown key 'model.path.x'; 'model.path' has no settings under it"),
        (
            "data.text=[",
            "the value of 'data.text=[' is not YAML (line 1: expected the node content, but found "
            "'<stream end>'); put it in quotes",
        ),
    ],
)
def test_an_error_in_an_override_says_so(override: str, message: str) -> None:
    assert error_of("", override) == f"--set: {message}"


def test_an_error_of_the_file_is_not_an_overrides_whose_key_begins_alike() -> None:
    text = "model: {path: org/model}\ndata: {train: org/rows, text_pair: 3}\n"
    assert error_of(text, "data.text=t", required=False).startswith("tsq.yaml: data.text_pair is 3; it takes text")


# ----------------------------------------------------------------------------------- YAML


def test_numbers_words_and_dates_are_read_as_yaml_1_2_has_them() -> None:
    config = loaded("training: {learning_rate: 5e-4, eval_strategy: no}\ntask: {type: 2026-01-31}")
    assert config.training.learning_rate == 5e-4
    assert config.training.further_arguments() == {"eval_strategy": "no"}
    assert config.task.type == "2026-01-31"


def test_a_merged_mapping_may_be_overridden_key_by_key() -> None:
    text = "ranks: &r {warmup: 0.2, freeze: 0.2}\nquality: {weights: {convergence: 2}}\ntraining: {seed: 1}\n"
    assert loaded(text).ranks.warmup == 0.2
    Path("merged.yaml").write_text(
        yaml.safe_dump(REQUIRED) + "quality: {weights: &w {gradient_norm: 1}}\n"
        "training: {lr_scheduler_kwargs: {<<: *w, gradient_norm: 3, other: 2}}\n"
    )
    kwargs = load_config("merged.yaml").training.further_arguments()["lr_scheduler_kwargs"]
    assert kwargs == {"gradient_norm": 3, "other": 2}


# ---------------------------------------------------------------------------------- paths


def test_a_path_is_looked_for_here_then_beside_the_file_else_it_is_a_hub_id(tmp_path: Path) -> None:
    beside = tmp_path / "configs"
    beside.mkdir()
    for file in (tmp_path / "both.jsonl", beside / "both.jsonl", beside / "near.jsonl"):
        file.touch()
    (beside / "tsq.yaml").write_text(
        "model: {path: org/model}\ndata: {train: both.jsonl, validation: near.jsonl, test: org/rows}"
    )
    config = load_config("configs/tsq.yaml")
    assert config.data.train == str(tmp_path / "both.jsonl")
    assert config.data.validation == str(beside / "near.jsonl")
    assert config.data.test == "org/rows"
    assert config.model.path == "org/model"


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
        {
            "fraction": st.floats(0, 1, exclude_min=True),
            "preset": st.sampled_from(sorted(PRESETS)),
            "reject": st.none() | st.booleans(),
        }
    ),
    adapter=st.fixed_dictionaries({"target_modules": st.text(min_size=1) | st.lists(st.text(min_size=1), min_size=1)}),
    training=st.fixed_dictionaries({"seed": st.integers(0, 2**32 - 1), "lr_scheduler_kwargs": anything}),
)


@given(configs)
@example(Config.model_validate(REQUIRED | {"task": {"type": "\x85"}}))
@example(Config.model_validate(REQUIRED | {"task": {"type": "5e-4"}}))
@example(Config.model_validate(REQUIRED | {"training": {"lr_scheduler_kwargs": -(2**63)}}))
def test_a_dumped_config_loads_back_equal(config: Config) -> None:
    Path("dumped.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config("dumped.yaml") == config


@pytest.mark.parametrize("task", [None, "regression"])
def test_the_template_loads_and_holds_the_defaults(task: str | None) -> None:
    Path("template.yaml").write_text(template(task))
    config = load_config("template.yaml")
    assert config.task.type == (task or "sequence-classification")
    expected = Config(model=config.model, data=config.data, task=config.task)
    assert config == expected


def test_the_template_has_every_setting_with_description_type_and_default() -> None:
    text = template()
    for key, field in fields():
        assert f"# {field.description}\n" in text, key
        assert f"{key.rpartition('.')[2]}:" in text, key
    described = "  # Share of the rows that an epoch trains on.\n"
    assert f"{described}  fraction: 0.5  # a number > 0 and <= 1; default 0.5\n" in text
    assert "  path: sentence-transformers/all-MiniLM-L6-v2  # text; required\n" in text


def test_further_training_arguments_are_fields_of_the_trainer() -> None:
    from transformers import TrainingArguments

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    config = loaded("training: {weight_decay: 0.1, warmup_steps: 0.06}")
    assert config.training.further_arguments() == {"weight_decay": 0.1, "warmup_steps": 0.06}
    # Renamed by transformers in the meantime, still refused by name.
    assert set(REFUSED_ARGUMENTS) - theirs <= {"group_by_length"}
    assert math.isclose(sum(PRESETS["paper"][:3]), 1)
