"""Tensors without torch are those that torch reads and writes, to the bit, whatever their precision."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from tsqlora.adapter.tensors import PRECISIONS, Stored, read_tensors, store, to_bytes
from tsqlora.adapter.verify import NAMES

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
OTHERS = (torch.int64, torch.int8, torch.uint8, torch.bool)


def test_a_file_is_read_and_written_as_torch_does(tmp_path: Path) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in (*NAMES, *OTHERS)}
    tensors |= {str(dtype): bits.clone().view(dtype) for dtype in FLOAT8}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "x")
    stored = read_tensors(tmp_path / "x")
    assert list(stored) == sorted(tensors), "safetensors has them in another order every time"
    for name, tensor in tensors.items():
        wide = tensor.double() if tensor.is_floating_point() else tensor
        np.testing.assert_array_equal(stored[name].numbers(), wide.numpy(), strict=False)
    again = load(to_bytes(stored))
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (again[name].dtype, again[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(again[name].untyped_storage()) == bytes(tensor.untyped_storage())


@given(st.lists(st.floats(width=64), min_size=1), st.sampled_from(sorted(PRECISIONS)))
def test_numbers_are_rounded_as_torch_rounds_them(numbers: list[float], name: str) -> None:
    (dtype,) = (dtype for dtype, precision in NAMES.items() if precision == name)
    theirs = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    mine = load(to_bytes({"x": store(np.array(numbers), name)}))["x"]
    assert mine.dtype == dtype
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("raw", "dtype"), [(np.array([70000, 2049]), "I64"), (np.array([True, False]), "BOOL")])
def test_integers_are_not_rounded_to_a_float_precision(raw: np.ndarray, dtype: str) -> None:
    again = Stored(raw, dtype).to("F16")
    assert again.dtype == dtype
    np.testing.assert_array_equal(again.raw, raw, strict=True)


@pytest.mark.parametrize("dtype", NAMES)
def test_precisions_are_torchs(dtype: torch.dtype) -> None:
    precision, theirs = PRECISIONS[NAMES[dtype]], torch.finfo(dtype)
    assert (precision.eps, precision.least) == (theirs.eps, theirs.tiny * theirs.eps)
