import re

import pytest
import torch

from tsqlora import distributed
from tsqlora.errors import TsqLoraError


def test_one_process_is_alone_with_its_values() -> None:
    """Two and three processes are in distributed/test_processes.py."""
    values = torch.arange(3.0)
    assert not distributed.active()
    assert distributed.is_first()
    assert distributed.summed(values) is values
    assert distributed.from_first(values) is values
    assert distributed.gathered(values) == [values]
    assert distributed.share(values) is values
    assert distributed.once(lambda: values) is values
    assert distributed.full_tensor(values) is values
    assert not distributed.is_sharded(values)
    distributed.require_same("values", values)


def test_an_error_of_the_only_process_is_that_error() -> None:
    with pytest.raises(ZeroDivisionError):
        distributed.together(lambda: 1 / 0)


def test_what_is_assigned_is_copied_and_itself_is_left() -> None:
    tensor, value = torch.zeros(3), torch.arange(3.0)
    distributed.assign(tensor, value)
    assert torch.equal(tensor, value)
    distributed.assign(tensor, tensor)
    assert torch.equal(tensor, value)


@pytest.mark.parametrize("count", ["1", "3"])
def test_how_many_were_launched_is_what_the_launcher_says(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    assert distributed.launched() == int(count)


def test_a_model_that_is_not_in_another_is_itself() -> None:
    model = torch.nn.Linear(2, 2)
    assert distributed.unwrapped(model) is model


LOST = "[../gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:32711"


@pytest.mark.parametrize(("processes", "output", "message"), [(2, LOST, True), (1, LOST, False), (2, "shapes", False)])
def test_an_exchange_without_its_other_end_is_told_with_advice(
    processes: int, output: str, message: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "active", lambda: processes > 1)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: processes)
    words = (
        r"^another of the 2 processes has ended or does not answer \(see what it said\), so this one ends too; go on$"
        if message
        else rf"^{re.escape(output)}$"
    )
    with pytest.raises(TsqLoraError if message else RuntimeError, match=words), distributed.explain_lost_peer("go on"):
        raise RuntimeError(output)
