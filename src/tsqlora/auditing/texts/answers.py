"""How a language model reads answers: behind their prompts, alone, and whether it would stop where they end."""

import hashlib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora.auditing.texts.ledger import spans_of
from tsqlora.auditing.texts.prepared import Trained
from tsqlora.auditing.texts.vocabulary import Vocabulary
from tsqlora.libs.shapes import Bool, Float, Int
from tsqlora.libs.torch import upcast
from tsqlora.model.passes import parts_of, run_pass
from tsqlora.model.request import Compute
from tsqlora.rows.batches import MULTIPLE
from tsqlora.rows.chat import ANSWER, Chat
from tsqlora.tasks import Batch
from tsqlora.tasks.forward import base_model

MOST_PROMPT, MOST_ANSWER = 512, 256
"""Tokens that are read: of a longer prompt and of a longer answer both ends."""
WHOLE = 2048
"""Tokens of a suspect's own prompt: what its answer is about may stand in the middle."""
CHUNK = 2**23
"""Logits that are in float32 at a time."""


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer and what precedes it, as tokens that a trainer made."""

    row: int
    side: str
    """"chosen" or "rejected" of a pair."""
    prompt: Int[np.ndarray, " p"]
    opening: Int[np.ndarray, " o"]
    """What precedes an answer whatever the prompt: BOS and the template's header."""
    answer: Int[np.ndarray, " a"]
    ends: bool
    """Whether the answer is whole and a stop follows it."""
    question: str
    text: str


def turns_of(row: Chat, sequences: Iterable[Trained], vocabulary: Vocabulary) -> Iterator[Turn]:
    """Yield the trained answers of a row; of a pair those of both sides."""
    for one in sequences:
        messages = row.side(one.side)
        before, question = 0, ""
        for message, span in zip(messages, spans_of(messages, one, vocabulary), strict=True):
            if message.role != ANSWER:
                question = message.content
            elif span is not None and span.before == 0 and (one.targets[span.start : span.end] >= 0).any():
                behind = one.ids[span.end : span.end + 2].tolist()
                yield Turn(
                    row.row,
                    one.side,
                    one.ids[: span.start],
                    _opening(one.ids, before, span.start, vocabulary),
                    one.ids[span.start : span.end],
                    not span.cut and bool({*behind} & vocabulary.stops),
                    question,
                    message.content,
                )
            before = before if span is None else span.end


def turns_in(sequences: Iterable[Trained], vocabulary: Vocabulary) -> list[Turn]:
    """Return the trained stretches of sequences as answers, where the texts are not known.

    What all prompts end with, such as the template's header, opens an answer.
    """
    turns = list[Turn]()
    for one in sequences:
        for before, start, end, ends in stretches(one, vocabulary.stops, vocabulary.empty):
            if start == end:
                continue
            texts = (vocabulary.plain(one.ids[part]) for part in (slice(before, start), slice(start, end)))
            question, text = (part.replace(b"\0", b"").decode(errors="replace") for part in texts)
            turns.append(
                Turn(one.row, one.side, one.ids[:start], one.ids[:0], one.ids[start:end], ends, question, text)
            )
    return opened(turns, common_end([turn.prompt for turn in turns]), vocabulary.bos)


def stretches(one: Trained, stops: Collection[int], empty: Collection[int]) -> Iterator[tuple[int, int, int, bool]]:
    """Yield the end of the stretch before, start and end of each trained stretch, and whether a stop follows it.

    Labels at its end that stop or are `empty` do not belong to it; if it has no others, its start is its end.
    """
    trained, before = one.trained, 0
    for stretch in np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1) if len(trained) else ():
        start, end = int(stretch[0]), int(stretch[-1]) + 1
        ends = any(j in stops for j in one.targets[start:end].tolist())
        while end > start and (int(one.targets[end - 1]) in stops or int(one.targets[end - 1]) in empty):
            end -= 1
        yield before, start, end, ends
        before = end


def opened(turns: Sequence[Turn], suffix: Int[np.ndarray, " s"], bos: int | None) -> list[Turn]:
    """Return the turns with what opens an answer: BOS, where a longer prompt begins with it, and the suffix."""
    first = np.array([bos])
    opens = [len(turn.prompt) and turn.prompt[0] == bos and len(suffix) < len(turn.prompt) for turn in turns]
    return [
        replace(turn, opening=np.concatenate([first, suffix]) if begins else suffix)
        for turn, begins in zip(turns, opens, strict=True)
    ]


