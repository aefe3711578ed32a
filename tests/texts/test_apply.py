"""The look's detectors of answers applied to rows that it has not seen, each by itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tsqlora as tsq
from texts.test_before import ASSISTANT, END, FOREIGN_ROWS, USER, WORDS, model, samples
from tsqlora import paper
from tsqlora.auditing.saved_look import SavedLook
from tsqlora.tasks import get_task
from words import tokenizer

TASK = get_task("causal-lm")
MOVED = frozenset(range(0, 60, 3))
"""New rows that have the answer of the row after them."""


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    width = max(len(row["labels"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[fill] * (width - len(row[name]))] for row in rows])

    mask = [[1] * len(row["labels"]) + [0] * (width - len(row["labels"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def new_rows() -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    words = [rng.permutation([*WORDS])[:6].tolist() for _ in range(61)]
    rows = []
    for j in range(60):
        prompt = [USER, *words[j], ASSISTANT]
        answer = [*rng.permutation(words[j + 1] if j in MOVED else words[j]).tolist(), END]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


@pytest.fixture(scope="module")
def look(tmp_path_factory: pytest.TempPathFactory) -> SavedLook:
    """Of rows of which a tenth has the answers of the rows after them."""
    out, names = (
        tmp_path_factory.mktemp("look") / "LOOK",
        paper.RowNames(hashes=[str(j) for j in range(len(samples()))]),
    )
    tsq.look(model(), samples(), collate, out=out, rows=names, task=TASK, processing_class=tokenizer())
    return SavedLook.load(out)


def test_a_look_names_the_rows_that_it_leaves_out_and_draws_others(look: SavedLook) -> None:
    (finding,), drawn = look.findings(), look.draw(0.5, seed=1)
    assert (finding.name, len(finding.where)) == ("foreign answer", look.scores.dropped["foreign answer"])
    assert (len(drawn), {*drawn.tolist()} & {*finding.where}) == (len(samples()) // 2, set())


def test_answers_of_other_prompts_are_found_row_by_row(look: SavedLook) -> None:
    columns = look.of(model(), collate(new_rows()))
    wrong = {*np.flatnonzero(columns["reason"] == "foreign answer").tolist()}
    assert wrong <= MOVED
    assert len(wrong) >= 0.8 * len(MOVED)
    assert {*columns["reason"][[*range(1, 60, 3)]].tolist()} == {"kept"}
    p = columns["wrong_probability"]
    assert p[[*wrong]].min() > 0.5 > np.median(p)
    assert (columns["loss"][[*wrong]] > np.median(columns["loss"])).all()


def test_a_row_does_not_depend_on_its_batch(look: SavedLook) -> None:
    together = look.of(model(), collate(new_rows()))
    for j in (0, 1, 7):
        batch = collate([new_rows()[j]])
        del batch["attention_mask"]  # without padding none is needed
        alone = look.of(model(), batch)
        assert alone["reason"] == together["reason"][[j]]
        np.testing.assert_allclose(alone["wrong_probability"][0], together["wrong_probability"][j], rtol=1e-4)
        np.testing.assert_allclose(alone["loss"][0], together["loss"][j], rtol=1e-4)


def test_rows_of_the_look_get_its_own_columns(look: SavedLook) -> None:
    places = [*FOREIGN_ROWS[:5], 100]
    columns = look.of(model(), collate([samples()[j] for j in places]), hashes=[str(j) for j in places])
    own = [look.scores.left_out_as("foreign answer")[j] for j in places]
    assert ((columns["reason"] == "foreign answer") == own).all()
    assert sum(own) >= 3


def test_a_row_of_the_look_that_it_has_not_read_is_judged_as_a_new_one(look: SavedLook) -> None:
    own = look.answers["own"].copy()
    own[100] = np.nan
    unread = replace(look, answers={**look.answers, "own": own})
    columns = unread.of(model(), collate([samples()[100]]), hashes=["100"])
    assert np.isfinite(columns["wrong_probability"]).all()


def test_where_no_answer_is_wrong_none_is_called_so(tmp_path: Path) -> None:
    tsq.look(model(), samples(()), collate, out=tmp_path / "LOOK", task=TASK, processing_class=tokenizer())
    columns = tsq.apply(model(), tmp_path / "LOOK", collate(new_rows()))
    assert {*columns["reason"].tolist()} == {"kept"}
