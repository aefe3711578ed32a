import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback

import tsqlora as tsq
from scoring import quality_by
from stock import Falling, base_bert, fails_at, make_trainer, moods, slotted_bert, stops_at
from tsqlora import paper
from tsqlora.auditing.scores import Scores
from tsqlora.training.checkpoints import STATE_VERSION, write_manifest

DATA = moods()


class Interrupted(Exception):
    pass


def trainer(folder: Path, *also: TrainerCallback, max_rank: int = 8, interval: int = 3, **further: Any) -> Trainer:
    """Six epochs of four batches, of which three make a step, and the last one alone another.

    Looks come before the first and the third epoch, ranks with the first; every step is saved.
    """
    subset = tsq.QualitySubset(DATA, 0.5, seed=0)
    quality = quality_by(subset, reference=40, weights={"loss": -1.0})
    ranks = paper.RankCallback(interval=interval, samples=16, schedule=paper.RankSchedule(moves=3, freeze=0.2))
    options = {"gradient_accumulation_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.03}
    return make_trainer(slotted_bert(max_rank=max_rank), subset, folder, [quality, ranks, *also], **options | further)


def callback(of: Trainer, kind: type) -> Any:
    return next(c for c in of.callback_handler.callbacks if isinstance(c, kind))


def assert_same_end(resumed: Trainer, whole: Trainer) -> None:
    """Bit by bit."""
    ranks, expected = (callback(made, paper.RankCallback) for made in (resumed, whole))
    assert ranks.events == expected.events
    assert ranks.final == expected.final
    left, right = (made.model.state_dict() for made in (resumed, whole))
    assert left.keys() == right.keys()
    for name, weight in left.items():
        assert torch.equal(weight, right[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    made = trainer(tmp_path_factory.mktemp("whole"))
    made.train()
    events = callback(made, paper.RankCallback).events
    assert [(event.step, event.reason) for event in events[:2]] == [(0, "start"), (3, "adjustment")]
    assert any(event.moved for event in events)
    assert [look["epoch"] for look in callback(made, tsq.QualityCallback).looks] == [0, 2]
    return made


@pytest.mark.parametrize("step", [3, 4, 5, 12])
def test_a_run_resumed_at_any_step_ends_as_if_it_had_never_stopped(step: int, whole: Trainer) -> None:
    """Before the second look, where it comes, behind it; at a step of an adjustment; within epochs; behind the last."""
    resumed = trainer(Path(whole.args.output_dir), save_steps=100)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / f"checkpoint-{step}"))
    assert_same_end(resumed, whole)


def test_a_run_that_crashed_inside_a_window_ends_the_same_in_the_same_trainer(whole: Trainer, tmp_path: Path) -> None:
    # In the step of an adjustment, whose sensitivities are then half measured.
    made = trainer(tmp_path, fails_at("substep_end", 2, Interrupted))
    with pytest.raises(Interrupted):
        made.train()
    made.train(resume_from_checkpoint=str(tsq.last_checkpoint(tmp_path)))
    assert_same_end(made, whole)


def best_of_falling(folder: Path) -> Trainer:
    return make_trainer(
        slotted_bert(),
        DATA,
        folder,
        [paper.RankCallback(interval=3, schedule=paper.RankSchedule(moves=3))],
        num_train_epochs=4,
        save_strategy="epoch",
        load_best_model_at_end=True,
        eval_strategy="epoch",
        metric_for_best_model="falling",
        evaluate_on=DATA[:16],
        compute_metrics=Falling(),
    )


def test_the_best_checkpoint_is_loaded_with_its_ranks_after_a_resume_too(tmp_path: Path) -> None:
    made = best_of_falling(tmp_path)
    made.train()
    ranks = callback(made, paper.RankCallback)
    best = Path(made.state.best_model_checkpoint)  # type: ignore[arg-type]
    assert best.name == "checkpoint-8"
    assert ranks.final == next(event for event in reversed(ranks.events) if event.step <= 8).ranks
    assert ranks.final != ranks.events[-1].ranks
    plain = PeftModel.from_pretrained(base_bert(), str(best)).eval()
    batch = made.data_collator(DATA[:8])
    assert torch.equal(plain(**batch).logits, made.model.eval()(**batch).logits)
    resumed = best_of_falling(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    assert_same_end(resumed, made)


@pytest.mark.parametrize("options", [{"max_rank": 6}, {"interval": 4}])
def test_a_run_is_not_resumed_with_other_settings(options: dict[str, int], whole: Trainer) -> None:
    folder = Path(whole.args.output_dir)
    with pytest.raises(tsq.TsqLoraError, match=r"interval 3, and .* has 4|max 8, and .* has 6|larger max_rank"):
        trainer(folder, **options).train(resume_from_checkpoint=str(folder / "checkpoint-8"))


def test_scores_of_an_older_run_in_the_same_place_are_not_used(whole: Trainer, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):  # behind the checkpoint, and behind the second look
        trainer(tmp_path, fails_at("step_begin", 4, Interrupted), save_strategy="epoch").train()
    scores = Scores.load(tmp_path / "scores.parquet")
    replace(scores, quality=np.arange(len(DATA), dtype=float)).save(tmp_path / "scores.parquet")
    resumed = trainer(tmp_path, stops_at(5))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    used, expected = (callback(made, tsq.QualityCallback).data.scores for made in (resumed, whole))
    assert np.array_equal(used.quality, expected.quality)


@pytest.mark.parametrize(("name", "version"), [("tsqlora", None), ("tsqlora_quality", STATE_VERSION - 1)])
def test_a_state_that_is_missing_or_of_another_version_is_named(
    name: str, version: Any, whole: Trainer, tmp_path: Path
) -> None:
    folder, checkpoint = Path(whole.args.output_dir), tmp_path / "checkpoint-12"
    shutil.copytree(folder / "checkpoint-12", checkpoint)
    shutil.copy(folder / "scores.parquet", tmp_path)
    (checkpoint / f"{name}.json").unlink()
    if version is not None:
        (checkpoint / f"{name}.json").write_text(json.dumps({"version": version}))
    write_manifest(checkpoint)
    with pytest.raises(tsq.TsqLoraError, match=rf"{name}\.json (is missing.*|was written by .*)start"):
        trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
