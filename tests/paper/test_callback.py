import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._dynamo
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import BertConfig, BertForTokenClassification, TrainerCallback, get_scheduler

import tsqlora as tsq
from loops import weights
from models import lora
from scoring import assert_same, logits_of, quality_by
from slotted import assert_hidden_are_zero
from stock import VOCAB, At, base_bert, make_trainer, moods, slotted_bert, stops_at
from tsqlora import paper
from tsqlora.paper import loop as mover
from tsqlora.paper import probe
from tsqlora.paper.moves import RankEvent
from tsqlora.paper.slots import ActivePrefix, find_slots
from tsqlora.tasks import Classification

ROWS = moods(40)
MOVING: dict[str, Any] = {"interval": 4, "schedule": paper.RankSchedule(moves=6)}


def run(folder: Path, *callbacks: TrainerCallback, model: Any = None, data: Any = ROWS, **further: Any) -> Any:
    """30 steps, 5 an epoch; with an interval of 4 ranks are adjusted after 4, 8, 12, 16 and 20."""
    trained = slotted_bert() if model is None else model
    make_trainer(trained, data, folder, list(callbacks), **({"learning_rate": 0.02} | further)).train()
    return trained


def shapes() -> dict[str, tuple[int, int]]:
    return {name: slots.shape for name, slots in find_slots(slotted_bert()).items()}


def assert_well_spent(event: RankEvent) -> None:
    """Within the budget, and what is left buys no rank where one may be had."""
    costs = {name: sum(shape) for name, shape in shapes().items()}
    assert event.used == sum(rank * costs[name] for name, rank in event.ranks.items())
    below = [costs[name] for name, rank in event.ranks.items() if rank < min(8, *shapes()[name])]
    assert 0 <= event.budget - event.used < min(below, default=1)


