"""Every kind of layer that can train, in models of every family, against the slow twin."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from models import EOS, collate, lora, samples, tiny_bert, tiny_gpt2, tiny_llama_classifier, tiny_mpnet, tiny_t5
from scoring import assert_agree, assert_unchanged, fingerprint, score_by, slow, slow_offsets, teach
from tsqlora.errors import UnsupportedError
from tsqlora.paper.sites import find_sites

N = 10
REFERENCE = [0, 2, 3, 5, 8]
FAMILIES: dict[str, Callable[..., Any]] = {
    "bert": tiny_bert,
    "gpt2": tiny_gpt2,
    "llama": tiny_llama_classifier,
    "t5": tiny_t5,
    "mpnet": tiny_mpnet,
}
SEEDS = {"gpt2": 3, "t5": 1}
"""With which a model without an output bias does not call every row the same."""
NORMS_AND_EMBEDDINGS: dict[str, tuple[str, ...]] = {
    "bert": ("LayerNorm", "word_embeddings"),
    "gpt2": ("ln_1", "ln_2", "ln_f", "wte"),
    "llama": ("layernorm", "model.norm", "embed_tokens"),
    "t5": ("layer_norm", "shared", "embed_tokens"),
    "mpnet": ("LayerNorm", "word_embeddings"),
}


def adapted(family: str, *, unfreeze: tuple[str, ...] = (), **options: Any) -> tuple[PeftModel, list[dict[str, Any]]]:
    """A LoRA model in which parameters of these names train too, and rows that it has learned."""
    heads = ["classification_head"] if family == "t5" else None
    model = lora(FAMILIES[family](seed=SEEDS.get(family, 0)), modules_to_save=heads, **options)
    for name, parameter in model.named_parameters():
        if any(part in name for part in unfreeze) and "lora_" not in name:
            parameter.requires_grad_(True)
    rows = samples(N, 3, vocab=EOS)
    if family == "t5":
        for row in rows:
            row["input_ids"][-1] = EOS
    teach(model, rows)
    return model, rows


def assert_twin(model: PeftModel, rows: list[dict[str, Any]], **options: Any) -> None:
    offsets = slow_offsets(model, [rows[j] for j in REFERENCE])
    before = fingerprint(model)
    scores = score_by(model, rows, collate, reference=REFERENCE, batch_size=4, **options)
    assert_unchanged(before, model)
    # Some norms compute in float32 whatever the model is in, and look-ahead is a small difference.
    assert_agree(scores, slow(model, rows, REFERENCE, offsets=offsets), rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_every_family_are_the_twins(family: str) -> None:
    assert_twin(*adapted(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_embeddings_that_train_count(family: str) -> None:
    model, rows = adapted(family, unfreeze=NORMS_AND_EMBEDDINGS[family])
    kinds = {type(site.kind).__name__ for site in find_sites(model).values()}
    assert kinds == {"Linear", "Gain", "Lookup"}
    assert_twin(model, rows)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_train_under_lora_count(bias: str) -> None:
    assert_twin(*adapted("bert", bias=bias))


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_trains_counts(family: str) -> None:
    """No adapter: all weights but positions, whose embedding has no samples to tell apart."""
    model, rows = adapted(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in ("position", "wpe", "relative", "original_module")))
    assert_twin(model, rows)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])  # MPNet's has no checkpointing
def test_gradient_checkpointing_changes_no_score(family: str) -> None:
    model, rows = adapted(family, unfreeze=NORMS_AND_EMBEDDINGS[family], dropout=0.0)
    plain = score_by(model, rows, collate, reference=REFERENCE, batch_size=4)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed = score_by(model, rows, collate, reference=REFERENCE, batch_size=4)
    for name, values in plain.terms.items():
        torch.testing.assert_close(
            torch.from_numpy(checkpointed.terms[name]), torch.from_numpy(values), rtol=1e-6, atol=1e-9
        )


class Words(nn.Module):
    """Each class is a word; tied, the weight that is looked up is also the output's."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(60, 8, padding_idx=0, dtype=torch.float64)
        self.norm = nn.RMSNorm(8, dtype=torch.float64)
        self.classifier = nn.Linear(8, 60, bias=False, dtype=torch.float64)
        self.tied = tied
        if tied:
            self.classifier.weight = self.words.weight

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        vectors = self.norm(self.words(input_ids))
        if self.tied:  # else padding, which is zero, stays in the sum: it has a gradient, and must not train
            vectors = vectors * attention_mask[..., None]
        scale = 3 if self.tied else 20
        return type("Output", (), {"logits": scale * self.classifier(vectors.sum(1) / attention_mask.sum(1, True))})


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_with_padding_that_may_share_its_weight_with_the_head(tied: bool) -> None:
    model, rows = Words(tied=tied), samples(N, 3, vocab=EOS)
    for row, label in zip(rows, _predictions(model, rows), strict=True):
        row["labels"] = label
    scores = score_by(model, rows, collate, reference=REFERENCE, batch_size=4, calibration=False)
    assert_agree(scores, slow(model, rows, REFERENCE), rtol=1e-7)


def _predictions(model: nn.Module, rows: list[dict[str, Any]]) -> list[int]:
    with torch.no_grad():
        batch = collate(rows)
        return model(batch["input_ids"], batch["attention_mask"]).logits.argmax(1).tolist()


def test_positions_are_refused_by_name() -> None:
    model, rows = adapted("bert", unfreeze=("position_embeddings",))
    with pytest.raises(UnsupportedError, match="position_embeddings is called on a tensor of shape"):
        score_by(model, rows, collate, reference=REFERENCE, batch_size=4)


class Squared(nn.Module):
    """Looks like a norm, and is not affine in its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((16,), 1.5, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight**3


def test_a_layer_that_only_looks_like_a_norm_is_found_out() -> None:
    model, rows = adapted("bert")
    model.base_model.model.bert.encoder.layer[1].output.LayerNorm = Squared()
    teach(model, rows)
    with pytest.raises(UnsupportedError, match="LayerNorm is used outside"):
        score_by(model, rows, collate, reference=REFERENCE, batch_size=4)
