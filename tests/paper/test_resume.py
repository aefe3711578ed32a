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
    """Six epochs of four steps; looks come before the first and the third, ranks with the first."""
    subset = tsq.QualitySubset(DATA, 0.5, seed=0)
    quality = quality_by(subset, reference=40, weights={"loss": -1.0})
    ranks = paper.RankCallback(interval=interval, samples=16, schedule=paper.RankSchedule(moves=3, freeze=0.2))
    model = slotted_bert(max_rank=max_rank)
    options = {"save_strategy": "epoch", "learning_rate": 0.03} | further
    return make_trainer(model, subset, folder, [quality, ranks, *also], **options)


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


STEPS = {1: (1, 8, 9, 24), 3: (4, 5, 11)}
"""From which a run is resumed, the last one of all included, by batches a step. Three of an epoch's four batches make a
step, and the last one alone another."""


def saved_at_every_step(folder: Path, accumulation: int) -> Trainer:
    made = trainer(folder, save_steps=1, **every_step(accumulation))
    made.train()
    events = callback(made, paper.RankCallback).events
    assert [event.reason for event in events[:2]] == ["start", "adjustment"]
    assert any(event.moved for event in events)
    assert [look["epoch"] for look in callback(made, tsq.QualityCallback).looks] == [0, 2]
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Trainer]:
    """Runs that were saved at every step, by batches a step."""
    return {number: saved_at_every_step(tmp_path_factory.mktemp("saved"), number) for number in STEPS}


def every_step(accumulation: int) -> dict[str, Any]:
    return {"save_strategy": "steps", "gradient_accumulation_steps": accumulation}


@pytest.mark.parametrize("accumulation", STEPS)
def test_a_run_resumed_at_any_step_ends_as_if_it_had_never_stopped(
    accumulation: int, saved: dict[int, Trainer]
) -> None:
    """Before the second look, where it comes, behind it; at steps of adjustments; within epochs; behind the last."""
    folder = Path(saved[accumulation].args.output_dir)
    for step in STEPS[accumulation]:
        resumed = trainer(folder, save_steps=100, **every_step(accumulation))
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert_same_end(resumed, saved[accumulation])


@pytest.mark.parametrize("again", ["in the same Trainer", "in a new process"])
def test_a_run_that_crashed_inside_a_window_ends_the_same(
    again: str, saved: dict[int, Trainer], tmp_path: Path
) -> None:
    # The odd steps have three batches.
    step = next(event.step for event in callback(saved[3], paper.RankCallback).events[1:] if event.step % 2)
    # In the step of an adjustment, whose sensitivities are then half measured.
    crash = fails_at("substep_end", step - 1, Interrupted)
    made = trainer(tmp_path, crash, save_steps=2, **every_step(3))
    with pytest.raises(Interrupted):
        made.train()
    if again == "in a new process":
        made = trainer(tmp_path, save_steps=2, **every_step(3))
    made.train(resume_from_checkpoint=str(tsq.last_checkpoint(tmp_path)))
    assert_same_end(made, saved[3])


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
def test_a_run_is_not_resumed_with_other_settings(options: dict[str, int], saved: dict[int, Trainer]) -> None:
    folder = Path(saved[1].args.output_dir)
    with pytest.raises(tsq.TsqLoraError, match=r"interval 3, and .* has 4|max 8, and .* has 6|larger max_rank"):
        trainer(folder, **options).train(resume_from_checkpoint=str(folder / "checkpoint-16"))


def test_scores_of_an_older_run_in_the_same_place_are_not_used(saved: dict[int, Trainer], tmp_path: Path) -> None:
    folder = Path(saved[1].args.output_dir)
    shutil.copytree(folder / "checkpoint-8", tmp_path / "checkpoint-8")
    scores = Scores.load(folder / "scores.parquet")
    replace(scores, quality=np.arange(len(DATA), dtype=float)).save(tmp_path / "scores.parquet")
    resumed = trainer(tmp_path, stops_at(9))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    used, expected = (callback(made, tsq.QualityCallback).data.scores for made in (resumed, saved[1]))
    assert np.array_equal(used.quality, expected.quality)


@pytest.mark.parametrize(("name", "version"), [("tsqlora", None), ("tsqlora_quality", STATE_VERSION - 1)])
def test_a_state_that_is_missing_or_of_another_version_is_named(
    name: str, version: Any, saved: dict[int, Trainer], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(Path(saved[1].args.output_dir) / "checkpoint-4", checkpoint)
    (checkpoint / f"{name}.json").unlink()
    if version is not None:
        (checkpoint / f"{name}.json").write_text(json.dumps({"version": version}))
    write_manifest(checkpoint)
    with pytest.raises(tsq.TsqLoraError, match=rf"{name}\.json (is missing.*|was written by .*)start"):
        trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
