"""Where ranks cannot move, training goes on: ranks are set once where that is exact, and rows are chosen."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

import tsqlora as tsq
from stock import At, base_bert, make_trainer, moods, slotted_bert
from tsqlora import paper
from tsqlora.paper.slots import has_slots
from tsqlora.record import RunRecord

ROWS = moods()


def lora(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value", "dense"], **options)
    model = get_peft_model(base_bert(), config)
    assert isinstance(model, PeftModel)
    return model


def ready(folder: Path) -> PeftModel:
    """A model with slots that is not at chance, so that its sensitivities say something."""
    model = slotted_bert()
    callback = paper.RankCallback(schedule=paper.RankSchedule(gamma=0), finalize=False)
    make_trainer(model, ROWS, folder / "before", [callback], num_train_epochs=2).train()
    return model


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_an_optimizer_that_slots_cannot_follow_trains_plain_lora_of_ranks_set_once_also_when_resumed(
    tmp_path: Path,
) -> None:
    args = {"optim": "adafactor", "num_train_epochs": 2}
    saves = args | {"save_strategy": "steps", "save_steps": 8}
    model, first, ranks = ready(tmp_path), list[PeftModel](), paper.RankCallback(interval=2)
    note = At("step_begin", lambda state, _, more: state.global_step or first.append(copy.deepcopy(more["model"])))
    with pytest.warns(UserWarning, match="do not move"):
        make_trainer(model, ROWS, tmp_path, [ranks, note], **saves).train()
    assert [event.reason for event in ranks.events] == ["start"]
    assert len(set(ranks.final.values())) > 1
    (twin,) = first
    assert not has_slots(twin)
    # As plain LoRA from the same weights, which has never known of slots.
    make_trainer(twin, ROWS, tmp_path / "twin", [], **args).train()
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=0)
    again = make_trainer(slotted_bert(), ROWS, tmp_path, [resumed := paper.RankCallback(interval=2)], **saves)
    with pytest.warns(UserWarning, match="do not move"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    torch.testing.assert_close(weights(model), weights(again.model), rtol=0, atol=0)
    assert resumed.final == ranks.final


def test_an_adapter_that_has_no_slots_keeps_its_ranks_and_rows_are_chosen(tmp_path: Path) -> None:
    data = tsq.QualitySubset(ROWS, 0.5, seed=0)
    quality, ranks = tsq.QualityCallback(data), paper.RankCallback(interval=2)
    args = {"num_train_epochs": 1, "save_strategy": "epoch"}
    trainer = make_trainer(lora(use_dora=True), data, tmp_path, [quality, ranks], **args)
    with pytest.warns(UserWarning, match="ranks stay as they are"):
        trainer.train()
    assert (ranks.events, ranks.final) == ([], {})
    assert quality.looks
    assert any("stay as they are" in note for note in RunRecord.load(tmp_path).notes)
    assert tsq.last_checkpoint(tmp_path) is not None


def test_several_gpus_in_one_process_choose_rows_and_set_ranks_once(tmp_path: Path) -> None:
    data = tsq.QualitySubset(ROWS, 0.5, seed=0)
    quality, ranks = tsq.QualityCallback(data), paper.RankCallback(interval=2)
    trainer = make_trainer(slotted_bert(), data, tmp_path, [quality, ranks], num_train_epochs=1)
    trainer.args._n_gpu = 2  # the Trainer wraps the model in DataParallel, which without GPUs calls it as it is
    with pytest.warns(UserWarning, match="2 GPUs in one process"):
        trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.DataParallel)
    assert [event.reason for event in ranks.events] == ["start"]
    assert data.scores is not None


def test_a_callback_that_comes_when_the_optimizer_is_made_leaves_ranks_as_they_are(tmp_path: Path) -> None:
    trainer = make_trainer(lora(), ROWS, tmp_path, [], max_steps=1)
    trainer.add_callback(paper.RankCallback(interval=4))
    with pytest.warns(UserWarning, match="no rank slots"):
        trainer.train()


# ------------------------------------------------------------------ the same callbacks in more than one training


def test_a_second_train_goes_on_and_moves_ranks_where_slots_were_kept_and_else_keeps_them(tmp_path: Path) -> None:
    data, ranks = tsq.QualitySubset(ROWS, 0.5, seed=0), paper.RankCallback(interval=2, finalize=False)
    trainer = make_trainer(slotted_bert(), data, tmp_path, [tsq.QualityCallback(data), ranks], num_train_epochs=2)
    trainer.train()
    first, ranks.finalize = ranks.events, True
    trainer.train()
    assert ranks.events
    assert ranks.events is not first
    assert RunRecord.load(tmp_path).rank_events == ranks.events
    shapes = {name: p.shape for name, p in weights(trainer.model).items()}
    with pytest.warns(UserWarning, match=r"a second train\(\)"):
        trainer.train()
    assert {name: p.shape for name, p in weights(trainer.model).items()} == shapes


def test_each_model_of_model_init_begins_anew_as_in_a_search(tmp_path: Path) -> None:
    data, ranks = tsq.QualitySubset(ROWS, 0.5, seed=0), paper.RankCallback(interval=2)
    passed = make_trainer(slotted_bert(), data, tmp_path, [], num_train_epochs=1)
    trainer = Trainer(
        model_init=lambda: slotted_bert(),
        args=passed.args,
        train_dataset=data,
        data_collator=passed.data_collator,
        callbacks=[tsq.QualityCallback(data), ranks],
    )
    result = []
    for rate in (0.03, 0.01, 0.03):
        trainer.args.learning_rate = rate  # what a backend does between two trials; none is installed
        trainer.train()
        result.append(
            (weights(trainer.model)["base_model.model.classifier.modules_to_save.default.weight"], ranks.final)
        )
        assert RunRecord.load(tmp_path).settings["training"]["learning_rate"] == rate
    assert torch.equal(result[0][0], result[2][0])
    assert result[0][1] == result[2][1]
    assert not torch.equal(result[0][0], result[1][0])
