"""RankCallback in TRL's SFTTrainer, on a tiny Llama with a tokenizer of whole words."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel
from transformers.trainer_callback import PrinterCallback

import tsqlora as tsq
from scoring import quality_by
from stock import QUIET
from tsqlora import paper
from words import llama, tokenizer

trl = pytest.importorskip("trl", reason="needs trl")

disable_progress_bars()
pytestmark = [
    # TRL 1.16 sets these by their old names, and warns of its own options' end.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning"),
]

TEXT = [{"text": " ".join(f"w{j * k % 40}" for k in range(3 + j % 6))} for j in range(40)]
PAIRS = [{"prompt": f"w{j}", "completion": f" w{j} w{(j + 1) % 40}"} for j in range(40)]
TALKS = [
    {"messages": [{"role": "user", "content": f"w{j}"}, {"role": "assistant", "content": f"w{j} w{(j + 1) % 40}"}]}
    for j in range(40)
]


LORA = LoraConfig(r=4, target_modules="all-linear")


def make(
    folder: Path, callbacks: list[Any], data: Any = TEXT, model: Any = None, config: Any = LORA, **options: Any
) -> Any:
    """13 steps; with an interval of 3 ranks are adjusted after 3, 6 and 9."""
    defaults: dict[str, Any] = {"max_steps": 13, "per_device_train_batch_size": 4, "learning_rate": 0.02}
    defaults |= {"bf16": False, "save_strategy": "no"}
    args = trl.SFTConfig(output_dir=str(folder), **QUIET | defaults | options)
    trainer = trl.SFTTrainer(
        llama() if model is None else model,
        args,
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data[:8]),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        # Past the autocast that accelerate puts around the outermost forward pass.
        return model.eval().base_model(input_ids=torch.arange(5, 15)[None]).logits


def assert_loads_in_plain_peft(folder: Path, expected: torch.Tensor) -> None:
    loaded = PeftModel.from_pretrained(llama(), str(folder))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (TEXT, {"packing": True, "packing_strategy": "bfd_split", "max_length": 6}),
        (TEXT, {"padding_free": True, "max_length": None}),
        (TEXT, {"loss_type": "dft", "learning_rate": 0.1}),
        (TEXT, {"bf16": True, "gradient_accumulation_steps": 2}),
        (TALKS, {"assistant_only_loss": True}),
        (PAIRS, {"packing": True, "max_length": 16}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "plain" if isinstance(value, dict) else "",
)
def test_ranks_move_and_plain_peft_loads_the_adapter(tmp_path: Path, data: Any, options: dict[str, Any]) -> None:
    # Sharper than the default: a tiny model's layers differ little.
    ranks = paper.RankCallback(interval=3, schedule=paper.RankSchedule(moves=4, gamma=4))
    trainer = make(tmp_path, [ranks], data, **options)
    assert trainer.args.activation_checkpointing  # TRL's default
    trainer.train()
    assert [event.step for event in ranks.events] == [0, 3, 6, 9]
    assert sum(event.moved for event in ranks.events) > 0
    for event in ranks.events:
        costs = {name: sum(shape) for name, shape in ranks.loop.shapes.items()}  # type: ignore[union-attr]
        assert event.used == sum(rank * costs[name] for name, rank in event.ranks.items()) <= event.budget
        assert event.budget == 4 * sum(costs.values())
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "adapter"))
    assert_loads_in_plain_peft(tmp_path / "adapter", logits(trainer.model))


def test_checkpoints_load_in_plain_peft_and_runs_resume_from_them(tmp_path: Path) -> None:
    ended = []
    for resume in (False, True):
        ranks = paper.RankCallback(interval=3, schedule=paper.RankSchedule(moves=4))
        trainer = make(tmp_path, [ranks], save_strategy="steps", save_steps=5, save_total_limit=3)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5") if resume else None)
        ended.append((ranks.events, logits(trainer.model)))
    assert_loads_in_plain_peft(tmp_path / "checkpoint-13", ended[0][1])
    assert ended[0][0] == ended[1][0]
    assert torch.equal(ended[0][1], ended[1][1])


def test_reentrant_checkpointing_is_refused_by_name(tmp_path: Path) -> None:
    trainer = make(tmp_path, [paper.RankCallback(interval=3)], gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(tsq.UnsupportedError, match=r"reentrant gradient checkpointing.*use_reentrant': False"):
        trainer.train()


@pytest.mark.parametrize("data", [PAIRS, TALKS])
def test_rows_that_trl_prepared_are_scored_and_drawn_by_quality(data: Any, tmp_path: Path) -> None:
    """Half of the rows an epoch; targets are what TRL trains on, of a prompt's completion and of an assistant."""
    ranks = paper.RankCallback(interval=3)
    options = {"assistant_only_loss": True} if data is TALKS else {}
    trainer = make(tmp_path, [ranks], data, max_steps=-1, num_train_epochs=12, **options)
    rows = tsq.QualitySubset(trainer.train_dataset, 0.5, seed=0)
    trainer.train_dataset = rows
    trainer.add_callback(quality_by(rows, weights={"convergence": 1.0}, scores_path=tmp_path / "s.parquet"))
    trainer.train()
    assert rows.scores is not None
    assert rows.scores.record.not_ready is None
    assert set(rows.scores.terms) == {"convergence", "loss", "cosine"}
    assert set(rows.scores.labels.tolist()) == {3}, "two words and the end token"
    assert ranks.events


