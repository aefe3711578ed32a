import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

import tsqlora as tsq
from models import tiny_bert
from scoring import assert_same, fingerprint, quality_by
from stock import ROWS, VOCAB, base_bert, make_trainer, moods, slotted_bert
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.quality.epochs import EpochPlan
from tsqlora.quality.scores import Scores
from tsqlora.tasks.classification import Classification
from tsqlora.training import drawing, quality_callback
from tsqlora.training.nonfinite import GuardCallback

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


UNLEARNED = pytest.mark.filterwarnings("ignore:rows are drawn evenly:UserWarning")
EPOCHS = 5
"""Of half the rows, 4 steps each; the second look comes before step 8."""


def run(
    folder: Path,
    *,
    data: Any = DATA,
    also: tuple[TrainerCallback, ...] = (),
    ranks: bool = False,
    first: bool = True,
    further: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[tsq.QualityCallback, Trainer]:
    subset = tsq.QualitySubset(data, 0.5)
    quality = quality_by(subset, **({"reference": 40} | options))
    callbacks: list[TrainerCallback] = [quality]
    if ranks:
        callbacks.insert(
            1 if first else 0, tsq.RankCallback(interval=4, samples=16, schedule=tsq.RankSchedule(moves=3))
        )
    trainer = make_trainer(
        slotted_bert(), subset, folder, [*also, *callbacks], **({"num_train_epochs": EPOCHS} | (further or {}))
    )
    trainer.train()
    return quality, trainer


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


def test_scores_are_on_disk_before_the_first_step_and_again_after_a_third(tmp_path: Path) -> None:
    watch = Watch()
    quality, trainer = run(tmp_path, also=(watch,), about={"note": "by a test"}, weights={"loss": -1.0}, guard=False)
    assert all(watch.on_disk.values())
    assert not any(watch.waiting.values())
    assert [(look["epoch"], look["step"]) for look in quality.looks] == [(0, 0), (2, 8)]
    assert [look["head_start"] is not None for look in quality.looks] == [True, False]
    assert (quality.why_not, quality.notes, watch.modes) == (None, [], {True})
    assert quality.spent["look"].seconds > 0
    first, second = Scores.load(tmp_path / "scores-1.parquet"), Scores.load(tmp_path / "scores.parquet")
    assert np.array_equal(second.quality, quality.data.scores.quality)  # type: ignore[union-attr]
    assert [(s.record.step, s.record.look, s.record.about["note"]) for s in (first, second)] == [
        (0, 1, "by a test"),
        (8, 2, "by a test"),
    ]
    assert trainer.state.global_step == 4 * EPOCHS


def test_one_look_is_all_where_a_second_could_say_nothing_else(tmp_path: Path) -> None:
    once, _ = run(tmp_path / "once", look_again=False, weights={"loss": -1.0}, guard=False)
    plain, _ = run(tmp_path / "plain")
    assert [len(quality.looks) for quality in (once, plain)] == [1, 1]
    assert not (tmp_path / "once" / "scores-1.parquet").exists()


def test_each_epoch_is_drawn_anew_with_the_classes_of_the_data(tmp_path: Path) -> None:
    watch = Watch()
    quality, _ = run(tmp_path, also=(watch,), weights=GRADIENTS, guard=False)
    assert len({tuple(sorted(rows)) for rows in watch.drawn.values()}) == EPOCHS
    for epoch in (2, 3, 4):
        assert watch.drawn[epoch] == quality.data.draw(epoch).tolist()
        assert sum(DATA[row]["labels"] for row in watch.drawn[epoch]) == 16


def test_terms_with_a_weight_are_measured_and_decide(tmp_path: Path) -> None:
    quality, _ = run(tmp_path, weights=GRADIENTS, guard=False)
    scores = quality.data.scores
    assert scores is not None
    assert set(scores.terms) == {"gradient_norm", "convergence", "cosine", "loss", "el2n"}
    assert not scores.even
    assert scores.record.weights == GRADIENTS
    assert scores.record.eta > 0


def test_without_weights_every_kept_row_is_drawn_as_the_control_draws(tmp_path: Path) -> None:
    quality, _ = run(tmp_path)
    scores = quality.data.scores
    assert scores is not None
    assert scores.even
    assert scores.record.noise["evident"] is False
    assert scores.kept.all()
    control = tsq.QualitySubset(DATA, 0.5)
    for epoch in range(EPOCHS):
        assert quality.data.draw(epoch).tolist() == control.draw(epoch).tolist()


@pytest.mark.parametrize(("options", "dropped"), [({"reject": False}, 0), ({"weights": GRADIENTS}, 0)])
def test_rows_are_rejected_only_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dropped: int
) -> None:
    monkeypatch.setattr("tsqlora.quality.look.reject", lambda *_: pytest.fail("asked for"))
    quality, _ = run(tmp_path, **options)
    assert quality.data.scores is not None
    assert (~quality.data.scores.kept).sum() == dropped


