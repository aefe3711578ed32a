"""Another chat template is compared with that of training by jinja2 alone, within limits."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES, tokenizer_of
from tsqlora.adapter.template import compare_template, read_template, render
from tsqlora.errors import DataError

CHATS = [
    [{"role": "user", "content": "How are you?"}],
    [
        {"role": "user", "content": " Two\nlines "},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And é?"},
    ],
]


def contract(family: str, folder: Path) -> dict[str, Any]:
    """What a run of a model of this family would write."""
    tokenizer = tokenizer_of(FAMILIES[family])
    tokenizer.save_pretrained(folder / "base")
    texts = [str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) for chat in CHATS]
    value = {
        "base": str(folder / "base"),
        "template": tokenizer.chat_template,
        "sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "stop_tokens": [tokenizer.eos_token],
        "stops_trained": 1.0,
        "prompts": [
            {"messages": chat, "text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
            for chat, text in zip(CHATS, texts, strict=True)
        ],
    }
    (folder / "template.json").write_text(json.dumps(value), encoding="utf-8")
    return value


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_those_of_apply_chat_template(family: str, tmp_path: Path) -> None:
    value = contract(family, tmp_path)
    assert render(value["template"], value) == [one["text"] for one in value["prompts"]]


def test_the_first_token_that_differs_is_named(tmp_path: Path) -> None:
    template = contract("qwen 2.5", tmp_path)["template"]
    (tmp_path / "same.jinja").write_text(template)
    (tmp_path / "other.jinja").write_text(template.replace("<|im_start|>assistant", "<|im_start|>bot"))
    (tmp_path / "adapter").mkdir()
    assert compare_template(tmp_path / "adapter", tmp_path / "same.jinja")["first"] is None
    report = compare_template(tmp_path, tmp_path / "other.jinja")
    assert (report["same"], report["prompts"]) == (0, 2)
    first = report["first"]
    assert (first["prompt"], first["trained"], first["other"]) == (0, "assist", "bot\n")


@pytest.mark.parametrize("base", ["9" * 5000, "a\0b"])
def test_a_base_whose_name_is_no_path_is_not_looked_up(base: str, tmp_path: Path) -> None:
    value = contract("qwen 2.5", tmp_path)
    (tmp_path / "other.jinja").write_text(value["template"].replace("<|im_start|>assistant", "<|im_start|>bot"))
    (tmp_path / "template.json").write_text(json.dumps(value | {"base": base}))
    assert compare_template(tmp_path, tmp_path / "other.jinja")["first"]["prompt"] == 0


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}", "takes more than|fails"),
        ("{{ 'x' * 10**10 }}", "memory|fails"),
        ("{{ 'x' * 10**7 }}", "fails .*1,000,000 characters"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails"),
        ("{{ raise_exception('no system') }}", "fails .*no system"),
    ],
)
def test_a_hostile_template_ends_in_one_line(template: str, why: str, tmp_path: Path) -> None:
    value, started = contract("zephyr", tmp_path), time.monotonic()
    with pytest.raises(DataError, match=why) as raised:
        render(template, value)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("content", ["", "[]", '{"prompts": [{}]}'])
def test_a_damaged_contract_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "template.json").write_text(content)
    (tmp_path / "a.jinja").write_text("")
    with pytest.raises(DataError, match=r"template\.json is damaged"):
        compare_template(tmp_path, tmp_path / "a.jinja")


@pytest.mark.parametrize(("content", "why"), [(None, "No such file"), (b"\xff\xfe", "no UTF-8")])
def test_a_template_that_is_no_text_is_named(content: bytes | None, why: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.jinja").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jinja cannot be read \({why}.*\); name a text file"):
        read_template(tmp_path / "a.jinja")
