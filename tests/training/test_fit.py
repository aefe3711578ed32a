"""One run in the stock Trainer: its arguments, its costs, and samples that share a row."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartForSequenceClassification, TrainerCallback

from byte_tokenizers import byte_tokenizer
from models import generating, tiny_bart
from runs import make_rows, set_up, write_config, write_jsonl
from stock import Poison
from tsqlora import record as records
from tsqlora.errors import SettingsError
from tsqlora.settings import Config, load_config
from tsqlora.tasks import TASKS
from tsqlora.tasks.classification import Classification
from tsqlora.training import fit
from tsqlora.training import run as run_fit
from tsqlora.training.command import train
from tsqlora.training.job import load, method_of
from tsqlora.training.run import begin, hardware_has_bf16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return set_up(tmp_path_factory.mktemp("fit"), rows=60)


QUICK = {"epochs": 6, "batch_size": 8, "learning_rate": 0.02, "bf16": False, "logging_strategy": "no"}


def settings(place: Path, **sections: Any) -> Config:
    return load_config(write_config(place / "c.yaml", place / "model", place / "train.jsonl", **sections))


class Counted:
    """A fit's logs and counts, and what really went through the model."""

    def __init__(
        self, config: Config, run: Path, *, resume_from: Path | None = None, also: TrainerCallback | None = None
    ) -> None:
        args, loaded = run_fit.arguments(config, run), load(config)
        method = method_of(loaded, run / "scores.parquet")
        self.data, self.quality, self.ranks = method.data, method.quality, method.ranks
        loaded = loaded.with_adapter()
        model, self.record = loaded.model, begin(loaded, args, method)
        self.told: list[tuple[str, int, int]] = []
        self.rows = self.tokens = 0
        counting = model.base_model.model.register_forward_pre_hook(self._count, with_kwargs=True)
        try:
            fit.fit(
                loaded,
                args,
                method,
                self.record,
                also=[also or TrainerCallback()],
                progress=lambda phase, done, total, _pulse=None: self.told.append((phase, done, total)),
                resume_from=resume_from,
            )
        finally:
            counting.remove()

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.rows += len(kwargs["input_ids"])
        self.tokens += int(kwargs["attention_mask"].sum())

    def cost(self, name: str) -> list[int]:
        return [getattr(cost, name) for cost in self.record.cost.values()]


@pytest.fixture(scope="module")
def counted(place: Path) -> Counted:
    return Counted(settings(place), place / "run")


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_rows_and_tokens_that_are_charged_went_through_the_model(
    preset: str, place: Path, tmp_path: Path, counted: Counted
) -> None:
    made = counted if preset == "default" else Counted(settings(place, quality={"preset": "paper"}), tmp_path)
    assert made.quality is not None
    # Before each look a batch or two is checked, which are not charged.
    checked = made.rows - sum(made.cost("forward"))
    assert 0 <= checked <= 5 * 54 * (len(made.quality.looks) + 1)  # batches of the evaluation: all rows
    longest = max(made.data.lengths or [0])
    assert 0 <= made.tokens - sum(made.cost("tokens")) <= checked * longest


def test_phases_are_those_of_the_plan_and_progress_tells_every_step(counted: Counted) -> None:
    assert counted.told == [("training", step, 24) for step in range(1, 25)]
    assert list(counted.record.cost) == ["look", "ranks", "training"]
    assert counted.record.skipped == {}
    assert all(seconds > 0 for seconds in counted.cost("seconds"))
    planned = counted.record.plan["passes"]
    assert counted.cost("forward") == [planned[phase]["forward"] for phase in counted.record.cost]
    assert counted.cost("backward") == [planned[phase]["backward"] for phase in counted.record.cost]


def test_costs_are_whole_also_where_a_save_comes_within_an_epoch_or_at_its_last_step(
    place: Path, tmp_path: Path
) -> None:
    config = settings(place, training={**QUICK, "save_strategy": "steps", "save_steps": 10, "save_total_limit": 20})
    whole = Counted(config, tmp_path)
    for name in ("forward", "backward"):
        assert whole.cost(name) == [passes[name] for passes in whole.record.plan["passes"].values()]
    for step in (10, 20):
        resumed = Counted(config, tmp_path, resume_from=tmp_path / "checkpoints" / f"checkpoint-{step}")
        for name in ("forward", "backward", "tokens"):
            assert resumed.cost(name) == whole.cost(name)


