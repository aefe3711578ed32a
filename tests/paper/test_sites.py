"""The site of each parameter of θ, and refusals that name the layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from models import lora, tiny_bert
from tsqlora import paper
from tsqlora.errors import UnsupportedError
from tsqlora.model.modules import batch_coupled
from tsqlora.paper.sites import Site, effective_weight, find_sites, lora_layers, seen

QUERY = "bert.encoder.layer.0.attention.self.query"


def test_sites_are_all_that_trains() -> None:
    model = lora(tiny_bert())
    sites = find_sites(model)
    held = {id(p) for site in sites.values() for module in site.modules for p in module.parameters()}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert {name for name, site in sites.items() if site.bias} == {"classifier.modules_to_save.default"}
    assert f"{QUERY}.lora_A.default" in sites


def test_rank_slots_are_seen_through_their_parametrisation() -> None:
    plain, slots = lora(tiny_bert()), paper.wrap(tiny_bert(), mean_rank=4, modules_to_save=["classifier"])
    assert find_sites(slots).keys() == find_sites(plain).keys()


def test_the_parts_that_train_are_those_of_the_site() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[2].requires_grad_(False)
    assert {n: (s.weight, s.bias) for n, s in find_sites(model).items()} == {"0": (False, True), "1": (True, False)}


def with_tied_bias() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    return model


def with_tied_weight_and_bias() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: nn.Sequential(nn.BatchNorm1d(2)), "^0.weight .* BatchNorm1d"),
        (lambda: nn.Sequential(nn.Embedding(2, 2, max_norm=1.0)), "^0.weight .* Embedding"),
        (lambda: nn.Sequential(nn.Embedding(2, 2, sparse=True)), "^0.weight .* Embedding"),
        (lambda: nn.Sequential(nn.Conv1d(2, 2, 1)), "^0.weight .* Conv1d"),
        (lambda: nn.Sequential(Scaled(2, 2)), "^0.weight .* Scaled"),
        (lambda: nn.MultiheadAttention(4, 2), "^in_proj_weight .* MultiheadAttention"),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2))), "^0.parametrizations.weight.original0"),
        (with_tied_bias, "^1 .* bias with 0"),
        (with_tied_weight_and_bias, "^1 .* weight with 0"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), "no trainable parameter"),
    ],
)
def test_a_parameter_without_an_exact_gradient_is_refused_by_name(build: Callable[[], nn.Module], names: str) -> None:
    with pytest.raises(UnsupportedError, match=names):
        find_sites(build())


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_what_is_like_lora_and_not_s_ba_is_refused(option: str) -> None:
    config = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["query"], **{option: True})
    with pytest.raises(UnsupportedError, match="query uses a LoRA variant"):
        lora_layers(get_peft_model(tiny_bert(), config))


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(ids)


@pytest.mark.parametrize(
    "base",
    [nn.Conv2d(2, 2, 1), Scaled(2, 2), ScaledEmbedding(2, 2), nn.Embedding(2, 2, max_norm=1.0)],
    ids=lambda base: type(base).__name__,
)
def test_lora_over_an_unsupported_layer_is_refused(base: nn.Module) -> None:
    model = get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"]))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=f"^0 is LoRA over {type(base).__name__}"):
        lora_layers(model)


def test_lora_over_an_embedding_is_refused_with_the_cure() -> None:
    model = get_peft_model(tiny_bert(), LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["word_embeddings"]))
    for wrap in (lambda model: model, paper.wrap):
        with pytest.raises(UnsupportedError, match=r"word_embeddings.lora_embedding_A.* target_modules"):
            find_sites(wrap(model))


def test_the_effective_weight_is_that_of_the_merged_model() -> None:
    model = lora(tiny_bert())
    layers = lora_layers(model)
    weights = {name: effective_weight(layer) for name, layer in layers.items()}
    with model.disable_adapter():
        base = effective_weight(layers[QUERY])
    assert torch.equal(base, layers[QUERY].get_base_layer().weight)
    merged = model.merge_and_unload()
    for name, weight in weights.items():
        torch.testing.assert_close(merged.get_submodule(name).weight.detach(), weight)


def test_what_couples_a_batch_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)), nn.LayerNorm(2))
    assert batch_coupled(model) == ["1.0 (BatchNorm1d)"]
    bert = tiny_bert()
    assert batch_coupled(bert) == []
    bert.config.output_router_logits = True
    assert batch_coupled(bert) == ["the auxiliary loss of a mixture of experts (config.output_router_logits)"]


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(t.nbytes for t in (made,) if isinstance(t, Tensor))])
        return made


def test_a_tied_embedding_makes_nothing_larger_than_the_logits_gradient() -> None:
    """Its rows are spread over the vocabulary, since the linear layer's gradients are: in their precision."""
    embedding, ids, grad = nn.Embedding(50, 4), torch.randint(0, 50, (2, 3)), torch.randn(2, 3, 4)
    site = Site("tied", (embedding,), weight=True, bias=False)
    with _Largest() as largest:
        a, b = seen(site, embedding, ids, grad, 2)
    assert largest.bytes == 2 * 3 * 50 * grad.element_size()
    expected = torch.stack([nn.functional.one_hot(i, 50).float().T @ g for i, g in zip(ids, grad, strict=True)])
    torch.testing.assert_close(b.mT @ a, expected)