def test_a_temperature_of_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"temperature 2\.0"):
        quality_by(tsq.QualitySubset(DATA, 0.5), temperature=2.0)


BACKWARDS: dict[str, Any] = {"weights": {"convergence": -1.0}, "temperature": 0.3}
"""A Q that prefers rows against which everybody's loss falls."""


def test_rows_that_would_teach_less_than_random_ones_are_not_drawn(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="rows are drawn at random, not by Q: the mean convergence"):
        quality, _ = run(tmp_path, also=(watch := Watch(),), **BACKWARDS)
    # There are scores: whoever needs them, for ranks, has them.
    assert quality.why_not is None
    scores = Scores.load(tmp_path / "scores.parquet")
    assert scores.even
    assert scores.record.guard["passed"] is False
    assert scores.record.guard["why"].startswith("the mean convergence ")
    control = tsq.QualitySubset(DATA, 0.5)
    for epoch in range(EPOCHS):
        assert watch.drawn[epoch] == control.draw(epoch).tolist()


def test_a_resumed_run_goes_on_as_the_guard_decided(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1}
    watch, again = Watch(), Watch()
    with pytest.warns(UserWarning, match="rows are drawn at random, not by Q"):
        run(tmp_path, also=(watch,), further=saves, **BACKWARDS)
    subset = tsq.QualitySubset(DATA, 0.5)
    quality = quality_by(subset, reference=40, **BACKWARDS)
    resumed = make_trainer(slotted_bert(), subset, tmp_path, [again, quality], num_train_epochs=EPOCHS, **saves)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    assert quality.data.scores is not None
    assert quality.data.scores.record.guard["passed"] is False
    assert again.drawn == {epoch: rows for epoch, rows in watch.drawn.items() if epoch >= 3}


def test_without_the_guard_rows_are_drawn_by_quality_whatever_it_is(tmp_path: Path) -> None:
    quality, _ = run(tmp_path, guard=False, **BACKWARDS)
    scores = quality.data.scores
    assert scores is not None
    assert not scores.even
    assert scores.record.guard is None


def test_the_guard_has_convergence_measured_where_gradients_are_there_anyway(tmp_path: Path) -> None:
    quality, _ = run(tmp_path / "a", weights={"gradient_norm": -1.0}, reject=False)
    assert quality.data.scores is not None
    assert "convergence" in quality.data.scores.terms
    plain, _ = run(tmp_path / "b")
    assert plain.data.scores is not None
    assert list(plain.data.scores.terms) == ["loss", "el2n"]
    assert plain.data.scores.record.guard == {"checked": False, "why": "rows are drawn evenly: no Q decides"}


