"""A look that was taken before is not taken again; another model, other rows or another rule are looked at."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

import tsqlora as tsq
from models import collate, samples, tiny_bert
from tsqlora.quality import look_cache
from tsqlora.quality.passes import identity_of
from tsqlora.quality.rule import LookRequest, RowNames, ScoringRule
from tsqlora.quality.trusted import Trusted
from tsqlora.tasks import get_task

TASK = get_task("sequence-classification")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    monkeypatch.setenv("TSQLORA_CACHE", str(tmp_path))
    taken: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        return look(*args, **kwargs)

    look = look_cache.look
    monkeypatch.setattr(look_cache, "look", counted)
    return taken


def rows(n: int = 90) -> list[dict[str, Any]]:
    result = samples(n, 3)
    for row in result:
        row["input_ids"][: len(row["input_ids"]) // 2 + 1] = [10 + row["labels"]] * (len(row["input_ids"]) // 2 + 1)
    return result


def once(model: torch.nn.Module, data: Any, **changes: Any) -> Any:
    return look_cache.look_once(model, LookRequest(dataset=data, **{"task": TASK, "collate": collate, **changes}))


def test_the_second_time_gives_the_same_head_and_scores(looks: list[int]) -> None:
    model, data = tsq.wrap(tiny_bert().float(), mean_rank=2), rows()
    again = copy.deepcopy(model)
    first = once(model, data)
    second = once(again, data, fraction=0.25, rows=RowNames(about={"note": "second"}))
    assert len(looks) == 1
    assert first.scores.record.head_start["replaced"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert (second.scores.quality == first.scores.quality).all()
    assert (second.scores.predictions["logits"] == first.scores.predictions["logits"]).all()
    assert second.scores.record.about["note"] == "second"
    assert first.cost == second.cost
    assert first.cost.forward == 90


@pytest.mark.parametrize("other", ["model", "rows", "rule", "trusted", "collator"])
def test_what_decides_a_look_names_it(other: str, looks: list[int]) -> None:
    model, data = tsq.wrap(tiny_bert().float(), mean_rank=2), rows()
    changed, further, changes = copy.deepcopy(model), data, {}
    once(model, data)
    if other == "model":
        with torch.no_grad():
            next(p for p in changed.parameters() if p.requires_grad).view(-1)[0].add_(1e-3)
    if other == "rows":
        further = [*data[:-1], {**data[-1], "labels": 1 - min(1, data[-1]["labels"])}]
    if other == "rule":
        changes = {"rule": ScoringRule(reject=False)}
    if other == "trusted":
        changes = {"trusted": Trusted(data[:10])}
    if other == "collator":  # the same rows, and fewer of their tokens
        changes = {"collate": lambda batch: {n: x[:, :4] if x.dim() > 1 else x for n, x in collate(batch).items()}}
    once(changed, further, **changes)
    assert len(looks) == 2


class Custom(type(TASK)):
    """A task of the user's, whose repr is its address."""

    __repr__ = object.__repr__


def test_a_task_without_a_lasting_description_is_not_cached(looks: list[int]) -> None:
    model, data, task = tsq.wrap(tiny_bert().float(), mean_rank=2), rows(), Custom()
    for _ in range(2):
        once(copy.deepcopy(model), data, task=task)
    assert len(looks) == 2


def test_a_damaged_look_is_taken_again_and_old_ones_go(
    looks: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look_cache, "MOST_LOOKS", 2)
    model = tsq.wrap(tiny_bert().float(), mean_rank=2)
    for n in (30, 40, 50):
        once(copy.deepcopy(model), rows(n))
    (left, right) = sorted((tmp_path / "looks").iterdir())
    for folder in (left, right):
        (folder / "scores.parquet").write_text("")
    once(copy.deepcopy(model), rows(50))
    assert len(looks) == 4


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated:UserWarning")
def test_a_look_at_weights_in_int8_of_torchao_is_cached(looks: list[int]) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    base = tiny_bert().float()
    torchao.quantize_(base.bert.encoder, torchao.Int8WeightOnlyConfig())
    model, data = tsq.wrap(base, mean_rank=2), rows(30)
    names = [look_cache.key_of(model, [], {}) for _ in range(2)]
    identity = identity_of(model, [], [], [], {})
    for _ in range(2):
        once(model, data, rule=ScoringRule(head_start=False))
    assert len(looks) == 1
    assert names[0] == names[1] is not None
    with torch.no_grad():
        next(m for m in model.modules() if "Int8" in type(getattr(m, "weight", None)).__name__).weight.scale.mul_(2)
    assert look_cache.key_of(model, [], {}) != names[0]
    assert identity_of(model, [], [], [], {}) != identity


def changed_config(model: Any) -> None:
    model.config.pad_token_id = 7


def changed_scaling(model: Any) -> None:
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    layer.scaling["default"] *= 2


def changed_adapter(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def changed_class(model: Any) -> None:
    model.base_model.model.dropout = torch.nn.Identity()


@pytest.mark.parametrize("change", [changed_config, changed_scaling, changed_adapter, changed_class])
def test_a_look_is_that_of_one_config_scaling_adapter_and_class(change: Any, looks: list[int]) -> None:
    model = tsq.wrap(tiny_bert().float(), mean_rank=2)
    before = look_cache.key_of(model, [], {})
    assert before == look_cache.key_of(copy.deepcopy(model), [], {}) is not None
    change(model)
    assert look_cache.key_of(model, [], {}) not in (before, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_of_a_frozen_weight_counts(dtype: torch.dtype, looks: list[int]) -> None:
    model = torch.nn.Embedding(4001, 13, dtype=dtype).requires_grad_(requires_grad=False)
    # A view at an odd place of a larger storage, as of a file that was loaded in one piece.
    model.weight = torch.nn.Parameter(torch.randn(4001 * 13 + 1, dtype=dtype)[1:].view(4001, 13), requires_grad=False)
    names = {look_cache.key_of(model, [], {})}
    for row in range(0, 4001, 97):
        with torch.no_grad():
            model.weight[row] += 1
        names.add(look_cache.key_of(model, [], {}))
    assert len(names) == 43
