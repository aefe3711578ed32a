"""What tests of scoring share: models that have learned something, the slow twin, all that must not change."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import tsqlora as tsq
from models import collate
from oracles import SampleLoss, SlowScores, slow_calibration, slow_scores, slow_sensitivity
from tsqlora import paper
from tsqlora.auditing.scores import Scores
from tsqlora.model.request import Compute, RowNames, ScoringRule
from tsqlora.paper.terms import PAPER_TERMS

Rows = Sequence[dict[str, Any]]


def teach(model: nn.Module, rows: Rows, *, sharpness: float = 3.0) -> None:
    """Gives the rows labels that the model has learned, after making its head surer of itself.

    Logits get this standard deviation, and mean 0 where the head has a bias. The label is the
    model's prediction; for one output with noise, an eighth as wide as predictions are.
    """
    head = {n: p for n, p in model.named_parameters() if p.requires_grad and ("classifi" in n or "score" in n)}
    # Of a head of two layers the last.
    head = {n: p for n, p in head.items() if "out_proj" in n} or head
    logits = logits_of(model, rows)
    factor = sharpness / float((logits - logits.mean(0)).std())
    with torch.no_grad():
        for name, parameter in head.items():
            parameter.mul_(factor)
            if name.endswith("bias"):
                parameter.sub_(factor * logits.mean(0))
    logits = logits_of(model, rows)
    noise = np.random.default_rng(0).standard_normal(len(rows)) * float(logits.std()) / 8
    labels = (logits[:, 0].numpy() + noise) if logits.shape[1] == 1 else logits.argmax(1).numpy()
    for row, label in zip(rows, labels.tolist(), strict=True):
        row["labels"] = label


def logits_of(model: nn.Module, rows: Rows) -> Tensor:
    """Logits in eval mode, one row at a time; the modes are put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        parts = [
            model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            for batch in (collate([row]) for row in rows)
        ]
    for module, training in modes:
        module.training = training
    return torch.cat(parts)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.squeeze(-1) - labels) ** 2


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def head(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained in addition to LoRA."""
    return {name: p for name, p in trainable(model).items() if "lora_" not in name}


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def slow(
    model: nn.Module,
    rows: Rows,
    reference: Sequence[int],
    *,
    offsets: Tensor | None = None,
    loss: SampleLoss = cross_entropy,
) -> SlowScores:
    """The oracle's scores."""
    batches = [collate([row]) for row in rows]
    theta = trainable(model)
    return slow_scores(model, batches, sample_loss=loss, theta=theta, reference=reference, offsets=offsets)


def effective_weight(layer: Any) -> Tensor:
    """W + s·BA as out × in."""
    weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
    return weight.T if layer.fan_in_fan_out or isinstance(layer.get_base_layer(), nn.Embedding) else weight


def slow_layers(
    model: nn.Module,
    rows: Rows,
    *,
    loss: SampleLoss = cross_entropy,
    label_dtype: torch.dtype | None = None,
    weight: Callable[[Any], Tensor] = effective_weight,
) -> dict[str, float]:
    """The oracle's sensitivity of each layer with LoRA, by its name in the base model."""
    batches = [collate([row], label_dtype=label_dtype) for row in rows]
    layers = {name.removeprefix("base_model.model."): layer for name, layer in lora_layers(model).items()}
    return slow_sensitivity(model, batches, sample_loss=loss, layers=layers, effective_weight=weight)


def slow_offsets(model: nn.Module, rows: Rows) -> Tensor:
    """Of classification: calibration on these rows."""
    return slow_calibration(logits_of(model, rows), torch.tensor([row["labels"] for row in rows]))


def assert_agree(scores: Scores, twin: SlowScores, *, rtol: float = 1e-5, rows: int | None = None) -> None:
    """The paper's terms, the loss, η and ‖ḡ‖ are the twin's, whose first rows were scored."""
    for name in ("loss", "gradient_norm", "loss_reduction", "convergence"):
        expected = getattr(twin, name)[:rows].numpy()
        np.testing.assert_allclose(
            scores.terms[name], expected, rtol=rtol, atol=rtol * np.abs(expected).max(), err_msg=name
        )
    assert abs(scores.record.eta / twin.eta - 1) < rtol
    assert abs(scores.record.reference_norm / twin.reference_norm - 1) < rtol


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that scoring must leave alone."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(module, kind)) for kind in hooks] for name, module in model.named_modules()},
        "attributes": {name: plain(vars(module)) for name, module in model.named_modules()},
        "config": str(getattr(model, "config", None)),
        "torch": torch.random.get_rng_state(),
        "numpy": np.random.get_state()[1],
    }


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = fingerprint(model)
    for name, value in before.items():
        assert_same(value, after[name], name)


def assert_same(left: Any, right: Any, name: str) -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right), name
    elif isinstance(left, np.ndarray):
        assert np.array_equal(left, right), name
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), name
        for key, value in left.items():
            assert_same(value, right[key], f"{name} {key}")
    else:
        assert left == right, name


def score_by(
    model: Any, dataset: Any, collate: Any, *, task: Any = None, trusted: Any = None, **options: Any
) -> Scores:
    """`tsqlora.score` with the fields of its rule, its rows' names and its computing as options."""
    arguments = _values({"terms": PAPER_TERMS} | options)
    return paper.score(model, dataset, collate, task=task, trusted=trusted, **arguments)


def quality_by(data: Any, **options: Any) -> tsq.QualityCallback:
    """The same for `QualityCallback`."""
    own = {name: options.pop(name) for name in ("task", "scores_path", "progress", "collate") if name in options}
    return tsq.QualityCallback(data, **own, **_values(options))


def drawing(data: Any) -> tsq.QualityCallback:
    """A callback that draws random rows, without a look."""
    return quality_by(data, select=False, head_start=False)


def _values(options: dict[str, Any]) -> dict[str, Any]:
    kinds = {"rule": ScoringRule, "rows": RowNames, "compute": Compute}
    result = {
        name: kind(**{f.name: options.pop(f.name) for f in fields(kind) if f.name in options})
        for name, kind in kinds.items()
        if any(f.name in options for f in fields(kind))
    }
    assert not options, options
    return result