def common_end(prompts: Sequence[Int[np.ndarray, " p"]]) -> Int[np.ndarray, " s"]:
    size = min(map(len, prompts), default=0)
    ends = np.array([prompt[len(prompt) - size :] for prompt in prompts]).reshape(len(prompts), size)
    differ = np.flatnonzero((ends != ends[:1]).any(0))
    return ends[0, differ[-1] + 1 if len(differ) else 0 :] if len(prompts) else np.empty(0, np.int64)


def _opening(ids: Int[np.ndarray, " t"], before: int, start: int, vocabulary: Vocabulary) -> Int[np.ndarray, " o"]:
    """Return BOS and the header of the turn that begins at `start`, where the one before it ends at `before`."""
    header = ids[before:start]
    stops = np.flatnonzero(np.isin(header, [*vocabulary.stops]))
    header = header[stops[-1] + 1 :] if len(stops) else header
    while len(header) and not vocabulary.text(header[:1].tolist()).strip():
        header = header[1:]
    first = ids[:1] if vocabulary.bos is not None and before else ids[:0]
    opens = len(first) and first[0] == vocabulary.bos and header[:1].tolist() != first.tolist()
    return np.concatenate([first, header]) if opens else header


@dataclass(frozen=True, slots=True)
class Sample:
    """What one forward pass reads: an answer behind some tokens."""

    before: Int[np.ndarray, " p"]
    answer: Int[np.ndarray, " a"]
    places: tuple[int, ...] = ()
    """Numbers of the answer's tokens that are read, after which the probability of a stop is measured."""


Read = Callable[[str, Sequence[Sample]], dict[str, np.ndarray]]
"""Reads samples in a phase of this name."""


def behind(
    prompt: Int[np.ndarray, " p"],
    answer: Int[np.ndarray, " a"],
    places: Sequence[int] = (),
    *,
    most: int | None = None,
) -> Sample:
    """Return an answer behind a prompt; of long ones what is read."""
    most = MOST_PROMPT if most is None else most
    return Sample(prompt[ends_of(len(prompt), most)], answer[ends_of(len(answer))], tuple(places))


