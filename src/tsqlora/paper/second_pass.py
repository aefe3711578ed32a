"""One pass with gradients: every sample's terms, exactly, in batches."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.libs.shapes import Bool
from tsqlora.model.eval_mode import eval_mode
from tsqlora.model.oom import halves, retry_on_oom
from tsqlora.model.passes import Columns, parts_of, run_pass
from tsqlora.model.request import LookRequest, terms_of_batch
from tsqlora.model.terms import Measured, Term, columns_of
from tsqlora.paper.capture import stepped
from tsqlora.paper.exact import require_exact
from tsqlora.paper.ghost import LayerGradient, layer_gradient
from tsqlora.paper.reference import (
    Reference,
    backward,
    calibrate,
    calibrated,
    measure_reference,
    total_over_sites,
)
from tsqlora.paper.sites import Site, find_sites
from tsqlora.rows.datasets import lengths_of, reference_rows
from tsqlora.tasks import Batch, Task
from tsqlora.tasks.forward import precision, split_labels


def gradient_pass(model: nn.Module, request: LookRequest) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the rule's terms of every row, with the model as it is, and a record of how they were measured.

    The reference is measured first: `convergence` compares with its mean gradient.
    """
    dataset, collate, names = request.dataset, request.collate, request.rows
    task, rule, compute = request.task, request.rule, request.compute
    own, samples = distributed.together(lambda: reference_rows(rule.reference, dataset, rule.seed))
    lengths = distributed.together(lambda: lengths_of(dataset) if names.lengths is None else names.lengths)
    if compute.autocast is torch.float16:  # without the scaling of losses, gradients of single rows are zeros
        compute = replace(compute, autocast=None)
    one_process = replace(compute, parts=None, progress=None, workers=0)
    with eval_mode(model), precision(next(model.parameters()).device, compute.autocast, cache=False):
        batch = distributed.together(lambda: collate(samples[: compute.batch_size]))
        terms = {name: term for name, term in terms_of_batch(rule, task, batch).items() if not term.probe}
        sites = find_sites(model)

        def settle() -> Reference:
            """Measure what the reference settles for all rows: calibration, mean gradient and step size."""
            offsets = calibrate(model, samples, collate, task, one_process) if rule.calibration else None
            retry_on_oom(
                lambda size: require_exact(model, collate(samples[:size]), task, sites, offsets),
                halves(len(samples[: compute.batch_size])),
            )
            reference = measure_reference(model, samples, collate, task, sites, offsets, one_process)
            # Through main memory, since each process has its own device.
            return reference.to(torch.device("cpu")) if distributed.active() else reference

        reference = distributed.once(settle).to(next(model.parameters()).device)

        def measure_batch(indices: np.ndarray, batch: Batch) -> Columns:
            in_reference = torch.from_numpy(np.isin(indices, own))
            return measured_columns(model, batch, task, sites, reference, in_reference, terms)

        values = (names.hashes, list(lengths), list(terms), rule.calibration, rule.seed, own, task)
        parts = parts_of(model, compute, "terms", *values, batches=map(collate, [samples]))
        how = {"lengths": lengths, "phase": "scoring", "parts": parts, "shared": True}
        columns = run_pass(model, measure_batch, dataset, collate, compute, **how)
    record = {
        "seed": rule.seed,
        "eta": reference.eta if reference.mean else None,
        "offsets": None if reference.offsets is None else reference.offsets.tolist(),
        "reference_norm": reference.norm if reference.mean else None,
        "reference_rows": reference.rows,
        "reference": list(own),
        "autocast": None if compute.autocast is None else str(compute.autocast).removeprefix("torch."),
    }
    return columns, record


def measured_columns(
    model: nn.Module,
    batch: Batch,
    task: Task,
    sites: Mapping[str, Site],
    reference: Reference,
    in_reference: Bool[Tensor, " n"],
    terms: Mapping[str, Term],
) -> dict[str, np.ndarray]:
    """Return each term of one batch's rows by a forward and a backward pass; a `lookahead` term costs one more."""
    inputs, labels = split_labels(batch, model)
    lookahead = any(term.lookahead for term in terms.values())
    gradients: dict[str, LayerGradient] = {}
    norms: list[Tensor] = []
    dots: list[Tensor] = []

    def consume(name: str, a: Tensor, b: Tensor) -> None:
        gradient = layer_gradient(a, b, **sites[name].parts)
        norms.append(gradient.norm_sq())
        if name in reference.mean:
            dots.append(gradient.dot(reference.mean[name]))
        if lookahead:
            gradients[name] = gradient

    logits, losses, _ = backward(model, inputs, labels, task, reference.offsets, sites, consume)
    norm_sq, dot = total_over_sites(norms, losses), total_over_sites(dots, losses)
    # The reference's mean without the sample itself, where it is one of the reference's rows.
    without_itself = (dot - norm_sq / reference.rows) * (reference.rows / (reference.rows - 1))
    stepped_loss = None
    if lookahead:
        with torch.no_grad(), stepped(sites, gradients, eta=reference.eta, samples=len(labels)):
            stepped_loss = task.loss(calibrated(model, inputs, task, reference.offsets), labels)
    measured = Measured(
        logits=logits,
        labels=labels,
        loss=losses,
        norm_sq=norm_sq,
        dot=torch.where(in_reference.to(labels.device), without_itself, dot),
        reference_norm=reference.norm,
        stepped_loss=stepped_loss,
    )
    return columns_of(terms, measured)
