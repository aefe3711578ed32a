"""The slow, obvious twins that the fast code is tested against.

One sample at a time, plain autograd, every parameter of θ really stepped; nothing of
tsqlora is imported, so that a mistake there cannot be repeated here.  Equation numbers
are those of METHOD.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
SampleLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SlowScores:
    """What `slow_scores` found for n samples; all tensors are (n,) in float64 on the CPU.

    loss: of each sample, with the offsets applied.  gradient_norm: N, eq. 1.  loss_reduction: D, eq. 2.
    convergence: C, eq. 3.  eta: the step used in D.  reference_norm: ‖ḡ‖ over all m rows of
    the reference.
    """

    loss: Tensor
    gradient_norm: Tensor
    loss_reduction: Tensor
    convergence: Tensor
    eta: float
    reference_norm: float


# --- scores of samples, eq. 1 to 3 --------------------------------------------------------


def slow_multi_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over a sample's k labels of -log p where the label is 1, of -log(1 - p) where it is 0."""
    losses = []
    for z, y in zip(logits, labels, strict=True):
        p = 1 / (1 + torch.exp(-z))
        losses.append(-torch.log(p) if y == 1 else -torch.log(1 - p))
    return torch.stack(losses).mean()


def slow_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of -log p(tag) over a row's tokens with a tag."""
    tagged = [(z, y) for z, y in zip(logits, labels.tolist(), strict=True) if y != -100]
    return torch.stack([z.exp().sum().log() - z[y] for z, y in tagged]).mean()


class SlowPair(nn.Module):
    """A model of preference pairs: one logit, log p(chosen) - log p(rejected) minus the reference model's.

    `answers` are token ids and labels of the two, the first label never a target.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, answers: Sequence[tuple[list[int], list[int]]], reference: float | None) -> Tensor:
        chosen, rejected = (self._log_p(*answer) for answer in answers)
        ratio = chosen - rejected
        return (ratio - (ratio.detach() if reference is None else reference)).reshape(1)

    def _log_p(self, ids: list[int], labels: list[int]) -> Tensor:
        logits = self.model(input_ids=torch.tensor([ids])).logits[0]
        places = [t for t, label in enumerate(labels) if label != -100]
        return torch.stack([logits[t - 1][ids[t]] - logits[t - 1].exp().sum().log() for t in places]).sum()


def slow_dpo_loss(beta: float) -> SampleLoss:
    """Of a SlowPair's logit m, -log(1 / (1 + exp(-beta m))); the labels are not read."""
    return lambda logit, _: -torch.log(1 / (1 + torch.exp(-beta * logit)))


def slow_scores(
    model: nn.Module,
    batches_of_one: Sequence[Batch],
    *,
    sample_loss: SampleLoss,
    theta: Mapping[str, nn.Parameter],
    reference: Sequence[int],
    offsets: Tensor | None = None,
    eta: float | None = None,
) -> SlowScores:
    """N, D and C of every sample (eq. 1, 2, 3) for the parameters named in `theta`.

    `batches_of_one[i]` holds the model's keyword arguments for sample i alone, and its
    "labels".  `sample_loss(logits, labels)` returns shape (1,).  `theta` may be frozen when
    it arrives; a parameter listed twice counts once.  `reference` are indices into
    `batches_of_one`, each once; a sample in it is taken out of its own ḡ.  `offsets` is added to the logits.
    `eta` defaults to ½ Σℓ / ΣN² over the reference.

    The model is scored in eval mode and left as it was: weights bit for bit, modes, frozen
    flags, `.grad`.
    """
    assert len(set(reference)) == len(reference) > 1
    parameters = _each_once(theta.values())

    def loss_of(batch: Batch) -> Tensor:
        return _loss(model, batch, sample_loss, offsets)

    with _eval_mode(model), _trainable(parameters):
        losses, gradients = [], []
        for batch in batches_of_one:
            loss, gradient = _loss_and_gradient(loss_of, batch, parameters)
            losses.append(loss)
            gradients.append(gradient)
        norms = [_flat(gradient).norm() for gradient in gradients]
        if eta is None:
            eta = 0.5 * sum(losses[i] for i in reference) / sum(float(norms[i]) ** 2 for i in reference)
        reductions = []
        for i, batch in enumerate(batches_of_one):
            after = _loss_after_step(loss_of, batch, parameters, gradients[i], eta)
            reductions.append(losses[i] - after)

    convergence, reference_norm = _convergence([_flat(g) for g in gradients], reference)
    return SlowScores(
        loss=torch.tensor(losses, dtype=torch.float64),
        gradient_norm=torch.stack(norms),
        loss_reduction=torch.tensor(reductions, dtype=torch.float64),
        convergence=convergence,
        eta=eta,
        reference_norm=reference_norm,
    )