def assert_no_hooks(model: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._state_dict_hooks
        assert not module._load_state_dict_pre_hooks


# --- what it does -------------------------------------------------------------------------


def test_ranks_of_a_peft_model_move_within_the_budget_and_plain_peft_loads_every_checkpoint(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    model: Any = get_peft_model(base_bert(), config)
    original, untouched = copy.deepcopy(config), weights(model)
    saved: dict[int, dict[str, Tensor]] = {}
    keep = At("save", lambda state, _, more: saved.update({state.global_step: weights(more["model"])}))
    callback, options = paper.RankCallback(**MOVING), {"save_strategy": "steps", "save_steps": 9}
    trainer = make_trainer(model, ROWS, tmp_path, [callback, keep], learning_rate=0.02, **options)
    assert_same(untouched, weights(model), "before training")
    assert {slots.capacity for slots in find_slots(model).values()} == {8}
    trainer.train()
    steps = [(event.step, event.reason) for event in callback.events]
    assert steps == [(step, "adjustment") for step in (4, 8, 12, 16, 20)]
    for event in callback.events:
        assert_well_spent(event)
        assert sum(event.sensitivity.values()) == pytest.approx(1)
        assert event.budget == sum(4 * sum(shape) for shape in shapes().values())
    assert callback.events[0].moved > 0
    assert len(set(callback.final.values())) > 1
    assert callback.final == callback.events[-1].ranks
    assert callback.seconds > 0
    assert not any(isinstance(module, ActivePrefix) for module in model.modules())
    assert_no_hooks(model)
    assert config == original  # other models may have it, too
    assert model.peft_config["default"].rank_pattern
    model.save_pretrained(tmp_path / "checkpoint-0")
    assert sorted(saved) == [9, 18, 27, 30]
    for step, expected in (saved | {0: weights(model)}).items():
        loaded = PeftModel.from_pretrained(base_bert(), str(tmp_path / f"checkpoint-{step}"))
        assert_same(expected, weights(loaded), f"checkpoint {step}")


def test_a_layer_may_lose_its_adapter_where_min_rank_is_zero_and_other_adapters_are_left_alone(tmp_path: Path) -> None:
    def wide_only(a: Tensor, b: Tensor, layer: Any) -> Tensor:
        return torch.tensor(1.0 if 16 in (layer.in_features, layer.out_features) else 0.0)

    model = slotted_bert(mean_rank=2, max_rank=8)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            nn.init.normal_(parameter)

    def others_logits() -> Tensor:
        model.set_adapter("other")
        logits = logits_of(model.eval(), ROWS[:1])
        model.set_adapter("default")
        return logits

    before, callback = others_logits(), paper.RankCallback(interval=4, min_rank=0)
    moved = patch.object(mover, "moved_towards", lambda target, _ranks, **_: target)
    with moved, patch.object(probe, "sampled", wide_only):
        run(tmp_path, callback, model=model)
    gone = [name for name, rank in callback.final.items() if rank == 0]
    assert gone
    assert all("default" not in model.get_base_model().get_submodule(name).lora_A for name in gone)
    assert torch.equal(others_logits(), before)


# --- what it measures ---------------------------------------------------------------------


def test_first_ranks_come_from_the_quality_sample_by_the_loss_that_is_trained_on(tmp_path: Path) -> None:
    task = Classification(class_weights=torch.tensor([1.0, 3.0]))
    data = tsq.QualitySubset(ROWS, 0.8, seed=1)
    ranks = paper.RankCallback(interval=2, samples=16, schedule=paper.RankSchedule(moves=3, freeze=0.1))
    options: dict[str, Any] = {"learning_rate": 0.05, "num_train_epochs": 4, "gradient_accumulation_steps": 2}
    options |= {"bf16": True, "activation_checkpointing": True}
    trainer = make_trainer(
        slotted_bert(), data, tmp_path, [quality_by(data, reference=40, task=task), ranks], **options
    )
    with patch.object(paper.RankLoop, "start", autospec=True, side_effect=paper.RankLoop.start) as start:
        trainer.train()
    assert start.call_args.kwargs["task"] is task
    assert data.scores is not None
    assert ranks.events[0].reason == "start"
    assert len(ranks.events) > 1
    for event in ranks.events:
        assert_well_spent(event)


def active_slots(kwargs: dict[str, Any]) -> dict[str, list[bytes]]:
    """Each active slot of each layer: the bits of its weights and of what the optimizer keeps for them."""
    result: dict[str, list[bytes]] = {}
    for name, slots in find_slots(kwargs["model"]).items():
        columns: list[Tensor] = []
        for parameter, dim in slots.matrices():
            state = kwargs["optimizer"].state[parameter].values()
            retained = [value for value in state if getattr(value, "shape", ()) == parameter.shape]
            columns += [tensor.detach().movedim(dim, 0) for tensor in (parameter, *retained)]
        result[name] = [b"".join(c[j].contiguous().numpy().tobytes() for c in columns) for j in range(slots.rank)]
    return result


class Around:
    """A callback between two that see that its changes leave every slot alone that stays, and hidden ones zero."""

    def __init__(self) -> None:
        self.before: dict[str, list[bytes]] = {}

    def callbacks(self, callback: TrainerCallback) -> list[TrainerCallback]:
        return [At("step_end", self._note), callback, At("step_end", self._compare)]

    def _note(self, _state: Any, _control: Any, kwargs: dict[str, Any]) -> None:
        self.before = active_slots(kwargs)

    def _compare(self, _state: Any, _control: Any, kwargs: dict[str, Any]) -> None:
        assert_hidden_are_zero(kwargs["model"], kwargs["optimizer"])
        for name, now in active_slots(kwargs).items():
            retained = [slot for slot in now if slot in self.before[name]]
            assert len(retained) == min(len(now), len(self.before[name])), name


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    """A rate for A and the head, another with weight decay for B."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["lora_B" in name].append(parameter)
    of_b = {"params": groups[True], "lr": 0.04, "weight_decay": 0.3}
    return torch.optim.AdamW([{"params": groups[False]}, of_b], lr=0.02)


@pytest.mark.parametrize(
    "further",
    [
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "max_grad_norm": 0.1,
            "weight_decay": 0.3,
            "label_smoothing_factor": 0.2,
        },
        {"bf16": True, "activation_checkpointing": True},
        {"fp16": True},
        {
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "learning_rate": 0.1,
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "eval_strategy": "epoch",
            "metric_for_best_model": "loss",
        },
    ],
    ids=lambda further: next(iter(further)),
)
def test_ranks_move_and_kept_slots_do_not_in_whatever_way_the_trainer_trains(
    tmp_path: Path, further: dict[str, Any]
) -> None:
    callback = paper.RankCallback(**MOVING)
    run(tmp_path, *Around().callbacks(callback), evaluate_on=ROWS[:8], max_steps=15, **further)
    assert [event.step for event in callback.events] == [4, 8]
    assert sum(event.moved for event in callback.events) > 0
    for event in callback.events:
        assert_well_spent(event)


def test_groups_of_parameters_keep_their_schedules(tmp_path: Path) -> None:
    model, callback = slotted_bert(), paper.RankCallback(**MOVING)
    rates: list[list[float]] = []
    note = At("step_end", lambda _, __, more: rates.append([group["lr"] for group in more["optimizer"].param_groups]))
    options = {"lr_scheduler_type": "cosine", "warmup_steps": 5, "optimizers": (two_groups(model), None)}
    options["max_steps"] = 15
    run(tmp_path, note, *Around().callbacks(callback), model=model, **options)
    assert sum(event.moved for event in callback.events) > 0
    alone = two_groups(slotted_bert())
    schedule = get_scheduler("cosine", alone, 5, 15)
    for now in rates:
        alone.step()
        schedule.step()
        assert now == schedule.get_last_lr()
    assert len({tuple(each) for each in rates}) > 10


# --- where it is added --------------------------------------------------------------------


def test_a_training_that_starts_again_with_smaller_batches_starts_anew(tmp_path: Path) -> None:
    def full(state: Any, *_: Any) -> None:
        if state.train_batch_size == 8 and state.global_step == 3:
            assert any(module._forward_hooks for module in model.modules())
            raise RuntimeError("CUDA out of memory.")

    def look(state: Any, *_: Any) -> None:
        if state.global_step == 0:
            assert not any(module._forward_hooks for module in model.modules())

    callback, model = paper.RankCallback(**MOVING), slotted_bert()
    compiles = torch._dynamo.config.recompile_limit
    before = [At("step_begin", look), At("pre_optimizer_step", full)]
    run(tmp_path, *before, callback, model=model, auto_find_batch_size=True, num_train_epochs=3)
    assert [event.step for event in callback.events][:2] == [4, 8]
    assert len(callback.events) > 2  # of smaller batches there are more steps
    assert_no_hooks(model)
    assert torch._dynamo.config.recompile_limit == compiles


def test_a_run_goes_on_for_more_epochs_at_the_interval_that_it_had(tmp_path: Path) -> None:
    def trainer(epochs: int, last: int) -> tuple[Any, paper.RankCallback]:
        callback = paper.RankCallback()
        options = {"save_strategy": "steps", "save_steps": 10, "num_train_epochs": epochs}
        return make_trainer(slotted_bert(), ROWS, tmp_path, [callback, stops_at(last)], **options), callback

    trainer(20, 10)[0].train()
    longer, callback = trainer(60, 31)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert callback.loop is not None
    assert callback.loop.interval == 10
    assert [event.step for event in callback.events] == [10, 30]


class Counted(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(ROWS)

    def __len__(self) -> int:
        return len(ROWS)


def test_ranks_move_on_a_stream_that_knows_its_length(tmp_path: Path) -> None:
    ranks = paper.RankCallback(interval=2)
    run(tmp_path, ranks, data=Counted(), max_steps=6, train_sampling_strategy="random")
    assert ranks.final


# --- what it refuses ----------------------------------------------------------------------


def test_settings_that_cannot_be_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(tsq.SettingsError, match="samples is 0; it must be a whole number of rows, at least 1"):
        paper.RankCallback(samples=0)

    def begin(model: Any) -> None:
        make_trainer(model, ROWS, tmp_path, [paper.RankCallback(interval=4, max_rank=6)])

    model = lora(base_bert(), r=4)
    begin(model)
    assert {slots.capacity for slots in find_slots(model).values()} == {6}
    with pytest.raises(tsq.UnsupportedError, match=r"no rank slots.*make it with tsqlora\.paper\.wrap"):
        begin(base_bert())
    with pytest.raises(tsq.SettingsError, match=r"has its slots already; give max_rank to tsqlora\.paper\.wrap"):
        begin(slotted_bert())


def test_ranks_move_where_labels_are_tags(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = paper.wrap(BertForTokenClassification(BertConfig(vocab_size=VOCAB, num_labels=2, **sizes)), mean_rank=2)
    rows = [{name: values[:4] for name, values in row.items() if name != "labels"} for row in ROWS]
    callback = paper.RankCallback(interval=4)
    labelled = [row | {"labels": [int(token > 19) for token in row["input_ids"]]} for row in rows]
    run(tmp_path, callback, model=model, data=labelled, num_train_epochs=3)
    assert {event.reason for event in callback.events} == {"start", "adjustment"}
