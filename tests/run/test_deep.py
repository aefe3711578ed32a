"""An audit by fine-tuning: every row is predicted by a model that was trained on other rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import set_up
from tsqlora.run import deep
from tsqlora.run.config import load_config
from tsqlora.run.deep import FOLDS, out_of_fold_logits
from tsqlora.run.job import Job, load


def test_every_row_is_predicted_once_by_a_model_of_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, folds, sizes = load(load_config(set_up(tmp_path, rows=40) / "c.yaml")), list[Job](), list[int]()
    whole = job.config.training.batch_size

    def ids(fold: Job, split: str) -> np.ndarray:
        return np.asarray(fold.data[split].ids)

    def row_numbers(fold: Job, size: int, progress: Any) -> np.ndarray:
        sizes.append(size)
        if size == whole:
            raise MemoryError
        folds.append(fold)
        assert not {*ids(fold, "train")} & {*ids(fold, "validation")}
        return ids(fold, "validation")[:, None]

    monkeypatch.setattr(deep, "_fine_tuned", row_numbers)
    logits = out_of_fold_logits(job.config, job.train, max_length=job.max_length)
    assert np.array_equal(logits[:, 0], np.asarray(job.train.ids))
    assert len(folds) == FOLDS
    assert sizes == [whole, *[whole // 2] * FOLDS], "a size that did not fit is not tried again"


@pytest.mark.filterwarnings("ignore:rows are drawn evenly")
def test_a_fine_tuned_fold_gives_logits_and_names_itself_in_each_phase(tmp_path: Path) -> None:
    job, phases = load(load_config(set_up(tmp_path, rows=24) / "c.yaml")), set[str]()
    logits = out_of_fold_logits(
        job.config, job.train, max_length=job.max_length, progress=lambda phase, *_: phases.add(phase)
    )
    assert logits.shape == (len(job.train), 2)
    assert np.isfinite(logits).all()
    assert {f"fold {n} of 3: training" for n in (1, 2, 3)} <= phases