@pytest.mark.parametrize("step", [3, 7, 8, 10, 17])
def test_a_resumed_run_draws_the_same_rows(step: int, tmp_path: Path) -> None:
    """Within the first epoch, before the second look, where it comes next, after it."""
    saves = {"save_strategy": "steps", "save_steps": 1}
    by_quality = {"weights": GRADIENTS, "guard": False}
    watch, resumed = Watch(), Watch()
    _, trainer = run(tmp_path, also=(watch,), further=saves, **by_quality)
    subset = tsq.QualitySubset(DATA, 0.5)
    quality = quality_by(subset, reference=40, **by_quality)
    again = make_trainer(slotted_bert(), subset, tmp_path, [resumed, quality], num_train_epochs=EPOCHS, **saves)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.drawn == {epoch: rows for epoch, rows in watch.drawn.items() if epoch >= step // 4}
    assert [look["step"] for look in quality.looks] == [0, 8]
    for name, value in trainer.model.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, again.model.state_dict()[name]), name  # type: ignore[union-attr]


def test_the_callback_itself_draws_anew() -> None:
    """accelerate calls set_epoch as well, but with several processes not under every sampler."""
    subset = tsq.QualitySubset(DATA, 0.5)
    state: Any = SimpleNamespace(epoch=1.0)
    quality_by(subset).on_epoch_begin(None, state, None)  # type: ignore[arg-type]
    assert subset.indices.tolist() == subset.draw(1).tolist()


def test_a_sharp_temperature_draws_the_best_rows_every_time(tmp_path: Path) -> None:
    watch = Watch()
    quality, _ = run(tmp_path, also=(watch,), weights=GRADIENTS, temperature=1e-6, guard=False)
    assert quality.data.scores is not None
    best = quality.data.scores.quality
    wanted: list[int] = []
    for label in (0, 1):
        rows = [j for j in range(ROWS) if DATA[j]["labels"] == label]
        wanted += sorted(rows, key=lambda row: -best[row])[:16]
    assert sorted(watch.drawn[2]) == sorted(watch.drawn[4]) == sorted(wanted)


def test_scoring_leaves_training_alone(tmp_path: Path) -> None:
    class Around(TrainerCallback):
        """Before and behind the QualityCallback, at the epoch at which it scores."""

        def __init__(self, seen: list[Any]) -> None:
            self.seen = seen

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                optimizer = {str(k): v for k, v in kwargs["optimizer"].state_dict()["state"].items()}
                self.seen.append((fingerprint(kwargs["model"]), _clone(optimizer)))

    seen: list[Any] = []
    subset = tsq.QualitySubset(DATA, 0.5)
    callbacks = [Around(seen), quality_by(subset, terms=("loss_reduction",), reference=40), Around(seen)]
    make_trainer(slotted_bert(), subset, tmp_path, callbacks, num_train_epochs=EPOCHS).train()
    (before, optimizer), (after, optimizer_after) = seen
    assert subset.scores is not None
    for name in before:
        assert_same(before[name], after[name], name)
    assert_same(optimizer, optimizer_after, "optimizer")


@UNLEARNED
def test_a_run_whose_scores_are_not_used_ends_as_one_without_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(EpochPlan, "scored", lambda plan, *_, **__: plan)
    for scoring in (True, False):
        subset = tsq.QualitySubset(DATA, 0.5)
        scores = quality_by(subset, terms=("loss_reduction",), reference=40, head_start=False)
        callback = scores if scoring else Redraw(subset)
        trainer = make_trainer(slotted_bert(), subset, tmp_path, [callback], num_train_epochs=EPOCHS)
        trainer.train()
        ended.append(trainer.model.state_dict())  # type: ignore[union-attr]
    assert (tmp_path / "scores.parquet").exists()
    assert_same(ended[0], ended[1], "weights")


class Redraw(TrainerCallback):
    """The same random draws, epoch by epoch, without anything else."""

    def __init__(self, data: tsq.QualitySubset) -> None:
        self.data = data

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.data.set_epoch(round(state.epoch or 0))


def _clone(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(name): _clone(value) for name, value in tree.items()}
    return tree.clone() if isinstance(tree, torch.Tensor) else tree