def _loss_after_step(
    loss_of: Callable[[Batch], Tensor],
    batch: Batch,
    parameters: Sequence[Tensor],
    gradient: Sequence[Tensor],
    eta: float,
) -> float:
    """The loss at θ - η·gradient, the second half of eq. 2; θ is put back bit for bit."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        try:
            for parameter, g in zip(parameters, gradient, strict=True):
                parameter.sub_(eta * g)
            return float(loss_of(batch))
        finally:
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def _convergence(gradients: Sequence[Tensor], reference: Sequence[int]) -> tuple[Tensor, float]:
    """C of eq. 3, leave-one-out inside the reference, and ‖ḡ‖; the gradients are flat."""
    m = len(reference)
    mean = torch.stack([gradients[i] for i in reference]).mean(dim=0)
    norm = float(mean.norm())
    values = []
    for i, gradient in enumerate(gradients):
        product = float(gradient @ mean)
        if i in reference:
            product = (product - float(gradient @ gradient) / m) * m / (m - 1)
        values.append(product / norm)
    return torch.tensor(values, dtype=torch.float64), norm


# --- calibration --------------------------------------------------------------------------


def slow_calibration(logits: Tensor, labels: Tensor) -> Tensor:
    """One constant per class such that mean predicted probabilities are the class frequencies.

    logits (n, classes), labels (n,) of integers, each class among them.  Returns (classes,) in float64, summing to 0.

    Found by minimising the mean cross-entropy of logits + o over o alone.  That function is
    convex, and its derivative with respect to o_c is mean_i p_ic - frequency_c: at the
    optimum, and nowhere else, the two are equal.  A constant added to all of o changes
    nothing, so o is centred.
    """
    logits = logits.detach().double()
    offsets = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [offsets], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits + offsets, labels)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    offsets = offsets.detach() - offsets.detach().mean()
    frequency = torch.bincount(labels, minlength=logits.shape[1]).double() / len(labels)
    torch.testing.assert_close((logits + offsets).softmax(dim=1).mean(dim=0), frequency, atol=1e-7, rtol=0)
    return offsets


# --- sensitivity of layers, eq. 6 ---------------------------------------------------------


def slow_contradictions(features: np.ndarray, labels: np.ndarray, near: float) -> list[tuple[float, int, int]]:
    """Pairs of rows with different labels and a cosine of at least `near`, after centring; the nearest first."""
    rows = [row - features.mean(axis=0) for row in features.astype(np.float64)]
    pairs = []
    for b in range(len(rows)):
        for a in range(b):
            cosine = float(rows[a] @ rows[b] / max(np.linalg.norm(rows[a]) * np.linalg.norm(rows[b]), 1e-12))
            if cosine >= near and labels[a] != labels[b]:
                pairs.append((cosine, a, b))
    return sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))


def slow_sensitivity(
    model: nn.Module,
    batches_of_one: Sequence[Batch],
    *,
    sample_loss: SampleLoss,
    layers: Mapping[str, nn.Module],
    effective_weight: Callable[[nn.Module], Tensor],
) -> dict[str, float]:
    """Eq. 6: for each layer the mean over entries of E_x |W ⊙ ∇_W loss_x|, W the effective weight.

    `effective_weight(layer)` is W + s·BA as (o, i), also where the layer stores it transposed.
    The model is run in eval mode and left as it was.
    """
    with _eval_mode(model), _weights_as_leaves(layers, effective_weight) as leaves:
        totals = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
        for batch in batches_of_one:
            loss_of = lambda batch: _loss(model, batch, sample_loss, None)  # noqa: E731
            _, gradient = _loss_and_gradient(loss_of, batch, list(leaves.values()))
            for (name, leaf), g in zip(leaves.items(), gradient, strict=True):
                totals[name] += (leaf.detach().double() * g.double()).abs()
    return {name: float((total / len(batches_of_one)).mean()) for name, total in totals.items()}


# --- drawing without replacement ----------------------------------------------------------


def slow_successive_sampling(p: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k different indices, one after the other, each from p renormalised over those left.

    p (n,) need not sum to 1.  Returns (k,) in the order drawn.  This is what Gumbel top-k on
    log p must equal in distribution.
    """
    left = np.array(p, dtype=np.float64)
    drawn = np.empty(k, dtype=np.int64)
    for position in range(k):
        drawn[position] = rng.choice(len(left), p=left / left.sum())
        left[drawn[position]] = 0.0
    return drawn


