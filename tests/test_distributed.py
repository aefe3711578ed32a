import torch

from tsqlora import distributed


def test_one_process_is_alone_with_its_values() -> None:
    """Two processes are in adapter/test_change.py."""
    values = torch.arange(3.0)
    assert not distributed.active()
    assert distributed.is_first()
    assert distributed.summed(values) is values
    assert distributed.from_first(values) is values
