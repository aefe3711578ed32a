import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import tsqlora as tsq
from models import tiny_bert
from scoring import assert_same, fingerprint, quality_by
from stock import QUIET, ROWS, VOCAB, At, base_bert, make_trainer, moods, slotted_bert
from tsqlora import paper
from tsqlora.auditing.draw.epochs import EpochPlan
from tsqlora.auditing.labels.judge import Judgement
from tsqlora.auditing.scores import Scores
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.tasks.classification import Classification
from tsqlora.training import quality_callback
from tsqlora.training.checkpoints import write_manifest
from words import llama, tokenizer

DATA = moods()
GRADIENTS = {"convergence": 1 / 3, "gradient_norm": -1 / 3}


def crooked(measured: Any) -> torch.Tensor:
    return measured.loss[:1]


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Every column by the longest; numbers and lists of one length as they are."""
    batch = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        batch[name] = torch.nn.utils.rnn.pad_sequence(values, True) if values[0].dim() else torch.stack(values)
    return batch


def test_text_is_drawn_evenly_and_rows_without_a_token_to_learn_are_named(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7 + j], "labels": [-100, -100, -100 if j < 6 else 7 + j]} for j in range(8)]
    data = tsq.QualitySubset(rows, 0.5, seed=0)
    args = TrainingArguments(str(tmp_path), train_sampling_strategy="sequential", max_steps=1, **QUIET)
    callbacks: list[TrainerCallback] = [tsq.QualityCallback(data)]
    trainer = Trainer(llama(), args, train_dataset=data, callbacks=callbacks, processing_class=tokenizer())
    nothing = r"^nothing_trained: .* \(75% of all rows: 0, 1, 2, …\)"
    with (
        pytest.warns(UserWarning, match="text without trusted rows is drawn evenly"),
        pytest.warns(UserWarning, match=nothing),
    ):
        trainer.train()


UNLEARNED = pytest.mark.filterwarnings("ignore:rows are drawn evenly:UserWarning")
EPOCHS = 5
"""Of half the rows, 4 steps each; the second look comes before step 8."""
SAVES: dict[str, Any] = {"num_train_epochs": EPOCHS, "save_strategy": "steps", "save_steps": 4}
BY_Q: dict[str, Any] = {"weights": GRADIENTS}


def make(
    folder: Path,
    *also: TrainerCallback,
    data: Any = DATA,
    draws: dict[str, Any] | None = None,
    further: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[tsq.QualityCallback, Trainer]:
    subset = tsq.QualitySubset(data, 0.5, **({"seed": 0} | (draws or {})))
    quality = quality_by(subset, **({"reference": 40} | options))
    further = {"num_train_epochs": EPOCHS} | (further or {})
    return quality, make_trainer(slotted_bert(), subset, folder, [*also, quality], **further)


def run(folder: Path, *also: TrainerCallback, **options: Any) -> tuple[tsq.QualityCallback, Trainer]:
    quality, trainer = make(folder, *also, **options)
    trainer.train()
    return quality, trainer


def scores_of(quality: tsq.QualityCallback) -> Scores:
    assert quality.data.scores is not None
    return quality.data.scores


class Watch(TrainerCallback):
    """What each step was trained on, and whether scores were on disk by then."""

    def __init__(self) -> None:
        self.drawn: dict[int, list[int]] = {}
        self.on_disk: dict[int, bool] = {}
        self.waiting: dict[int, bool] = {}
        self.modes: set[bool] = set()
        self.begun: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = fingerprint(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        data = kwargs["train_dataloader"].dataset
        epoch = int(state.epoch + 1e-6)
        self.drawn[epoch] = data.indices.tolist()
        self.on_disk.setdefault(state.global_step, (Path(args.output_dir) / "scores.parquet").exists())
        self.waiting[state.global_step] = data.plan.awaits_scores
        self.modes.add(kwargs["model"].training)


@dataclass
class Done:
    """A run, where it left its files, and what its steps were given."""

    folder: Path
    quality: tsq.QualityCallback
    trainer: Trainer
    watch: Watch


def done(folder: Path, **options: Any) -> Done:
    watch = Watch()
    return Done(folder, *run(folder, watch, **options), watch)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return done(tmp_path_factory.mktemp("even"), further=SAVES)


@pytest.fixture(scope="module")
def by_q(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return done(tmp_path_factory.mktemp("by_q"), about={"note": "by a test"}, **BY_Q)


def test_scores_are_on_disk_before_the_first_step_and_again_after_a_third(by_q: Done) -> None:
    quality, watch = by_q.quality, by_q.watch
    assert all(watch.on_disk.values())
    assert not any(watch.waiting.values())
    assert [(look["epoch"], look["step"]) for look in quality.looks] == [(0, 0), (2, 8)]
    assert [look["head_start"] is not None for look in quality.looks] == [True, False]
    assert (quality.why_not, quality.notes, watch.modes) == (None, [], {True})
    assert quality.record.record.cost["look"].seconds > 0
    first, second = (Scores.load(by_q.folder / name) for name in ("scores-1.parquet", "scores.parquet"))
    assert np.array_equal(second.quality, scores_of(quality).quality)
    records = [(s.record.step, s.record.look, s.record.about["note"]) for s in (first, second)]
    assert records == [(0, 1, "by a test"), (8, 2, "by a test")]
    assert by_q.trainer.state.global_step == 4 * EPOCHS


def test_each_epoch_has_its_own_draw_with_the_classes_of_the_data(by_q: Done) -> None:
    drawn, scores = by_q.watch.drawn, scores_of(by_q.quality)
    assert len({tuple(sorted(rows)) for rows in drawn.values()}) == EPOCHS
    for epoch in (2, 3, 4):
        assert drawn[epoch] == by_q.quality.data.draw(epoch).tolist()
        assert sum(DATA[row]["labels"] for row in drawn[epoch]) == 16
    assert set(scores.terms) == {"gradient_norm", "convergence", "cosine", "loss", "el2n"}
    assert (scores.even, scores.record.weights) == (False, GRADIENTS)
    assert scores.record.eta > 0


def test_without_weights_every_kept_row_is_drawn_as_the_control_draws(even: Done) -> None:
    scores = scores_of(even.quality)
    assert (scores.even, scores.record.noise["evident"], list(scores.terms)) == (True, False, ["loss", "el2n"])
    assert scores.kept.all()
    assert len(even.quality.looks) == 1, "a second could change nothing"
    control = tsq.QualitySubset(DATA, 0.5, seed=0)
    for epoch in range(EPOCHS):
        assert even.quality.data.draw(epoch).tolist() == control.draw(epoch).tolist()


def test_no_label_is_judged_and_no_second_look_taken_where_the_rule_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqlora.auditing.look.judge", lambda *_: pytest.fail("judged"))
    quality, _ = run(tmp_path, judge=False, look_again=False, weights={"loss": -1.0})
    assert scores_of(quality).kept.all()
    assert scores_of(quality).record.noise is None
    assert len(quality.looks) == 1
    assert not (tmp_path / "scores-1.parquet").exists()


def test_labels_are_judged_once_before_the_first_step_and_later_looks_renew_q_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, judgements = np.arange(ROWS) % 8 == 3, []

    def judge(_features: Any, labels: np.ndarray, width: int) -> Judgement:
        p = np.where(wrong, 0.9, 0.0)
        logits, p_true = np.zeros((ROWS, width), dtype=np.float32), np.full((ROWS, width), 0.5)
        judgements.append(Judgement(logits, p_true, p, wrong, np.ones(ROWS, dtype=bool), True, None, 0.12, 0.1, 0.2))
        return judgements[-1]

    monkeypatch.setattr("tsqlora.auditing.look.judge", judge)
    quality, _ = run(tmp_path, watch := Watch(), **BY_Q)
    assert (len(judgements), len(quality.looks)) == (1, 2)
    first, second = (Scores.load(tmp_path / name) for name in ("scores-1.parquet", "scores.parquet"))
    assert first.left_out_as("confident negative").tolist() == wrong.tolist()
    assert second.record.noise == first.record.noise
    assert np.array_equal(second.reason_codes, first.reason_codes)
    assert "wrong_probability" in first.predictions
    for name, values in first.predictions.items():
        assert np.array_equal(second.predictions[name], values), name
    assert not np.array_equal(second.quality, first.quality)
    assert not any(wrong[rows].any() for rows in watch.drawn.values())
    note = "about 12% of the labels seem wrong (10% to 20%): 8 of 64 rows were left out"
    assert quality.summary()["notes"][-2:] == [note, first.caution]


@UNLEARNED
def test_a_run_whose_scores_are_not_used_ends_as_one_without_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(EpochPlan, "scored", lambda plan, *_, **__: plan)
    for scoring in (True, False):
        quality, trainer = make(tmp_path, terms=("loss_reduction",), head_start=False)
        if not scoring:
            trainer.remove_callback(quality)
            # The same random draws, epoch by epoch, without anything else.
            draw = quality.data.set_epoch
            trainer.add_callback(At("epoch_begin", lambda state, *_, draw=draw: draw(round(state.epoch or 0))))
        trainer.train()
        ended.append(trainer.model.state_dict())  # type: ignore[union-attr]
    assert (tmp_path / "scores.parquet").exists()
    assert_same(ended[0], ended[1], "weights")


def noise(n: int = ROWS) -> list[dict[str, Any]]:
    rng = random.Random(1)
    return [{**row, "labels": rng.randrange(2)} for row in moods(n, seed=3)]


@UNLEARNED
def test_a_model_at_chance_is_trained_on_random_draws_with_a_warning(tmp_path: Path) -> None:
    watch = Watch()
    further = {"num_train_epochs": 6, "learning_rate": 1e-6, "save_strategy": "steps", "save_steps": 10}
    with pytest.warns(UserWarning, match="rows are drawn evenly and ranks stay until the second look: the model's los"):
        quality, trainer = run(tmp_path, watch, data=noise(), further=further)
    assert trainer.state.global_step == 24
    assert [look["not_ready"] is None for look in quality.looks] == [False, False]
    assert quality.why_not in quality.notes[-1]
    assert quality.notes[-1].startswith("rows are drawn evenly to the end: the model's loss")
    assert quality.data.scores is None
    assert [step for step, waits in watch.waiting.items() if waits] == list(range(8))
    assert sorted(watch.drawn[4] + watch.drawn[5]) == list(range(ROWS))
    resumed, again = make(tmp_path, rest := Watch(), data=noise(), further=further)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert not any(rest.waiting.values()), "ranks may move after the second look, also in a resumed run"
    assert rest.drawn[5] == watch.drawn[5]
    assert resumed.summary()["notes"] == quality.summary()["notes"]


@UNLEARNED
def test_a_second_look_sets_the_ranks_of_a_model_that_has_learned_by_then(tmp_path: Path) -> None:
    subset, watch = tsq.QualitySubset(DATA, 0.5, seed=0), Watch()
    quality = quality_by(subset, reference=40, head_start=False)
    ranks = paper.RankCallback(interval=4, samples=16, schedule=paper.RankSchedule(moves=3))
    make_trainer(slotted_bert(), subset, tmp_path, [watch, quality, ranks], num_train_epochs=9).train()
    assert [look["not_ready"] is None for look in quality.looks] == [False, True]
    assert [step for step, waits in watch.waiting.items() if waits] == list(range(12))
    assert [(e.step, e.reason) for e in ranks.events][:2] == [(12, "start"), (16, "adjustment")]


class Weighted(BertForSequenceClassification):
    """Its own loss counts class 1 three times."""

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **options: Any) -> Any:
        output = super().forward(*args, **options)
        if labels is not None:
            weight = torch.tensor([1.0, 3.0])
            output.loss = torch.nn.functional.cross_entropy(output.logits, labels, weight=weight)
        return output


@UNLEARNED
def test_a_model_with_a_loss_of_its_own_is_refused_before_the_look(tmp_path: Path) -> None:
    def trainer(**options: Any) -> Trainer:
        subset = tsq.QualitySubset(DATA, 0.5, seed=0)
        torch.manual_seed(1)  # of two classes that a model finds equally likely weights do not show
        model = tsq.wrap(Weighted(base_bert().config))
        quality = quality_by(subset, reference=40, **options)
        return make_trainer(model, subset, tmp_path, [quality], num_train_epochs=EPOCHS)

    alone = trainer()
    with pytest.raises(UnsupportedError, match=r"the model's own loss on a batch is .* pass `task` with the loss"):
        alone.train()
    assert alone.state.global_step == 0
    trainer(task=Classification(class_weights=torch.tensor([1.0, 3.0]))).train()


@pytest.mark.parametrize(
    ("draws", "scores", "both"),
    [
        ({"seed": 7}, {}, "seed 0, and this one has 7"),
        ({"resample": False}, {}, "resample True, and this one has False"),
        ({}, {"select": False}, "select True, and this one has False"),
        ({}, {"judge": False}, "judge True, and this one has False"),
        ({}, {"weights": {"loss": 1.0}}, "weights None, and this one has {'loss': 1.0}"),
        ({}, {"terms": ["convergence"]}, r"terms \['loss', 'el2n'\], and this one has \['convergence', 'loss', .*\]"),
        ({}, {"reference": 20}, "reference 40, and this one has 20"),
        ({}, {"seed": 3}, "seed to score 0, and this one has 3"),
    ],
)
def test_a_run_is_not_resumed_with_other_scores_or_draws(
    draws: dict[str, Any], scores: dict[str, Any], both: str, even: Done
) -> None:
    _, trainer = make(even.folder, draws=draws, further=SAVES, **scores)
    with pytest.raises(SettingsError, match=f"the resumed run had {both}; resume with"):
        trainer.train(resume_from_checkpoint=str(even.folder / "checkpoint-8"))


def test_a_run_is_not_resumed_with_its_rows_in_another_order(even: Done, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(even.folder, tmp_path / "run"))
    _, trainer = make(folder, data=DATA[::-1], further=SAVES)
    with pytest.raises(SettingsError, match="same data set in the same order"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    state = folder / "checkpoint-8" / "tsqlora_quality.json"
    values = json.loads(state.read_text())
    del values["draws"]["hash of rows"]  # as an earlier version saved it
    state.write_text(json.dumps(values))
    write_manifest(state.parent)
    make(folder, data=DATA[::-1], further=SAVES)[1].train(resume_from_checkpoint=str(state.parent))


def masked() -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return BertForMaskedLM(BertConfig(vocab_size=VOCAB, **sizes))


def classifier(**options: Any) -> Any:
    return tiny_bert(vocab=VOCAB, layers=1, dtype=torch.float32, **options)


IDS = [{"input_ids": row["input_ids"]} for row in DATA]
TOKENS = [{**row, "labels": row["input_ids"]} for row in DATA]
PAIRS = [{**row, "chosen_ids": [1], "rejected_ids": [2]} for row in IDS]
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "tags for one class": (classifier, TOKENS, {}, "AutoModelForTokenClassification"),
    "masked words": (masked, TOKENS, {}, "task.type masked-lm is not built"),
    "positions that train": (lambda: classifier(num_labels=2), DATA, {"weights": GRADIENTS}, "position_embeddings is"),
    "a custom term": (slotted_bert, DATA, {"terms": (crooked,)}, r"quality term 'crooked' gives \(1,\) for 2 samples"),
    "no labels": (slotted_bert, [{**row, "label": 0} for row in IDS], {}, "no 'labels', only input_ids, label"),
    "preferences": (slotted_bert, PAIRS, {}, "preference pairs.*tsqlora.select"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scored_is_refused_before_the_first_step(case: str, tmp_path: Path) -> None:
    made, data, options, text = REFUSED[case]
    model: Any = made()
    subset, watch = tsq.QualitySubset(data, 0.5, seed=0), Watch()
    trainer = make_trainer(model, subset, tmp_path, [watch, quality_by(subset, reference=40, **options)])
    trainer.data_collator = padded
    with pytest.raises(tsq.TsqLoraError, match=text):
        trainer.train()
    assert watch.begun is not None
    assert not watch.drawn
    assert not subset.plan.awaits_scores
    assert_same(watch.begun, fingerprint(model), "model")


def test_a_run_resumed_after_its_look_does_not_look_again(
    even: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_callback, "require_scorable", lambda *_, **__: pytest.fail("looked at"))
    folder = Path(shutil.copytree(even.folder, tmp_path / "run"))
    make(folder, further=SAVES)[1].train(resume_from_checkpoint=str(folder / "checkpoint-8"))


def test_rows_of_other_lengths_that_come_one_at_a_time_need_no_padding(tmp_path: Path) -> None:
    def one(rows: list[Any]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    by_length = sorted(DATA, key=lambda row: len(row["input_ids"]))
    further = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "max_steps": 2}
    quality, trainer = make(tmp_path, data=[by_length[-1], *by_length[:-1]], further=further)  # the first two differ
    trainer.data_collator = one
    trainer.train()
    assert quality.data.scores is not None


class Fresh:
    """Returns a new row each time, as `datasets.Dataset` does."""

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, j: int) -> dict[str, Any]:
        return dict(DATA[j])


def test_a_collator_may_take_the_labels_out_of_its_rows(tmp_path: Path) -> None:
    def popping(rows: list[Any]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([row.pop("labels") for row in rows])
        return padded(rows) | {"labels": labels}

    quality, trainer = make(tmp_path, data=Fresh(), further={"max_steps": 2})
    trainer.data_collator = popping
    trainer.train()
    assert quality.data.scores is not None


def test_a_head_that_lora_has_frozen_is_named(tmp_path: Path) -> None:
    """Without a task_type PEFT trains no head, and an untrained one keeps the model at chance."""
    model = get_peft_model(base_bert(), LoraConfig(target_modules=["query"]))
    data = tsq.QualitySubset(moods(), 0.5, seed=0)
    with pytest.warns(UserWarning, match="no linear head of it trains .give LoraConfig a task_type"):
        make_trainer(model, data, tmp_path, [tsq.QualityCallback(data)], num_train_epochs=1).train()