# --- the importance of slots --------------------------------------------------------------


def slow_importance(theta_times_grad_by_step: Sequence[Tensor], beta: float) -> Tensor:
    """Î·Û of slots that are all as old as the sequence is long (METHOD 4.1; AdaLoRA's Ī·Ū).

    The t-th tensor (slots,) is I_t, the importance at step t, already normalised.
    Ī_t = β Ī_{t-1} + (1-β) I_t and Î_t = Ī_t / (1-β^t); Ū_t = β Ū_{t-1} + (1-β) |I_t - Î_t|
    and Û_t = Ū_t / (1-β^t).  One step has no uncertainty yet: the result is 0.
    """
    mean = torch.zeros_like(theta_times_grad_by_step[0])
    uncertainty = torch.zeros_like(mean)
    for t, importance in enumerate(theta_times_grad_by_step, start=1):
        correction = 1 - math.pow(beta, t)
        mean = beta * mean + (1 - beta) * importance
        uncertainty = beta * uncertainty + (1 - beta) * (importance - mean / correction).abs()
    return (mean / correction) * (uncertainty / correction)


# --- ElaLoRA's rule -----------------------------------------------------------------------


@dataclass
class SlowTriplet:
    """One triplet: its λ, then its row of Q, then its column of P, each number with its Ī and Ū."""

    mean: list[list[float]]
    spread: list[list[float]]

    @classmethod
    def new(cls, inputs: int, outputs: int) -> "SlowTriplet":
        sizes = (1, inputs, outputs)
        return cls([[0.0] * size for size in sizes], [[0.0] * size for size in sizes])

    def take(self, importance: Sequence[Sequence[float]], beta: float) -> None:
        """Ī ← β Ī + (1-β) I, and then Ū ← β Ū + (1-β) |I - Ī|, for |p·∇p| of each number."""
        for part, values in enumerate(importance):
            for j, value in enumerate(values):
                mean = beta * self.mean[part][j] + (1 - beta) * value
                self.mean[part][j] = mean
                self.spread[part][j] = beta * self.spread[part][j] + (1 - beta) * abs(value - mean)

    def score(self) -> float:
        """s(λ) plus the mean of s over each vector, s = Ī·Ū."""
        parts = [
            [m * u for m, u in zip(means, spreads, strict=True)]
            for means, spreads in zip(self.mean, self.spread, strict=True)
        ]
        return sum(sum(part) / len(part) for part in parts)


def slow_elalora_rule(
    scores: Mapping[str, Sequence[float]], *, b: int, k: int
) -> tuple[list[tuple[str, int]], list[str]]:
    """(pruned, expanded): triplets that go, and the matrices that gain a rank, one entry a rank.

    1. From each matrix of rank r its min(k, r - 1) lowest triplets.  2. All of these are one
    pool; its b smallest are pruned.  3. Each of its b largest marks its matrix to be expanded by one.
    Among equal scores the first is the smaller.
    """
    pool = [
        (matrix, j)
        for matrix, values in scores.items()
        for j in sorted(range(len(values)), key=values.__getitem__)[: min(k, len(values) - 1)]
    ]
    ordered = sorted(pool, key=lambda triplet: scores[triplet[0]][triplet[1]])
    return ordered[:b], [matrix for matrix, _ in ordered[len(ordered) - min(b, len(ordered)) :]]