def noise(n: int = ROWS) -> list[dict[str, Any]]:
    rng = random.Random(1)
    return [{**row, "labels": rng.randrange(2)} for row in moods(n, seed=3)]


@UNLEARNED
def test_a_model_at_chance_is_trained_on_random_draws_with_a_warning(tmp_path: Path) -> None:
    watch = Watch()
    further = {"num_train_epochs": 6, "learning_rate": 1e-6}
    with pytest.warns(UserWarning, match="rows are drawn evenly and ranks stay until the second look: the model's los"):
        quality, trainer = run(tmp_path, data=noise(), also=(watch,), further=further)
    assert trainer.state.global_step == 24
    assert [look["not_ready"] is None for look in quality.looks] == [False, False]
    assert quality.why_not in quality.notes[-1]
    assert quality.notes[-1].startswith("rows are drawn evenly to the end: the model's loss")
    assert quality.data.scores is None
    assert [step for step, waits in watch.waiting.items() if waits] == list(range(8))
    assert sorted(watch.drawn[4] + watch.drawn[5]) == list(range(ROWS))


@UNLEARNED
def test_ranks_stay_where_the_model_is_at_chance(tmp_path: Path) -> None:
    subset = tsq.QualitySubset(noise(), 0.5)
    ranks = tsq.RankCallback(interval=2)
    model = slotted_bert()
    callbacks = [quality_by(subset, reference=40), ranks]
    with pytest.warns(UserWarning, match="ranks are as they were: .*until step 2"):
        make_trainer(model, subset, tmp_path, callbacks, num_train_epochs=1, learning_rate=1e-6).train()
    assert (ranks.events, set(ranks.final.values())) == ([], {4})
    model.save_pretrained(tmp_path / "adapter")


@UNLEARNED
def test_a_second_look_sets_the_ranks_of_a_model_that_has_learned_by_then(tmp_path: Path) -> None:
    subset, watch = tsq.QualitySubset(DATA, 0.5), Watch()
    quality = quality_by(subset, reference=40, head_start=False)
    ranks = tsq.RankCallback(interval=4, samples=16, schedule=tsq.RankSchedule(moves=3))
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
        subset = tsq.QualitySubset(DATA, 0.5)
        torch.manual_seed(1)  # of two classes that a model finds equally likely weights do not show
        model = tsq.wrap(Weighted(base_bert().config))
        quality = quality_by(subset, reference=40, **options)
        return make_trainer(model, subset, tmp_path, [quality], num_train_epochs=EPOCHS)

    alone = trainer()
    with pytest.raises(UnsupportedError, match=r"the model's own loss on a batch is .* pass `task` with the loss"):
        alone.train()
    assert alone.state.global_step == 0
    trainer(task=Classification(class_weights=torch.tensor([1.0, 3.0]))).train()


