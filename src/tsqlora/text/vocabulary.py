"""What each token stands for in text, exactly and by byte, and at which tokens a text ends."""

import json
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from tsqlora.compat.shapes import Int
from tsqlora.errors import UnsupportedError
from tsqlora.tasks.forward import base_model, continues
from tsqlora.text.embedding import untrained_tokens

PROBE = "9f3aAnswerProbe"
"""The content of a probe's answer, which no template writes itself."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The bytes of each token id, so that places in a text are places in its tokens.

    `decode` of a tokenizer loses them: one character may have several tokens, and blanks are cleaned up.
    """

    tokens: tuple[bytes, ...]
    plain_tokens: tuple[bytes, ...]
    """The same, with zeros in place of the bytes of special tokens."""
    lengths: Int[np.ndarray, " v"]
    """Bytes of each token."""
    special: frozenset[int]
    """Turn markers and the like: special tokens, and added ones that look like them."""
    bos: int | None
    stops: frozenset[int]
    """Tokens that end an answer: end tokens of tokenizer and model, and what the template writes behind an answer."""
    generation_stops: frozenset[int]
    """Tokens at which `generate` stops."""
    tokenizer: PreTrainedTokenizerBase
    markers: re.Pattern[str]
    """Matches the text of special tokens, but for the shortest, such as `<s>`, which is HTML too."""
    added: frozenset[int]
    """Added tokens, special or not."""
    embeddings: int
    """Tokens that the model has an embedding for."""
    untrained: frozenset[int] = frozenset()
    """Those of the added ones that the model has never trained, and will not train."""
    open_end: bool = False
    """Whether the template ends an answer by the next turn alone, as GLM's does, so that none ends the last."""
    forms: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ()
    """Unicode forms that the tokenizer brings a text into."""

    def content(self, text: str) -> bytes:
        """Return what the tokens of a content spell, without the blanks around it, which templates trim."""
        for form in self.forms:
            text = unicodedata.normalize(form, text)
        return text.strip().encode()

    def count(self, text: bytes) -> int:
        """Return how many tokens a text has."""
        return len(self.tokenizer(text.decode(errors="ignore"), add_special_tokens=False).input_ids)

    def text(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the text of the tokens, special ones included; nothing for ids beyond the vocabulary."""
        return b"".join(map(self.tokens.__getitem__, self._within(ids)))

    def plain(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the text of the tokens, with as many zeros in place of special ones."""
        return b"".join(map(self.plain_tokens.__getitem__, self._within(ids)))

    def ends(self, ids: Int[np.ndarray, " t"]) -> Int[np.ndarray, " t"]:
        """Return the place in the text, in bytes, behind each token."""
        within = (ids >= 0) & (ids < len(self.tokens))
        return np.cumsum(np.where(within, self.lengths[np.where(within, ids, 0)], 0))

    def _within(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        array = np.asarray(ids)
        within = (array >= 0) & (array < len(self.tokens))
        return (array if within.all() else array[within]).tolist()


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_ends: Collection[int] = (),
    generation_ends: Collection[int] | None = None,
) -> Vocabulary:
    """Read a tokenizer.

    Args:
        model_ends: end tokens of the model's config and generation_config.
        generation_ends: those at which `generate` stops; None: the model's, else the tokenizer's.

    Raises UnsupportedError for a tokenizer without a `tokenizer.json`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(f"{type(tokenizer).__name__} has no tokenizer.json, which the audit of text reads")
    made = json.loads(backend.to_str())
    read = _reader(made.get("decoder") or made.get("pre_tokenizer") or {})
    added = {token["id"]: token for token in made["added_tokens"]}
    names = {number: name for name, number in tokenizer.get_vocab().items()}
    size = max(names, default=-1) + 1
    tokens = tuple(
        added[j]["content"].encode() if j in added else read(names[j]) if j in names else b"" for j in range(size)
    )
    special = {j for j, token in added.items() if token["special"] or _is_marker(token["content"])}
    markers = [added[j]["content"] for j in sorted(special & added.keys())]
    end, bos = (cast(int | None, one) for one in (tokenizer.eos_token_id, tokenizer.bos_token_id))
    own = set[int]() if end is None else {end}
    generation = {*generation_ends} if generation_ends is not None else {*model_ends} or own
    special |= {*cast(list[int], tokenizer.all_special_ids)}
    last, further = (_turn_ends(tokenizer, special, turns) for turns in (2, 3))
    return Vocabulary(
        tokens,
        tuple(bytes(len(text)) if j in special else text for j, text in enumerate(tokens)),
        np.array([len(text) for text in tokens], np.int64),
        frozenset(special),
        bos,
        frozenset(own | {*model_ends} | (last or further)),
        frozenset(generation),
        tokenizer,
        re.compile("|".join(re.escape(name) for name in markers if len(name) > 3) or "(?!)"),
        frozenset(added),
        len(tokens),
        open_end=bool(further) and not last,
        forms=_forms(made.get("normalizer") or {}),
    )


def vocabulary_of_model(tokenizer: Any, config: Any, generation: Any, *, size_of: Any) -> Vocabulary:
    """Read a tokenizer, with the ends of a model's configs, and which rows of its embedding were never trained.

    `size_of` is the model, or its directory or hub id.
    """
    generates, own = _ends(getattr(generation, "eos_token_id", None)), _ends(getattr(config, "eos_token_id", None))
    vocabulary = vocabulary_of(tokenizer, model_ends=[*own, *generates], generation_ends=generates or own or None)
    size = getattr(config.get_text_config(), "vocab_size", None) or len(vocabulary.tokens)
    return replace(vocabulary, embeddings=size, untrained=untrained_tokens(size_of, vocabulary.added))


def vocabulary_of_answers(tokenizer: Any, model: Any) -> Vocabulary | None:
    """The vocabulary of a model whose answers can be looked at; None where it does not go on from a prompt, or where a
    slow tokenizer does not say what a token stands for."""
    if not continues(base_model(model)) or not getattr(tokenizer, "is_fast", False):
        return None
    return vocabulary_of_model(tokenizer, model.config, model.generation_config, size_of=model)


def _forms(normalizer: dict[str, Any]) -> tuple[Any, ...]:
    """The Unicode forms of a normalizer that does nothing else."""
    kinds = [part["type"] for part in normalizer.get("normalizers", [normalizer]) if "type" in part]
    return tuple(kinds) if {*kinds} <= {"NFC", "NFD", "NFKC", "NFKD"} else ()


def _ends(value: Any) -> list[int]:
    return [] if value is None else [int(one) for one in value] if isinstance(value, list) else [int(value)]


def _is_marker(content: str) -> bool:
    """Whether an added token looks like a role or turn marker, as `<|im_end|>`, and not like `<think>`."""
    return content.startswith("<|") and content.endswith("|>")


def _turn_ends(tokenizer: PreTrainedTokenizerBase, special: set[int], turns: int) -> set[int]:
    """The special tokens that the chat template writes directly behind an answer, the second of so many turns."""
    if not tokenizer.chat_template:
        return set()
    chat: list[Any] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": PROBE}] * 2
    try:
        text = str(tokenizer.apply_chat_template(chat[:turns], tokenize=False))
    except Exception:  # a template is a program of whoever made the model; the ledger reports its errors by row
        return set()
    behind = text.rpartition(PROBE)[2].strip()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return {ids[0]} if isinstance(ids, list) and ids and ids[0] in special | {*tokenizer.all_special_ids} else set()


def _reader(spec: dict[str, Any]) -> Any:
    """A function from a token's name to its bytes, by the kind of decoder."""
    kinds = {part["type"] for part in spec.get("decoders", spec.get("pretokenizers", [spec])) if "type" in part}
    if "ByteLevel" in kinds:
        table = _byte_level()
        return lambda name: bytes(table[c] for c in name) if all(c in table for c in name) else name.encode()
    if "WordPiece" in kinds:
        prefix = spec.get("prefix", "##")
        return lambda name: name.removeprefix(prefix).encode() if name.startswith(prefix) else f" {name}".encode()
    return _metaspace


def _metaspace(name: str) -> bytes:
    """SentencePiece: "▁" is a blank, "<0x0A>" a byte."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace("▁", " ").encode()


def _byte_level() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for code points from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + k): b for k, b in enumerate(others)}