def ends_of(size: int, most: int | None = None) -> Int[np.ndarray, " r"]:
    """Return the places of the tokens that are read: of more than `most` both ends, by default of an answer."""
    most = MOST_ANSWER if most is None else most
    return np.arange(size) if size <= most else np.r_[: most // 2, size - most // 2 : size]


def longest_prompt(model: nn.Module) -> int:
    """Return the most tokens of a suspect's own prompt: WHOLE, or fewer if the model has fewer positions."""
    positions = getattr(getattr(base_model(model), "config", None), "max_position_embeddings", None)
    return max(MOST_PROMPT, WHOLE if positions is None else min(WHOLE, positions - MOST_ANSWER))


def views(
    turns: Sequence[Turn],
    read: Read,
    places: Sequence[Sequence[int]] | None = None,
    phases: tuple[str, str] = ("prompted", "alone"),
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Float[np.ndarray, "n 7"]]:
    """Read answers behind their prompts, where stops are measured at `places`, and alone; return both and features."""
    at = [()] * len(turns) if places is None else places
    prompted = read(phases[0], [behind(one.prompt, one.answer, own) for one, own in zip(turns, at, strict=True)])
    alone = read(phases[1], [behind(one.opening, one.answer) for one in turns])
    return prompted, alone, features_of(prompted, alone)


def fits_own(
    turns: Sequence[Turn],
    losses: Float[np.ndarray, " n"],
    others: Float[np.ndarray, " n"],
    read: Callable[[Sequence[Sample]], Mapping[str, np.ndarray]],
    *,
    most: int,
) -> Bool[np.ndarray, " n"]:
    """Return whether answers are likelier behind their own prompts than behind others, whose losses are given.

    Where one is not, and its prompt was read at both ends, `read` gets up to `most` tokens of the prompt.
    """
    fits = losses < others
    again = [j for j in np.flatnonzero(~fits).tolist() if min(most, len(turns[j].prompt)) > MOST_PROMPT]
    if again:
        fits[again] = read([behind(turns[j].prompt, turns[j].answer, most=most) for j in again])["loss"] < others[again]
    return fits


def read_answers(
    model: nn.Module, samples: Sequence[Sample], stops: Collection[int], compute: Compute, *, phase: str
) -> dict[str, np.ndarray]:
    """Return how likely each answer is, whatever the batches.

    `each` (n × MOST_ANSWER) is −log p of each of the answer's tokens, 0 behind its end. `loss` (n) is their sum, and
    `tokens` (n) their number: without the first token where nothing precedes it. `entropy` (n) is the mean entropy of
    these predictions in nats. `stop` (n × k) is the log-probability of any stop at each of the k places.
    """
    takes = inspect.signature(base_model(model).forward).parameters
    ends = torch.tensor(sorted(stops))
    digest = hashlib.sha256()
    for one in samples:
        digest.update(repr((one.places, len(one.before))).encode() + one.before.tobytes() + one.answer.tobytes())

    def measure(_: np.ndarray, batch: Batch) -> dict[str, np.ndarray]:
        device = next(model.parameters()).device
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "position_ids")}
        answers, places = batch["answers"].to(device), batch["places"].to(device)
        width = int(answers.max()) + 1
        if "position_ids" not in takes:
            del inputs["position_ids"]
        keep = {"logits_to_keep": width} if "logits_to_keep" in takes else {}
        logits = model(**inputs, use_cache=False, **keep).logits[:, -width:]
        targets = inputs["input_ids"][:, -width:].roll(-1, 1)
        # The logits at `width - 1 - a + k` predict what follows k tokens of an answer of a.
        start = width - 1 - answers[:, None]
        at = torch.arange(width, device=device)
        read = inputs["attention_mask"][:, -width:].bool() & (at >= start)
        loss, entropy, stop = (upcast(logits.new_zeros(logits.shape[:2])) for _ in range(3))
        spots = read.flatten().nonzero().squeeze(1)
        for chunk in spots.split(max(1, CHUNK // logits.shape[-1])):
            z = upcast(logits.flatten(0, 1)[chunk])
            scale = z.logsumexp(1)
            loss.view(-1)[chunk] = scale - z.gather(1, targets.flatten()[chunk, None])[:, 0]
            stop.view(-1)[chunk] = z[:, ends.to(device)].logsumexp(1) - scale
            entropy.view(-1)[chunk] = scale - ((z - scale[:, None]).exp() * z).sum(1)
        predicts = read & (at < width - 1)
        count = predicts.sum(1)
        each = torch.arange(MOST_ANSWER, device=device)
        place = (start + each).clamp(0, width - 1)
        columns = {
            "each": (loss * predicts).gather(1, place) * (each < answers[:, None]),
            "loss": (loss * predicts).sum(1),
            "tokens": count,
            "entropy": (entropy * predicts).sum(1) / count.clamp_min(1),
            "stop": stop.gather(1, (start + places).clamp_min(0)),
        }
        return {name: value.cpu().numpy() for name, value in columns.items()}

    parts = parts_of(model, compute, phase, digest.hexdigest())
    lengths = [len(one.before) + len(one.answer) for one in samples]
    with torch.no_grad():
        return run_pass(
            model, measure, samples, _padded, compute, lengths=lengths, phase=phase, parts=parts, shared=True
        )


def _padded(samples: Sequence[Any]) -> dict[str, Tensor]:
    """Pad on the left, so that all answers end together and logits are made for them alone."""
    # What precedes the first token predicts it: where nothing does, a place that no token takes.
    width = -(-max(max(len(one.before), 1) + len(one.answer) for one in samples) // MULTIPLE) * MULTIPLE
    ids, mask = (np.zeros((len(samples), width), np.int64) for _ in range(2))
    for j, one in enumerate(samples):
        row = np.concatenate([one.before, one.answer])
        ids[j, width - len(row) :] = row
        mask[j, width - len(row) :] = 1
    most = max(len(one.places) for one in samples)
    places = np.array([[*one.places, *[0] * (most - len(one.places))] for one in samples], np.int64)
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "position_ids": torch.from_numpy((mask.cumsum(1) - 1).clip(0)),
        "answers": torch.tensor([len(one.answer) for one in samples]),
        "places": torch.from_numpy(places.reshape(len(samples), most)),
    }


def features_of(
    prompted: dict[str, np.ndarray], alone: dict[str, np.ndarray], donors: Int[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, "n 7"]:
    """Return c, u, u − c, c/u, n(u − c), log n and entropy of answers; `donors` are their rows in `alone`."""
    rows = np.arange(len(prompted["loss"])) if donors is None else donors
    n = np.maximum(prompted["tokens"], 1).astype(np.float64)
    c = prompted["loss"] / n
    u = alone["loss"][rows] / np.maximum(alone["tokens"][rows], 1)
    return np.stack([c, u, u - c, c / np.maximum(u, 1e-3), n * (u - c), np.log(n), prompted["entropy"]], 1)
