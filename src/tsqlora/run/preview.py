"""Text of generation samples as the model sees it, with the trained part marked."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from tsqlora.tasks.generation import IGNORED

_LONGEST = 600
"""Characters of a stretch that are shown."""


def marked_samples(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Mapping[str, Any]]) -> str:
    """Each sample's text, the tokens that are trained on between ⟦ and ⟧."""
    return "\n".join(_marked(tokenizer, number, sample) for number, sample in enumerate(samples, start=1)) + "\n"


def _marked(tokenizer: PreTrainedTokenizerBase, number: int, sample: Mapping[str, Any]) -> str:
    stretches = _stretches(tokenizer, sample)
    tokens = sum(count for count, _, _ in stretches)
    trained = sum(count for count, is_trained, _ in stretches if is_trained)
    text = "".join(f"⟦{_shortened(text)}⟧" if is_trained else _shortened(text) for _, is_trained, text in stretches)
    return f"sample {number}: {tokens} tokens, trained on ⟦{trained}⟧\n{text}"


def _stretches(tokenizer: PreTrainedTokenizerBase, sample: Mapping[str, Any]) -> list[tuple[int, bool, str]]:
    """(number of tokens, whether they are trained on, text) of each stretch."""
    ids, labels = sample["input_ids"], sample["labels"]
    if not _side_by_side(ids, labels):  # a sequence-to-sequence model writes beside what it reads
        return [(len(ids), False, _text(tokenizer, ids)), (len(labels), True, _text(tokenizer, labels))]
    stretches, start = [], 0
    for trained, group in groupby(labels, key=lambda label: label != IGNORED):
        end = start + len(list(group))
        before, whole = _text(tokenizer, ids[:start]), _text(tokenizer, ids[:end])
        # Decoded alone, a stretch may lose the space that it begins with.
        text = whole[len(before) :] if whole.startswith(before) else _text(tokenizer, ids[start:end])
        stretches.append((end - start, trained, text))
        start = end
    return stretches


def _side_by_side(ids: Sequence[int], labels: Sequence[int]) -> bool:
    return len(ids) == len(labels) and all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _shortened(text: str) -> str:
    """The printable text, its middle left out where it is long."""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
