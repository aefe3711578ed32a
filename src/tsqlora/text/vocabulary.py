"""What each token stands for in text, exactly and by byte, and at which tokens a text ends."""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from tsqlora.compat.shapes import Int
from tsqlora.errors import UnsupportedError

PROBE = "9f3aAnswerProbe"
"""The content of a probe's answer, which no template writes itself."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The bytes of each token id, so that places in a text are places in its tokens.

    `decode` of a tokenizer loses them: one character may have several tokens, and blanks are cleaned up.
    """

    tokens: tuple[bytes, ...]
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

    def count(self, text: bytes) -> int:
        """Return how many tokens a text has."""
        return len(self.tokenizer(text.decode(errors="ignore"), add_special_tokens=False).input_ids)

    def text(self, ids: Iterable[int]) -> bytes:
        """Return the text of the tokens, special ones included; nothing for ids beyond the vocabulary."""
        size = len(self.tokens)
        return b"".join(self.tokens[j] for j in ids if 0 <= j < size)

    def ends(self, ids: Int[np.ndarray, " t"]) -> Int[np.ndarray, " t"]:
        """Return the place in the text, in bytes, behind each token."""
        size = len(self.tokens)
        return np.cumsum([len(self.tokens[j]) if 0 <= j < size else 0 for j in ids.tolist()], dtype=np.int64)


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
    return Vocabulary(
        tokens,
        frozenset(special | {*cast(list[int], tokenizer.all_special_ids)}),
        bos,
        frozenset(own | {*model_ends} | _turn_ends(tokenizer, special)),
        frozenset(generation),
        tokenizer,
        re.compile("|".join(re.escape(name) for name in markers if len(name) > 3) or "(?!)"),
        frozenset(added),
        len(tokens),
    )


def _is_marker(content: str) -> bool:
    """Whether an added token looks like a role or turn marker, as `<|im_end|>`, and not like `<think>`."""
    return content.startswith("<|") and content.endswith("|>")


def _turn_ends(tokenizer: PreTrainedTokenizerBase, special: set[int]) -> set[int]:
    """The special tokens that the chat template writes directly behind an answer."""
    if not tokenizer.chat_template:
        return set()
    turns: list[Any] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": PROBE}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
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
