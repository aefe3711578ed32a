"""A pretrained model with a head for the task, and its tokenizer."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tsqlora.data.labels import LabelMap
from tsqlora.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Pretrained:
    """What a checkpoint gives, and which modules it did not hold: those are new, and must be saved."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_modules: tuple[str, ...]

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model has positions for, if its config says so."""
        return getattr(self.model.config, "max_position_embeddings", None)


def load_pretrained(
    path: str,
    *,
    labels: LabelMap | None,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Pretrained:
    """The model with one output a class, or a single one for regression (`labels` None).

    Raises SettingsError for a path that is neither a directory with a model nor a hub id.
    """
    common: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
        config = AutoConfig.from_pretrained(path, **common, **_head(labels))
        # A causal model reads its class at the last token that is not padding.
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, **common, config=config, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingsError(f"model.path {path!r} cannot be loaded ({reason}); give a directory or a hub id") from error
    return Pretrained(model, tokenizer, new_modules(info["missing_keys"]))


def new_modules(missing_keys: Any) -> tuple[str, ...]:
    """The modules whose weights a checkpoint lacks: the outermost where one holds another.

    >>> new_modules({"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"})
    ('bert.pooler.dense', 'classifier')
    """
    owners = sorted({key.rpartition(".")[0] for key in missing_keys})
    return tuple(o for o in owners if not any(o.startswith(f"{other}.") for other in owners))


def _head(labels: LabelMap | None) -> dict[str, Any]:
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    names = [str(name) for name in labels.names]
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }
