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
        r"^another of the 2 processes has ended or does not answer \(see its message\), so this one ends too; go on$"
        if message
        else rf"^{re.escape(output)}$"
    )
    with pytest.raises(TsqLoraError if message else RuntimeError, match=words), distributed.explain_lost_peer("go on"):
        raise RuntimeError(output)


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True"}, True),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True", "WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "127.0.0.1"}, False),
        ({}, False),
    ],
)
def test_accelerates_launcher_on_cpu_that_starts_one_process_is_warned_of(
    names: dict[str, str], warned: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    for name in ("MASTER_ADDR", "ACCELERATE_USE_CPU", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    distributed.warn_of_one_process()
    assert ["torchrun" in str(each.message) for each in recwarn] == [True] * warned


def test_the_engine_that_shards_is_the_launchers_or_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.sharding({}) is None
    assert distributed.sharding({"deepspeed": "zero3.json"}) == "DeepSpeed"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert distributed.sharding({}) == "FSDP"
