"""What a batch is to a model, and which task they make."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertLMHeadModel, RobertaForCausalLM

from models import GENERATORS, tiny_bert
from tsqlora.errors import UnsupportedError
from tsqlora.tasks import get_task, task_of
from tsqlora.tasks.forward import model_logits, split_labels
from tsqlora.tasks.task import require_labels

IDS = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]])
LABELS = torch.tensor([[5, 7, 1], [8, 1, -100]])


class Gives(nn.Module):
    """A linear classifier that returns its logits in a chosen form."""

    def __init__(self, give: Any) -> None:
        super().__init__()
        self.layer, self.give = nn.Linear(2, 3), give

    def forward(self, x: Tensor) -> Any:
        return self.give(self.layer(x))


@pytest.mark.parametrize("give", [lambda y: y, lambda y: {"logits": y, "hidden": None}])
def test_logits_are_taken_of_a_tensor_and_of_a_dict(give: Any) -> None:
    model, x = Gives(give), torch.randn(4, 2)
    assert torch.equal(model_logits(model, {"x": x}), model.layer(x))


@pytest.mark.parametrize("give", [lambda y: {"scores": y}, lambda y: (y,)])
def test_a_model_that_gives_no_logits_is_refused(give: Any) -> None:
    with pytest.raises(UnsupportedError, match="without logits"):
        model_logits(Gives(give), {"x": torch.randn(4, 2)})


@pytest.mark.parametrize("kind", ["t5", "bart", "bert + bert"])
def test_a_decoder_behind_an_encoder_reads_the_target_though_labels_are_taken_away(kind: str) -> None:
    model = GENERATORS[kind]().eval()
    batch = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "labels": LABELS}
    inputs, labels = split_labels(batch, model)
    with torch.no_grad():
        assert torch.equal(get_task("seq2seq").reading.logits(model, inputs), model(**batch).logits)
    assert torch.equal(labels, LABELS)
    arguments = {**batch, "decoder_input_ids": torch.zeros_like(LABELS)}
    assert torch.equal(split_labels(arguments, model)[0]["decoder_input_ids"], arguments["decoder_input_ids"])


def test_a_classifiers_inputs_are_left_alone() -> None:
    inputs, _ = split_labels({"input_ids": IDS, "labels": torch.tensor([0, 1])}, tiny_bert())
    assert inputs.keys() == {"input_ids"}


def test_labels_of_another_task_than_the_models_are_refused() -> None:
    for kind, labels in ((None, torch.ones(4, 3)), ("multi_label_classification", torch.ones(4))):
        task = task_of(tiny_bert(problem_type=kind))
        with pytest.raises(UnsupportedError, match="shape"):
            require_labels(task, labels)


@pytest.mark.parametrize("kind", [RobertaForCausalLM, BertLMHeadModel])
def test_positions_are_those_that_the_model_counts_itself(kind: Any) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=12, pad_token_id=1, is_decoder=True, initializer_range=0.5, **sizes))
    ids = torch.tensor([[5, 6, 7, 8], [8, 9, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    with torch.no_grad():
        ours, own = get_task("causal-lm").reading.logits(model.eval(), batch), model(**batch).logits
    assert torch.allclose(ours[ids != 1], own[ids != 1], atol=1e-6)