class FirstGradient(TrainerCallback):
    """The gradient's norm at the first step, without dropout; then the training ends."""

    norm = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for module in kwargs["model"].modules():
            rates = [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
            for name in ["p"] if isinstance(module, torch.nn.Dropout) else rates:
                setattr(module, name, 0.0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        self.norm = float(torch.nn.utils.get_total_norm(grads))
        control.should_training_stop = True


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_accumulated_batches_have_the_gradient_of_one(smoothing: float, place: Path, tmp_path: Path) -> None:
    """Of all 54 rows that are trained on, so that the order does not matter."""
    norms = []
    for accumulate in (1, 3):
        sizes = {"batch_size": 54 // accumulate, "gradient_accumulation_steps": accumulate, "max_grad_norm": 0.0}
        sizes["label_smoothing_factor"] = smoothing
        first = FirstGradient()
        off = {"quality": {"enabled": False, "fraction": 1.0}, "ranks": {"policy": "fixed"}}
        counted = Counted(settings(place, training=QUICK | sizes, **off), tmp_path / str(accumulate), also=first)
        assert len(counted.data) == 54
        norms.append(first.norm)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def arguments(**further: Any) -> Any:
    training = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 4, "bf16": False, "seed": 3}
    sections = {"model": {"path": "m"}, "data": {"train": "t"}, "training": training | further}
    return run_fit.arguments(Config.model_validate(sections), Path("nowhere"))


def test_rows_come_in_the_order_of_the_draw_and_further_fields_win_over_our_defaults() -> None:
    args = arguments(save_strategy="no", disable_tqdm=False, weight_decay=0.1)
    assert (args.save_strategy.value, args.disable_tqdm, args.weight_decay) == ("no", False, 0.1)
    assert args.train_sampling_strategy == "sequential"


@pytest.mark.parametrize("wrong", [{"save_strategy": "often"}, {"eval_strategy": "no", "load_best_model_at_end": True}])
def test_arguments_that_the_trainer_refuses_are_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="training: "):
        arguments(**wrong)


def test_who_asks_for_fp16_alone_does_not_get_bfloat16_beside_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_fit, "hardware_has_bf16", lambda: True)
    unsaid = {**QUICK, "bf16": None}
    assert run_fit.arguments(settings(place, training=unsaid), tmp_path).bf16
    args = run_fit.arguments(settings(place, training={**unsaid, "fp16": True}), tmp_path)
    assert (args.fp16, args.bf16) == (True, False)


def test_an_encoder_with_a_decoder_is_evaluated_between_epochs_by_its_logits(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(opens=False, closes=True)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = generating(BartForSequenceClassification, tiny_bart(), torch.float32, decoder_start_token_id=2, **sizes)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = write_config(
        tmp_path / "c.yaml",
        tmp_path / "model",
        write_jsonl(tmp_path / "train.jsonl", make_rows(20)),
        quality={"enabled": False, "fraction": 1.0},
        ranks={"policy": "fixed", "mean": 2.0},
        training={**QUICK, "epochs": 1, "eval_strategy": "epoch"},
    )
    assert "accuracy" in train(load_config(config, ["data.max_length=16"]), tmp_path / "run").metrics["validation"]


@pytest.mark.parametrize(
    ("cuda", "features", "expected"),
    [
        (True, {}, True),
        (None, {"avx512_bf16": True}, True),
        (None, {"amx_bf16": True}, True),
        (None, {"avx512_bf16": False, "avx2": True}, False),
        (False, {"avx512_bf16": True}, False),
    ],
)
def test_bfloat16_is_used_where_the_hardware_computes_in_it(
    cuda: bool | None, features: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bool(cuda))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert hardware_has_bf16() is expected


def test_of_many_losses_every_so_many_th_is_kept_and_every_evaluation() -> None:
    history = [{"step": j, "loss": 1.0} for j in range(3 * records.MOST_ENTRIES)]
    history.insert(7, {"step": 7, "eval_loss": 1.0})
    retained = records.logged(history)
    assert len(retained) <= records.MOST_ENTRIES + 1
    assert retained[0]["step"] == 0
    assert {"step": 7, "eval_loss": 1.0} in retained


def test_what_json_has_not_is_not_in_the_record() -> None:
    steps = [
        {"step": 10, "loss": 0.5, "grad_norm": float("inf"), "words": "a", "list": [1]},
        {"step": 20, "loss": float("nan"), "grad_norm": 1.0},
    ]
    assert records.logged(steps) == [{"step": 10, "loss": 0.5}, {"step": 20, "grad_norm": 1.0}]


def test_the_record_has_what_the_trainer_logged_and_the_skipped_steps_and_stdout_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logging = QUICK | {"logging_strategy": "steps", "logging_steps": 4, "eval_strategy": "epoch", "disable_tqdm": False}
    config = settings(place, training=logging, quality={"enabled": False})
    record = Counted(config, tmp_path, also=Poison(3, 14)).record
    assert capsys.readouterr().out == ""
    assert record.skipped == {"count": 2, "steps": [{"step": 3}, {"step": 14}]}
    assert "2 steps were skipped whose loss or gradient was not finite: step 3, 14" in record.notes
    history = record.history
    losses = [entry["step"] for entry in history if "loss" in entry]
    assert losses == list(range(4, losses[-1] + 1, 4))
    assert len(losses) > 2
    assert sum("eval_accuracy" in entry for entry in history) == QUICK["epochs"]
    assert not {name for entry in history for name in entry if "runtime" in name or "per_second" in name}
    assert len(history) == len(losses) + QUICK["epochs"], "no entry besides"


class Twice(Classification):
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 2 * Classification.loss(self, logits, labels)


def test_a_loss_that_is_not_the_models_own_is_that_of_the_task(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "twice", lambda: Twice(name="twice"))
    training = QUICK | {"max_steps": 1, "gradient_accumulation_steps": 2, "logging_strategy": "steps"}
    losses = list[float]()
    for task in ("sequence-classification", "twice"):
        sections = {"task": {"type": task}, "training": training | {"logging_steps": 1}, "ranks": {"policy": "fixed"}}
        record = train(settings(place, **sections), place / task)
        losses += [log["loss"] for log in record.history if "loss" in log]
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-3)