@pytest.mark.filterwarnings("ignore:text without trusted rows is drawn evenly")
@pytest.mark.parametrize("trusted", [False, True])
def test_one_line_attaches_to_a_trainer_that_was_built(trusted: bool, tmp_path: Path) -> None:
    trainer = make(tmp_path, [], TALKS, max_steps=-1, num_train_epochs=12, assistant_only_loss=True)
    # TRL prepared them as it did the others.
    some = trainer.train_dataset.select(range(8)) if trusted else None
    callback = tsq.attach(trainer, fraction=0.5, trusted=some)
    trainer.train()
    assert (callback.data.scores is not None) == trusted
    assert trainer.state.global_step == 12 * 5
    trainer.save_model(str(tmp_path / "adapter"))
    assert_loads_in_plain_peft(tmp_path / "adapter", logits(trainer.model))


def test_packed_rows_cannot_be_attached_and_a_line_says_what_can(tmp_path: Path) -> None:
    trainer = make(tmp_path, [], packing=True, packing_strategy="bfd", max_length=16)
    with pytest.raises(tsq.UnsupportedError, match=r"tsqlora\.select"):
        tsq.attach(trainer)


@pytest.mark.parametrize(
    "options",
    [{"padding_free": True, "max_length": None}, {"packing": True, "packing_strategy": "bfd", "max_length": 16}],
    ids=["padding_free", "bfd"],
)
def test_samples_that_share_a_row_are_refused_before_the_first_step(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = make(tmp_path, [], **options)
    trainer.train_dataset = rows = tsq.QualitySubset(trainer.train_dataset, 0.5, seed=0)
    trainer.add_callback(quality_by(rows, weights={"loss": -1.0}))
    with pytest.raises(tsq.UnsupportedError, match=r"1 row\(s\).*tsqlora\.select"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_rows_that_trl_has_cut_out_of_the_text_are_samples(tmp_path: Path) -> None:
    options = {"packing": True, "packing_strategy": "wrapped", "max_length": 6}
    trainer = make(tmp_path, [], max_steps=-1, num_train_epochs=12, **options)
    trainer.train_dataset = rows = tsq.QualitySubset(trainer.train_dataset, 0.5, seed=0)
    trainer.add_callback(quality_by(rows, weights={"loss": -1.0}, scores_path=tmp_path / "s.parquet"))
    trainer.train()
    assert rows.scores is not None
    assert set(rows.scores.labels[:-1].tolist()) == {5}, "of six tokens all but the first; the last row has the rest"