def slow_elalora_run(
    importances: Sequence[Mapping[str, Sequence[Sequence[Sequence[float]]]]],
    shapes: Mapping[str, tuple[int, int]],
    *,
    first: int,
    last: int,
    interval: int,
    b0: int,
    k: int,
    beta: float,
) -> tuple[list[dict[str, int]], dict[str, list[float]]]:
    """Ranks after each step of a run whose |p·∇p| were recorded, and the triplets' scores at its end.

    `importances[t][matrix][j]` are those of triplet j at step t: of its λ, its row of Q and its column of
    P.  Scores are taken in at t < last.  At multiples of the interval with first < t < last,
    b(t) = round(b0 (1 - p³)) with p = (t - first) / (last - first) ranks move: pruned triplets are
    taken out, new ones come last, with nothing remembered of them.
    """
    matrices = {name: [SlowTriplet.new(*shapes[name]) for _ in triplets] for name, triplets in importances[0].items()}
    ranks = []
    for t, step in enumerate(importances):
        if t < last:
            for name, triplets in matrices.items():
                for triplet, importance in zip(triplets, step[name], strict=True):
                    triplet.take(importance, beta)
        if first < t < last and t % interval == 0:
            p = (t - first) / (last - first)
            scores = {name: [triplet.score() for triplet in triplets] for name, triplets in matrices.items()}
            pruned, expanded = slow_elalora_rule(scores, b=round(b0 * (1 - p**3)), k=k)
            for name in matrices:
                matrices[name] = [x for j, x in enumerate(matrices[name]) if (name, j) not in pruned]
            for name in expanded:
                matrices[name].append(SlowTriplet.new(*shapes[name]))
        ranks.append({name: len(triplets) for name, triplets in matrices.items()})
    return ranks, {name: [triplet.score() for triplet in triplets] for name, triplets in matrices.items()}


# --- what they share ----------------------------------------------------------------------


def _loss(model: nn.Module, batch: Batch, sample_loss: SampleLoss, offsets: Tensor | None) -> Tensor:
    """The loss of one sample as a scalar."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    output = model(**inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    if offsets is not None:
        logits = logits + offsets.to(logits)
    (loss,) = sample_loss(logits, batch["labels"])
    return loss


def _loss_and_gradient(
    loss_of: Callable[[Batch], Tensor], batch: Batch, parameters: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """The loss and its gradient for each parameter; zero where the loss does not depend on it."""
    with torch.enable_grad():
        loss = loss_of(batch)
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(parameters, gradient, strict=True)
    return float(loss.detach()), [torch.zeros_like(p) if g is None else g for p, g in pairs]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).double().cpu() for tensor in tensors])


def _each_once(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Without repeats: a tied parameter under two names is one parameter, stepped once."""
    return list({id(parameter): parameter for parameter in parameters}.values())


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module's training flag off, and afterwards each as it was."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)


@contextmanager
def _weights_as_leaves(
    layers: Mapping[str, nn.Module], effective_weight: Callable[[nn.Module], Tensor]
) -> Iterator[dict[str, nn.Parameter]]:
    """Each layer computes F.linear(x, V, bias) inside the `with`, or looks up columns of V, a leaf copy of its
    effective weight.

    W + s·BA is no parameter of the model, so V stands in for it: what autograd gives for V
    is ∇_W, summed over all the calls of a layer in one forward.
    """
    leaves = {name: nn.Parameter(effective_weight(layer).detach().clone()) for name, layer in layers.items()}
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(_replacing_hook(name, leaves[name])))
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def _replacing_hook(name: str, weight: nn.Parameter) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    checked = False

    def replace(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal checked
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if isinstance(base, nn.Embedding):
            replaced = F.embedding(inputs[0], weight.T, base.padding_idx)
        else:
            replaced = F.linear(inputs[0], weight, base.bias)
        if not checked:
            # Only at the first call: later the weight may have been stepped.
            _check_same(name, output, replaced)
            checked = True
        return replaced

    return replace


def _check_same(name: str, output: Tensor, replaced: Tensor) -> None:
    """The effective weight must give what the layer gave, else every number here is of another model."""
    if output.shape != replaced.shape:
        raise ValueError(f"{name} gives {tuple(output.shape)}, its weight {tuple(replaced.shape)}")
    error = float((output - replaced).detach().abs().max())
    allowed = math.sqrt(torch.finfo(output.dtype).eps) * float(output.detach().abs().max())
    if not error <= allowed:
        raise ValueError(f"{name} and its effective weight differ by {error:.1e}, more than {allowed:.1e}")
