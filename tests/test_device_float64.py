"""No float64 is made on a model's device, so that Apple's MPS, which has none, can look, score and move ranks."""

from pathlib import Path
from typing import Any

import pytest

import tsqlora as tsq
from models import collate
from no_float64 import without_float64
from stock import make_trainer, moods, slotted_bert
from tsqlora import paper
from tsqlora.tasks.classification import Classification

ROWS = moods()


def test_a_training_looks_and_moves_ranks(tmp_path: Path) -> None:
    data, ranks = tsq.QualitySubset(ROWS, 0.5, trusted=moods(8, seed=3)), paper.RankCallback(interval=2)
    quality = tsq.QualityCallback(data, rule=paper.ScoringRule(look_again=True))
    trainer = make_trainer(slotted_bert(), data, tmp_path, [quality, ranks], num_train_epochs=4)
    with without_float64():
        trainer.train()
    assert any(event.moved for event in ranks.events)
    assert data.scores is not None


@pytest.mark.parametrize("options", [{}, {"task": Classification(label_smoothing=0.1)}])
def test_gradients_are_scored_and_layers_measured(options: dict[str, Any]) -> None:
    rule = paper.ScoringRule(weights={"loss": 1.0, "gradient_norm": 1.0, "convergence": 1.0})
    with without_float64():
        assert len(paper.score(slotted_bert(), ROWS, collate, rule=rule, **options)) == len(ROWS)
        assert paper.sensitivity(slotted_bert(), ROWS, collate, **options).samples == len(ROWS)


def test_the_stand_in_refuses_what_the_device_would() -> None:
    from torch import ones

    with without_float64(), pytest.raises(TypeError, match="float64"):
        ones(3).double()