@pytest.mark.parametrize("guard", [False, True])
def test_evaluating_on_the_subset_that_is_trained_on_is_refused(guard: bool, tmp_path: Path) -> None:
    subset = tsq.QualitySubset(DATA, 0.5)
    callback = GuardCallback(subset) if guard else quality_by(subset, reference=40)
    further = {"evaluate_on": {"train": subset}, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(slotted_bert(), subset, tmp_path, [callback], num_train_epochs=EPOCHS, **further)
    with pytest.raises(SettingsError, match="eval_dataset is the QualitySubset that is trained on"):
        trainer.train()
    assert trainer.state.global_step == 2
    other = make_trainer(slotted_bert(), subset, tmp_path, [quality_by(subset, reference=40)])
    other.train()
    other.evaluate(subset)  # nothing draws any more


def test_an_epoch_of_anothers_is_refused_while_a_callback_draws() -> None:
    subset = tsq.QualitySubset(DATA, 0.5)
    subset.begin_epoch(3, "QualityCallback")
    subset.set_epoch(3)
    with pytest.raises(SettingsError, match=r"set_epoch\(0\): QualityCallback draws this QualitySubset and is in"):
        subset.set_epoch(0)
    assert subset.indices.tolist() == subset.draw(3).tolist()
    subset.drawn_by = None
    subset.set_epoch(0)
    assert subset.indices.tolist() == subset.draw(0).tolist()


@pytest.mark.parametrize(
    ("draws", "scores", "told"),
    [
        ({"seed": 7}, {}, "seed 0, and this one has 7"),
        ({"resample": False}, {}, "resample True, and this one has False"),
        ({}, {"reject": False}, "reject None, and this one has False"),
        ({}, {"weights": {"loss": 1.0}}, "weights None, and this one has {'loss': 1.0}"),
        ({}, {"terms": ["convergence"]}, r"terms \['loss', 'el2n'\], and this one has \['convergence', 'loss', .*\]"),
        ({}, {"reference": 20}, "reference 40, and this one has 20"),
        ({}, {"seed": 3}, "seed to score 0, and this one has 3"),
    ],
)
@pytest.mark.parametrize("at", [5, 10])
@pytest.mark.filterwarnings("ignore:.*has checkpoints of an earlier training:UserWarning")
def test_a_run_is_not_resumed_with_other_scores_or_draws(
    at: int, draws: dict[str, Any], scores: dict[str, Any], told: str, tmp_path: Path
) -> None:
    saves = {"num_train_epochs": EPOCHS, "save_strategy": "steps", "save_steps": 5}
    run(tmp_path, further=saves)
    subset = tsq.QualitySubset(DATA, 0.5, **draws)
    quality = quality_by(subset, **{"reference": 40, **scores})
    trainer = make_trainer(slotted_bert(), subset, tmp_path, [quality], **saves)
    with pytest.raises(SettingsError, match=f"the resumed run had {told}; resume with"):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))


def test_the_order_of_the_callbacks_does_not_matter(tmp_path: Path) -> None:
    (one, first), (two, second) = (run(tmp_path, ranks=True, first=first) for first in (True, False))
    events = [
        next(c for c in t.callback_handler.callbacks if isinstance(c, tsq.RankCallback)).events for t in (first, second)
    ]
    assert events[0] == events[1]
    assert (events[0][0].reason, events[0][0].step) == ("start", 0)
    assert {event.reason for event in events[0][1:]} == {"adjustment"}
    assert events[0][0].ranks == events[0][0].target
    assert np.array_equal(one.data.scores.quality, two.data.scores.quality)  # type: ignore[union-attr]
    for left, right in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_with_a_fixed_policy_ranks_stay_uniform_and_nothing_is_measured(tmp_path: Path) -> None:
    subset = tsq.QualitySubset(DATA, 0.5)
    ranks = tsq.RankCallback(policy="fixed", samples=16)
    make_trainer(
        slotted_bert(), subset, tmp_path, [quality_by(subset, reference=40), ranks], num_train_epochs=EPOCHS
    ).train()
    assert (ranks.events, ranks.started) == ([], False)
    assert len(set(ranks.final.values())) == 1


@pytest.mark.parametrize(
    ("options", "further", "text"),
    [
        ({}, {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "persistent_workers keeps an old"),
        ({"terms": ("lerned",)}, {}, "lerned"),
        ({"reference": 1}, {}, "reference is 1; it must be a whole number of rows, at least 2"),
        ({"reference": 0}, {}, "reference is 0; it must be a whole number of rows, at least 2"),
    ],
)
def test_settings_that_cannot_work_are_told_before_training(
    options: dict[str, Any], further: dict[str, Any], text: str, tmp_path: Path
) -> None:
    watch = Watch()
    with pytest.raises(tsq.SettingsError, match=text):
        run(tmp_path, also=(watch,), further=further, **options)
    assert not watch.drawn


def test_more_rows_than_weights_and_rejection_may_leave_are_refused_at_once() -> None:
    subset, weights = tsq.QualitySubset(DATA, 0.9), {"loss": -1.0}
    with pytest.raises(tsq.SettingsError, match="reject may drop 50% of the rows, and weights draw 90% of"):
        quality_by(subset, weights=weights, reject=True)
    quality_by(subset, weights=weights)
    quality_by(tsq.QualitySubset(DATA, 0.5), weights=weights, reject=True)


def of_kind(made: type[PreTrainedModel]) -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return made(BertConfig(vocab_size=VOCAB, **sizes))


def in_pieces(inputs: Any) -> Any:
    """Labels that every token has."""
    return [{**row, "labels": row["input_ids"]} for row in inputs]


def many_labels() -> list[dict[str, Any]]:
    return [{**row, "labels": [float(row["labels"]), 1.0, 0.0]} for row in DATA]


def numbers() -> list[dict[str, Any]]:
    return [{**row, "labels": float(row["labels"])} for row in DATA]


def classifier(**options: Any) -> Any:
    return tiny_bert(vocab=VOCAB, layers=1, dtype=torch.float32, **options)


def frozen_positions() -> Any:
    model = classifier(num_labels=2)
    model.bert.embeddings.position_embeddings.requires_grad_(False)
    return model


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "multi-label": (
        lambda: classifier(problem_type="multi_label_classification"),
        many_labels(),
        {},
        "task.type multi-label-classification is not built",
    ),
    "multi-label by its labels": (classifier, many_labels(), {}, "task.type multi-label-classification is not built"),
    "tokens by their labels": (classifier, in_pieces(DATA), {}, "task.type token-classification is not built"),
    "tokens": (
        lambda: of_kind(BertForTokenClassification),
        in_pieces(DATA),
        {},
        "task.type token-classification is not built",
    ),
    "answers": (
        lambda: of_kind(BertForQuestionAnswering),
        [{"input_ids": row["input_ids"], "start_positions": 1, "end_positions": 2} for row in DATA],
        {},
        "task.type question-answering is not built",
    ),
    "masked words": (lambda: of_kind(BertForMaskedLM), in_pieces(DATA), {}, "task.type masked-lm is not built"),
    "positions that train": (
        lambda: classifier(num_labels=2),
        DATA,
        {"weights": GRADIENTS},
        "bert.embeddings.position_embeddings is called on a tensor of shape",
    ),
    "scope full without LoRA": (
        frozen_positions,
        DATA,
        {"weights": GRADIENTS, "scope": "full"},
        "scope 'full' scores LoRA's target layers, and this model has none",
    ),
    "reject of numbers": (
        lambda: classifier(num_labels=1),
        numbers(),
        {"reject": True},
        "reject works for classification",
    ),
    "ifd of classes": (
        slotted_bert,
        DATA,
        {"weights": {"ifd": 1.0}},
        "quality term 'ifd'",
    ),
    "a term of one's own": (
        slotted_bert,
        DATA,
        {"terms": (crooked,)},
        r"quality term 'crooked' gives \(1,\) for 2 samples",
    ),
    "no labels": (
        slotted_bert,
        [{"input_ids": row["input_ids"], "label": row["labels"]} for row in DATA],
        {},
        "the collator's batches have no 'labels', only input_ids, label",
    ),
    "preferences": (
        slotted_bert,
        [{"input_ids": row["input_ids"], "chosen_ids": [1], "rejected_ids": [2]} for row in DATA],
        {},
        "task.type preference-tuning is not built",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scored_is_refused_before_the_first_step(case: str, tmp_path: Path) -> None:
    made, data, options, text = REFUSED[case]
    model: Any = made()
    subset, watch = tsq.QualitySubset(data, 0.5), Watch()
    quality = quality_by(subset, reference=40, **options)
    trainer = make_trainer(model, subset, tmp_path, [watch, quality], num_train_epochs=EPOCHS)
    trainer.data_collator = padded
    with pytest.raises(tsq.TsqLoraError, match=text):
        trainer.train()
    assert watch.begun is not None
    assert not watch.drawn
    assert not subset.plan.awaits_scores
    assert_same(watch.begun, fingerprint(model), "model")


def test_a_run_resumed_behind_its_scoring_is_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": EPOCHS}
    run(tmp_path, further=saves)
    looks: list[Any] = []
    monkeypatch.setattr(quality_callback, "require_scorable", lambda *_, **__: looks.append(1))
    for step in (4, 8, 10):
        subset = tsq.QualitySubset(DATA, 0.5)
        resumed = make_trainer(slotted_bert(), subset, tmp_path, [quality_by(subset, reference=40)], **saves)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert not looks


def test_another_data_set_than_the_trainers_is_refused(tmp_path: Path) -> None:
    quality = quality_by(tsq.QualitySubset(DATA, 0.5))
    with pytest.raises(tsq.SettingsError, match="need the same QualitySubset"):
        make_trainer(slotted_bert(), tsq.QualitySubset(DATA, 0.5), tmp_path, [quality]).train()


@pytest.mark.parametrize("callback", [tsq.QualityCallback, tsq.GuardCallback])
def test_a_plain_list_is_refused_with_the_cure(callback: Any) -> None:
    text = rf"{callback.__name__} got a list; .* make data = tsqlora\.QualitySubset\(rows\), and give it to the Trainer"
    with pytest.raises(SettingsError, match=text):
        callback(DATA)


class Drawn(TrainerCallback):
    """The rows of each epoch, and whether ranks were set from a quality sample."""

    def __init__(self, data: tsq.QualitySubset) -> None:
        self.data, self.rows = data, list[list[int]]()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.append(sorted(self.data.indices.tolist()))


@pytest.mark.parametrize("other", [tsq.RankCallback, tsq.GuardCallback])
def test_a_later_training_without_the_callback_is_a_random_one(other: Any, tmp_path: Path) -> None:
    quality, _ = run(tmp_path / "first", weights={"loss": 1.0}, guard=False)
    subset = quality.data
    fresh = tsq.QualitySubset(DATA, 0.5)
    callback = other(interval=4) if other is tsq.RankCallback else other(subset)
    drawn = Drawn(subset)
    make_trainer(slotted_bert(), subset, tmp_path / "second", [callback, drawn], num_train_epochs=EPOCHS).train()
    assert drawn.rows == [sorted(fresh.draw(epoch).tolist()) for epoch in range(EPOCHS)]
    assert subset.scores is None
    assert not (isinstance(callback, tsq.RankCallback) and callback.started)


def test_scores_that_were_given_by_hand_stay(tmp_path: Path) -> None:
    scores = run(tmp_path / "first", weights={"loss": 1.0}, guard=False)[0].data.scores
    assert scores is not None
    subset = tsq.QualitySubset(DATA, 0.5)
    subset.use(scores, 0)
    drawn = Drawn(subset)
    ranks = tsq.RankCallback(interval=4, samples=16)
    make_trainer(slotted_bert(), subset, tmp_path / "second", [ranks, drawn], num_train_epochs=EPOCHS).train()
    assert (subset.scores is scores, ranks.started) == (True, True)


def test_what_was_interrupted_does_not_draw_for_another_callback(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    subset = tsq.QualitySubset(DATA, 0.5)
    quality = quality_by(subset, reference=40)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(slotted_bert(), subset, tmp_path / "a", [quality, Interrupt()], num_train_epochs=EPOCHS).train()
    drawn = Drawn(subset)
    make_trainer(slotted_bert(), subset, tmp_path / "b", [tsq.GuardCallback(subset), drawn], num_train_epochs=3).train()
    assert len(drawn.rows) == 3


@pytest.mark.parametrize("other", [tsq.QualityCallback, tsq.RankCallback, tsq.GuardCallback])
def test_an_epoch_that_is_cut_short_is_refused_by_name(other: Any, tmp_path: Path) -> None:
    class Cut(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step == 2

    subset = tsq.QualitySubset(DATA, 0.5)
    callback = other(interval=4) if other is tsq.RankCallback else other(subset)
    trainer = make_trainer(slotted_bert(), subset, tmp_path, [callback, Cut()], num_train_epochs=EPOCHS)
    with pytest.raises(SettingsError, match=r"ended epoch 0 before its end \(control\.should_epoch_stop\)"):
        trainer.train()


def test_rows_of_other_lengths_that_come_one_at_a_time_need_no_padding(tmp_path: Path) -> None:
    def one(rows: list[Any]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    by_length = sorted(DATA, key=lambda row: len(row["input_ids"]))
    subset = tsq.QualitySubset([by_length[-1], *by_length[:-1]], 0.5)  # the first two differ
    quality = quality_by(subset, reference=40)
    further = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "num_train_epochs": EPOCHS}
    trainer = make_trainer(slotted_bert(), subset, tmp_path, [quality], **further)
    trainer.data_collator = one
    trainer.train()
    assert subset.scores is not None


def test_a_collator_may_take_the_labels_out_of_its_rows(tmp_path: Path) -> None:
    def popping(rows: list[Any]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([row.pop("labels") for row in rows])
        return padded(rows) | {"labels": labels}

    subset = tsq.QualitySubset(Fresh(), 0.5)
    quality = quality_by(subset, reference=40)
    trainer = make_trainer(slotted_bert(), subset, tmp_path, [quality], num_train_epochs=EPOCHS)
    trainer.data_collator = popping
    trainer.train()
    assert subset.scores is not None


class Fresh:
    """Hands out each row anew, as `datasets.Dataset` does."""

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, j: int) -> dict[str, Any]:
        return dict(DATA[j])


def test_an_order_by_length_that_the_sampler_would_undo_is_refused(tmp_path: Path) -> None:
    subset = tsq.QualitySubset(DATA, 0.5, lengths=[len(row["input_ids"]) for row in DATA], batch_size=8)
    quality = quality_by(subset, reference=40)
    text = r"QualitySubset\(lengths=..., batch_size=...\) puts rows of like length together, and .* mixes them again"
    with pytest.raises(SettingsError, match=text):
        make_trainer(slotted_bert(), subset, tmp_path, [quality], train_sampling_strategy="random").train()
    make_trainer(slotted_bert(), subset, tmp_path, [quality]).train()  # in order


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_grouping_by_lengths_that_are_read_once_is_refused(strategy: str, tmp_path: Path) -> None:
    text = r"reads the rows' lengths once, and a QualitySubset .* 'sequential' and let QualitySubset\(rows, lengths="
    with pytest.raises(SettingsError, match=text):
        run(tmp_path, also=(watch := Watch(),), further={"train_sampling_strategy": strategy})
    assert not watch.drawn


@pytest.mark.parametrize("strategy", ["random", "sequential"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_sampler_by_place_goes_without_a_word(strategy: str, processes: int, tmp_path: Path) -> None:
    trainer = make_trainer(slotted_bert(), tsq.QualitySubset(DATA, 0.5), tmp_path, [], train_sampling_strategy=strategy)
    loader = prepare_data_loader(trainer.get_train_dataloader(), num_processes=processes, process_index=0)
    drawing.require_by_place(loader)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sampler_that_knows_rows_is_named_in_a_warning(processes: int) -> None:
    weighted = WeightedRandomSampler([1.0] * 8, 8)
    loader: Any = DataLoader(tsq.QualitySubset(range(8), 1.0), batch_size=2, sampler=weighted)
    loader = prepare_data_loader(loader, num_processes=processes, process_index=0)
    with pytest.warns(UserWarning, match="the Trainer's sampler is a WeightedRandomSampler"):
        drawing.require_by_place(loader)
