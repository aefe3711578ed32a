"""YAML for settings: plain values, nothing that runs, nothing that grows without end, everything told with its line."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile import _multiplied
from tsqlora.compat.yaml12 import MOST_BYTES, YamlProblem, dump_yaml, inline_yaml, load_yaml

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=10,
)


@given(plain)
def test_what_is_written_is_read_back(value: object) -> None:
    assert load_yaml(dump_yaml(value)) == value
    assert load_yaml(inline_yaml(value)) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (_multiplied("[x, x]", "[%s]"), "line 5: more than 10,000 values, aliases counted"),
        (_multiplied("{k: 1}", "{<<: [%s]}"), "more than 10,000 values"),
        ("a: &a\n  b: *a\n", "line 2: 'a' stands inside of itself"),
        ("a: " + "[" * 5000 + "]" * 5000, "line 1: nested more than 30 deep"),
        ("- " * 5000, "nested more than 30 deep"),
        ("a: 9223372036854775808", "line 1: a whole number of more than 64 bits"),
        ("a: -9223372036854775809", "line 1: a whole number of more than 64 bits"),
        ("a: 0x" + "f" * 6000, "a whole number of more than 64 bits"),
        ("a: " + "9" * 6000, "Exceeds the limit"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: the tag 'tag:yaml.org,2002:python/object"),
        ("a: !!bool x", "the tag 'tag:yaml.org,2002:bool' is not taken; write the plain value"),
        ("? !!str [a]\n: b\n", "the tag"),
        ("? [a]\n: b\n", "line 1: a key is not text"),
        ("a: 1\na: 2\n", "line 2: key 'a' is there twice"),
        ('"\\ud800": 1', "line 1: half a surrogate pair"),
        ('a: "\\UFFFFFFFF"', "too large"),
        ("a: [", "line 1: expected the node content"),
        ("a: \0", "unacceptable character"),
        ("#" * (MOST_BYTES + 1), "more than 262,144 bytes"),
    ],
)  # fmt: skip
def test_what_is_refused_is_told_at_once(text: str, told: str) -> None:
    start = time.process_time()
    with pytest.raises(YamlProblem) as refused:
        load_yaml(text)
    assert told in str(refused.value)
    assert time.process_time() - start < 1


def test_aliases_that_stay_small_are_fine() -> None:
    assert load_yaml("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}\n") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }
