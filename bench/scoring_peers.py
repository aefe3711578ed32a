"""What others do to score rows, on the model and the rows of bench/scoring.py: a loop, torch.func, Opacus, bergson.

Each returns some of "norm", "dot" (with the mean gradient of the target set) and "cosine" (the dot over the norm), so
that scoring.py can check that it computes what we compute.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Scores = dict[str, Tensor]


def loop(bench: Any) -> Scores:
    """A LESS-like loop at batch 1: gradient norm and alignment with the target set, one row at a time, by autograd.

    These are the two numbers of our "norm + convergence". LESS itself adds Adam's moments and a random projection to
    the gradient of each row, so that it costs more than this.
    """
    bench.model.eval()
    target = bench.once("target", bench.target)
    norms, dots = [], []
    for j in range(bench.rows):
        with bench.autocast():
            row = {name: value[j : j + 1] for name, value in bench.inputs.items()}
            loss = bench.losses(bench.model(**row).logits.float(), bench.labels[j : j + 1])
        grads = torch.autograd.grad(loss.sum(), list(bench.theta.values()))
        norms.append(torch.stack([g.square().sum() for g in grads]).sum())
        dots.append(torch.stack([(g * t).sum() for g, t in zip(grads, target.values(), strict=True)]).sum())
    return {"norm": torch.stack(norms).sqrt(), "dot": torch.stack(dots)}


def vmap(bench: Any) -> Scores:
    """torch.func: vmap over rows of grad of one row's loss."""
    bench.model.eval()
    theta = {n: p.detach() for n, p in bench.theta.items()}
    rest = {n: p.detach() for n, p in bench.model.named_parameters() if n not in theta}
    rest |= dict(bench.model.named_buffers())
    # Ready-made: transformers' own masks look at values, which vmap cannot.
    mask = torch.ones(1, 1, bench.length, bench.length, dtype=torch.bool)
    mask = mask.tril() if bench.offsets is None else mask

    def loss(parameters: dict[str, Tensor], ids: Tensor, label: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "attention_mask": mask}
        output = torch.func.functional_call(bench.model, (parameters, rest), (), inputs)
        return bench.losses(output.logits.float(), label[None]).sum()

    with bench.autocast(cache=False):
        grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(theta, bench.inputs["input_ids"], bench.labels)
    return {"norm": torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()}


def opacus(bench: Any) -> Scores:
    """Opacus' GradSampleModule, its per-sample gradients reduced to a norm; without dropout."""
    from opacus import GradSampleModule

    with bench.without_dropout():
        # It sees nothing in evaluation mode.
        wrapped = GradSampleModule(bench.model.train(), loss_reduction="sum", strict=False)
        try:
            with bench.autocast(cache=False):
                logits = wrapped(**bench.inputs).logits.float()
            bench.losses(logits, bench.labels).sum().backward()
            parts = [p.grad_sample.flatten(1).float().square().sum(1) for p in bench.theta.values()]
            return {"norm": torch.stack(parts).sum(0).sqrt()}
        finally:
            wrapped.to_standard_module()
            bench.model.zero_grad()


def bergson(bench: Any) -> Scores:
    """bergson's collector in memory and its scorer with `unit_normalize`: dot with the target set over the norm.

    Gradients are exact, as by default in its `score`, without its random projection. The loss is ours, since its own
    serves causal models alone.
    """
    from bergson import IndexConfig, InMemoryCollector, Scorer
    from bergson.score.score_writer import InMemorySequenceScoreWriter

    query = bench.once("bergson", lambda: bergson_query(bench))
    writer = InMemorySequenceScoreWriter(bench.rows, 1)
    scorer = Scorer(query, list(query), writer, torch.device("cpu"), torch.float32, unit_normalize=True)
    with bench.autocast():
        _collect(bench, InMemoryCollector, data=range(bench.rows), cfg=IndexConfig(run_path=""), scorer=scorer)
    return {"cosine": writer.scores[:, 0]}


def bergson_query(bench: Any) -> dict[str, Tensor]:
    """Mean gradient of the target set by module, as bergson's collector for queries gives it."""
    from bergson.collector.gradient_collectors import TraceCollector

    # Not in bfloat16: it clamps to the bounds of float32.
    with torch.autocast("cpu", enabled=False):
        collector = _collect(bench, TraceCollector, device="cpu", dtype=torch.float32)
    return {name: torch.cat(rows).mean(0, keepdim=True) for name, rows in collector.mod_grads.items()}


def _collect(bench: Any, kind: type, **settings: Any) -> Any:
    """One forward and backward pass under a collector of bergson."""
    from bergson import GradientProcessor

    modules = {name.removeprefix("base_model.").rpartition(".")[0] for name in bench.theta}
    processor = GradientProcessor(include_bias=True)
    collector = _with_2d(kind)(model=bench.model.base_model, target_modules=modules, processor=processor, **settings)
    bench.model.eval()
    with collector.with_batch(torch.ones_like(bench.inputs["input_ids"], dtype=torch.bool)):
        losses = bench.losses(bench.model(**bench.inputs).logits.float(), bench.labels)
        losses.sum().backward()
    bench.model.zero_grad()
    collector.process_batch(list(range(bench.rows)), losses=losses)
    return collector


def _with_2d(base: type) -> type:
    """The collector for pooler and head, too: bergson 2.5.1 refuses layers that see one vector a row.

    It also fails when it removes its marks through PEFT's wrapper of a new head, so that they are removed first.
    """

    def tokens(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x[:, None] if x.dim() == 2 else x for x in values)

    class Collector(base):
        def _process_input(self, module: nn.Module, inp: tuple[Tensor, ...], out: Any) -> None:
            super()._process_input(module, tokens(inp), out)

        def _process_grad(self, module: nn.Module, grad_in: Any, grad_out: tuple[Tensor, ...]) -> None:
            super()._process_grad(module, grad_in, tokens(grad_out))

        def __exit__(self, *error: Any) -> Any:
            for name in self.target_info:
                vars(self.model.get_submodule(name)).pop("_name", None)
            return super().__exit__(*error)

    return Collector


PEERS: dict[str, Callable[[Any], Scores]] = {
    "loop at batch 1": loop,
    "vmap(grad), norm": vmap,
    "opacus, norm": opacus,
    "bergson": bergson,
}
