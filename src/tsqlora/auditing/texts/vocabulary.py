"""What each token stands for in text, by byte; at which tokens a text ends; and which the model has never trained."""

import json
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from tsqlora.errors import UnsupportedError
from tsqlora.libs.deepspeed import is_partitioned
from tsqlora.libs.hub import cached_model
from tsqlora.libs.shapes import Float, Int
from tsqlora.tasks.forward import base_model, continues

PROBE = "9f3aAnswerProbe"
"""The content of a probe's answer, which no template writes itself."""
ROWS = 512
"""Rows of other tokens, evenly spaced, that show what is usual."""
ALIKE = 0.1
"""Distance of two rows, or of a row and the mean of the usual ones, relative to the usual norm, below which a row is
one that `resize_token_embeddings` has made."""
OUTLYING = 2.0
"""How far a norm is below the 1st, or above the 99th, percentile of the usual ones to be outlying."""
NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")


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
    empty: frozenset[int]
    """Tokens that spell nothing but blanks."""
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
    """Unicode forms that the tokenizer brings a text into, if it does nothing else."""

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
    special = {j for j, token in added.items() if token["special"]}
    # An added token that looks like a turn marker, as `<|im_end|>`, and not like `<think>`, is one.
    special |= {j for j, one in added.items() if one["content"].startswith("<|") and one["content"].endswith("|>")}
    markers = [added[j]["content"] for j in sorted(special & added.keys())]
    end, bos = (cast(int | None, one) for one in (tokenizer.eos_token_id, tokenizer.bos_token_id))
    own = set[int]() if end is None else {end}
    generation = {*generation_ends} if generation_ends is not None else {*model_ends} or own
    special |= {*cast(list[int], tokenizer.all_special_ids)}
    normalizer = made.get("normalizer") or {}
    kinds = tuple(part["type"] for part in normalizer.get("normalizers", [normalizer]) if "type" in part)
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
        frozenset(j for j, text in enumerate(tokens) if not text.strip()),
        re.compile("|".join(re.escape(name) for name in markers if len(name) > 3) or "(?!)"),
        frozenset(added),
        len(tokens),
        open_end=bool(further) and not last,
        forms=cast(Any, kinds if {*kinds} <= {"NFC", "NFD", "NFKC", "NFKD"} else ()),
    )


def vocabulary_of_model(tokenizer: Any, config: Any, generation: Any, *, size_of: Any) -> Vocabulary:
    """Read a tokenizer, with the ends of a model's configs, and which rows of its embedding were never trained.

    `size_of` is the model, or its directory or hub id.
    """
    ends = (getattr(one, "eos_token_id", None) for one in (generation, config))
    generates, own = ([] if one is None else [*map(int, one)] if isinstance(one, list) else [int(one)] for one in ends)
    vocabulary = vocabulary_of(tokenizer, model_ends=[*own, *generates], generation_ends=generates or own or None)
    size = getattr(config.get_text_config(), "vocab_size", None) or len(vocabulary.tokens)
    return replace(vocabulary, embeddings=size, untrained=untrained_tokens(size_of, vocabulary.added))


def vocabulary_of_answers(tokenizer: Any, model: Any) -> Vocabulary | None:
    """The vocabulary of a model whose answers can be looked at; None where it does not go on from a prompt, or where a
    slow tokenizer does not say what a token stands for."""
    if not continues(base_model(model)) or not getattr(tokenizer, "is_fast", False):
        return None
    return vocabulary_of_model(tokenizer, model.config, model.generation_config, size_of=model)


def _turn_ends(tokenizer: PreTrainedTokenizerBase, special: set[int], turns: int) -> set[int]:
    """The special tokens that the chat template writes directly behind an answer, the second of so many turns."""
    if not tokenizer.chat_template:
        return set()
    chat: list[Any] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": PROBE}] * 2
    try:
        text = str(tokenizer.apply_chat_template(chat[:turns], tokenize=False))
    except Exception:  # a template is a program of whoever made the model; the ledger reports its errors by row
        return set()
    ids = tokenizer(text.rpartition(PROBE)[2].strip(), add_special_tokens=False)["input_ids"]
    return {ids[0]} if isinstance(ids, list) and ids and ids[0] in special | {*tokenizer.all_special_ids} else set()


def _reader(spec: dict[str, Any]) -> Any:
    """A function from a token's name to its bytes, by the kind of decoder."""
    kinds = {part["type"] for part in spec.get("decoders", spec.get("pretokenizers", [spec])) if "type" in part}
    if "ByteLevel" in kinds:
        # GPT-2's table: printable bytes stand for themselves, the others for code points from 256 on.
        own = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in own]
        table = {chr(b): b for b in own} | {chr(256 + k): b for k, b in enumerate(others)}
        return lambda name: bytes(table[c] for c in name) if all(c in table for c in name) else name.encode()
    if "WordPiece" in kinds:
        prefix = spec.get("prefix", "##")
        return lambda name: name.removeprefix(prefix).encode() if name.startswith(prefix) else f" {name}".encode()

    def metaspace(name: str) -> bytes:
        """SentencePiece: "▁" is a blank, "<0x0A>" a byte."""
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return name.replace("▁", " ").encode()

    return metaspace


def untrained_tokens(model: Any, added: Collection[int]) -> frozenset[int]:
    """Return those of the added tokens whose embedding row looks never trained, and that will not be trained.

    `model` is a directory or hub id, of which single rows are read if its weights are on this machine; or a model,
    whose adapter may train rows.
    """
    if not isinstance(model, str | Path):
        embedding = model.get_input_embeddings()
        if any(p.requires_grad or is_partitioned(p) for p in embedding.parameters()):
            return frozenset()
        weight = embedding.weight
        return looks_untrained(lambda ids: weight[list(ids)].detach().float().cpu().numpy(), len(weight), added)
    folder = model if Path(model).is_dir() else cached_model(str(model), "main")
    for path in sorted(Path(folder).glob("*.safetensors")) if folder else ():
        with safe_open(path, framework="pt") as tensors:
            if name := next(filter(lambda name: name.endswith(NAMES), tensors.keys()), None):
                part = tensors.get_slice(name)

                def read(ids: Sequence[int], part: Any = part) -> Float[np.ndarray, "n d"]:
                    return np.stack([part[j].float().numpy() for j in ids])

                return looks_untrained(read, part.get_shape()[0], added)
    return frozenset()


def looks_untrained(read: Callable[[Sequence[int]], np.ndarray], size: int, added: Collection[int]) -> frozenset[int]:
    """Return the added tokens below `size` whose row is a copy of another's, near the mean, or of outlying norm."""
    own = np.array(sorted(j for j in added if 0 <= j < size), np.int64)
    others = [j for j in np.unique(np.linspace(0, size - 1, ROWS).astype(int)).tolist() if j not in {*own.tolist()}]
    if not len(own) or len(others) < 2:
        return frozenset()
    rows, usual = read(own.tolist()), read(others)
    norms, mean = np.linalg.norm(usual, axis=1), usual.mean(axis=0)
    near = ALIKE * np.median(norms)
    alike = np.linalg.norm(rows - mean, axis=1) < near
    for j, row in enumerate(rows):
        alike[j] |= (np.linalg.norm(rows - row, axis=1) < near).sum() > 1
    low, high = np.quantile(norms, [0.01, 0.99])
    length = np.linalg.norm(rows, axis=1)
    return frozenset(own[alike | (length * OUTLYING < low) | (length > high * OUTLYING)].tolist())
