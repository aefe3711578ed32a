"""YAML for settings: plain values, nothing that runs, nothing that grows without end; problems name their line."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hostile import _multiplied
from tsqlora.libs.yaml import MOST_BYTES, YamlProblem, dump_yaml, load_yaml

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=10,
)


@given(plain)
@example({"?0": None, ":-": None})
def test_what_is_written_is_read_back(value: object) -> None:
    assert load_yaml(dump_yaml(value)) == value
    inline = dump_yaml(value, inline=True)
    assert load_yaml(inline) == value


def test_plain_values_are_those_of_yaml_1_2() -> None:
    text = "a: 5e-4\nb: no\nc: 2026-01-31\nd: 1e3\ne: .inf\nf: ~\ng: =\nh: 0x1F\ni: 12:30\nj: 017\n"
    assert load_yaml(text) == {
        "a": 5e-4,
        "b": "no",
        "c": "2026-01-31",
        "d": 1000.0,
        "e": float("inf"),
        "f": None,
        "g": "=",
        "h": 31,
        "i": "12:30",
        "j": 17,
    }


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "y", "Yes", "NO", "oN"])
def test_only_true_and_false_are_booleans(text: str) -> None:
    assert load_yaml(f"a: {text}") == {"a": text}
    assert load_yaml("[true, True, false, FALSE]") == [True, True, False, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_multiplied("[x, x]", "[%s]"), "line 5: "),
        (_multiplied("{k: 1}", "{<<: [%s]}"), "line 5: "),
        ("a: &a\n  b: *a\n", "line 2: "),
        ("a: " + "[" * 5000 + "]" * 5000, "line 1: "),
        ("- " * 5000, "line 1: "),
        ("a: 9223372036854775808", "line 1: "),
        ("a: 0x" + "f" * 6000, "line 1: "),
        ("a: " + "9" * 6000, "4300 digits"),
        ("a: !!python/object/apply:os.system [ls]", "python/object"),
        ("a: !!bool x", "bool"),
        ("? !!str [a]\n: b\n", "line 1: "),
        ("{a: 1}: b\n", "line 1: "),
        ("a: 1\na: 2\n", "line 2: the key 'a' comes twice"),
        ("b: {a: 1}\nc:\n  a: 1\n  'a': 2\n", "line 4: the key 'a' comes twice"),
        ('"\\ud800": 1', "line 1: "),
        ('a: "\\UFFFFFFFF"', ""),
        ("a: [", "line 1: "),
        ("a: \0", "unacceptable character"),
        (b"a: \xff", "UTF-8"),
        ("#" * (MOST_BYTES + 1), f"{MOST_BYTES:,} bytes"),
    ],
)
def test_hostile_text_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(YamlProblem) as refused:
        load_yaml(text)
    assert message in str(refused.value)


def test_aliases_that_stay_small_are_fine() -> None:
    assert load_yaml("a: &a {b: 1}\nc: *a\nd: {<<: *a, b: 2, e: 2}\n") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 2, "e": 2},
    }
