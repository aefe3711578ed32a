"""The ledger: what became of each source row, by the tokens and label values that a model is trained on."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from ftfy.badness import BADNESS_RE

from tsqlora.auditing.texts.prepared import Trained
from tsqlora.auditing.texts.vocabulary import Vocabulary
from tsqlora.rows.batches import IGNORED
from tsqlora.rows.chat import ANSWER, CALLS, TLDR, Chat, Message
from tsqlora.rows.rows import NotTextError

LEAST_KNOWN = 16
"""Bytes of a content that must be there for what is left of it to count as cut, and not as missing."""
NEAR_LIMIT = 0.9
"""Share of the length limit that a cut sequence has at least: LLaMA-Factory cuts each turn by its share."""
ROLE_MARKERS = re.compile(
    r"<\|?(im_start|im_end|start_header_id|eot_id|endoftext)\|?>|<\|(user|assistant|system)\|>|\[/?INST\]|<</?SYS>>"
)
SPEAKERS = re.compile(r"^\s*(### (Instruction|Response|Input):|(Human|USER|ASSISTANT):)", re.MULTILINE)
"""What opens a turn in texts without a chat template; behind an answer it is a turn that somebody else wrote."""
MARKER = re.compile(
    rb"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|endoftext)\|>|<(?:start|end)_of_turn>"
)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")
SHOWN = 60
"""Characters of a text that a finding shows."""
HTML = re.compile(
    r"</?(a|b|body|br|div|em|font|h[1-6]|html|i|img|li|ol|p|span|strong|table|t[dhr]|ul)(\s[^<>]*)?/?>", re.IGNORECASE
)
CODE = re.compile(r"```.*?(```|\Z)|`[^`\n]*`", re.DOTALL)
REASONING_ENDS = "</think>"


class Span(NamedTuple):
    """Where a message's content is among the tokens, and how many of its bytes are missing before and behind."""

    start: int
    end: int
    before: int = 0
    behind: int = 0
    stripped: bool = False
    """Whether the template left out the reasoning that an answer begins with."""

    @property
    def cut(self) -> bool:
        return bool(self.before or self.behind)


@dataclass(slots=True)
class Line:
    """One source row of the ledger; numbers are None where the source or its match is unknown."""

    row: int
    hash: str
    tokens: int = 0
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    trained_tokens: int = 0
    first_trained: int | None = None
    last_trained: int | None = None
    lost_tokens: int | None = None
    stop_trained: bool | None = None
    """Whether a stop is trained behind the last answer; None where that answer is cut or missing."""
    fate: str = "trained"
    match: str = "exact"
    findings: list[str] = field(default_factory=list)
    """Names of the row's findings."""
    detail: str = ""
    copies: int = 0
    """How many times more a trainer's set has the row."""
    shows: dict[str, str] = field(default_factory=dict)
    """The text that shows a finding, by its name."""

    def find(self, name: str, shown: str = "") -> None:
        """Add a finding with the text that shows it."""
        self.findings.append(name)
        if shown:
            self.shows.setdefault(name, shown)
            self.detail = self.detail or shown


def spans_of(
    messages: Sequence[Message], one: Trained, vocabulary: Vocabulary, *, prompts: bool = True
) -> list[Span | None]:
    """Return where messages are: as we prepared them, else where `locate` finds their contents.

    Our answers are what is to be written: content, reasoning and tool calls, without the stop. Contents of a prompt are
    looked for in its own piece, if `prompts` matter.
    """
    if one.places is None:
        return locate(messages, one.ids, vocabulary)
    spans, first, ids = list[Span | None]([None] * len(messages)), 0, one.ids.tolist()
    for place, start, whole in one.places:
        number, end = place % len(messages), min(whole, len(ids))
        if messages[number].role == ANSWER:
            while end > start and (ids[end - 1] in vocabulary.stops or not vocabulary.text(ids[end - 1 : end]).strip()):
                end -= 1
            spans[number] = Span(start, end, behind=max(0, whole - len(ids))) if end > start else None
        elif prompts:
            own = locate(messages[first : number + 1], one.ids[start:end], vocabulary)
            for k, span in enumerate(own, start=first):
                spans[k] = span and span._replace(start=start + span.start, end=start + span.end)
        first = number + 1
    return spans


def locate(messages: Sequence[Message], ids: np.ndarray, vocabulary: Vocabulary) -> list[Span | None]:
    """Find the contents of messages among tokens, in order; None for one that is missing.

    Templates trim contents, so blanks around them do not count. The first content may lack its beginning, and the last
    one its end, where a length limit cut the text. A content is looked for outside special tokens first: "end" is no
    part of `<|im_end|>`. Between the paragraphs of a prompt a template may write, as between Alpaca's instruction and
    input.
    """
    tokens = ids.tolist()
    plain, ends, special = vocabulary.plain(ids), vocabulary.ends(ids), vocabulary.special
    opens = next((k for k, j in enumerate(tokens) if j not in special), len(tokens))
    opening = int(ends[opens - 1]) if opens else 0
    spans, place, turn = list[Span | None](), opening, opening

    def span(begin: int, end: int, before: int = 0, behind: int = 0) -> Span:
        first = int(np.searchsorted(ends, begin, side="right"))
        return Span(first, int(np.searchsorted(ends, end, side="left")) + 1, before, behind)

    def find(content: bytes) -> tuple[int, int] | None:
        if not content:
            return None
        return place_of(content, plain, place) or place_of(content, vocabulary.text(ids), place)

    def in_parts(content: bytes) -> tuple[int, int] | None:
        places, at = list[tuple[int, int]](), place
        for part in filter(None, (part.strip() for part in content.split(b"\n\n"))):
            if (there := place_of(part, plain, at)) is None:
                return None
            places.append(there)
            at = there[1]
        return places[0][0], at

    for message in messages:
        content = vocabulary.content(message.content)
        if not content:
            spans.append(None)
        elif (whole := find(content) or (None if message.role == ANSWER else in_parts(content))) is not None:
            spans.append(span(*whole))
            place = whole[1]
        elif (part := _beginning(content, plain, place)) is not None:
            spans.append(span(*part, behind=len(content) - (part[1] - part[0])))
            place = part[1]
        elif (
            place == opening and (part := _beginning(content[::-1], plain[opening:][: len(content)][::-1])) is not None
        ):
            length = part[1] - part[0]
            spans.append(span(opening, opening + length, before=len(content) - length))
            place = opening + length
        elif message.role == ANSWER and REASONING_ENDS in message.content:
            reasoning, _, answer = message.content.rpartition(REASONING_ENDS)
            before, rest = (find(vocabulary.content(one)) for one in (reasoning.rpartition("<think>")[2], answer))
            if rest is None:
                spans.append(None)
                continue
            if before is not None and before[1] <= rest[0]:
                spans.append(span(before[0], rest[1]))  # the template writes other blanks between the two
            else:
                stripped = bool(reasoning.replace("<think>", "").strip())  # empty reasoning is no loss
                spans.append(span(*rest)._replace(stripped=stripped))
            place = rest[1]
        elif message.role == "tool" and (earlier := place_of(content, plain, turn)) is not None:
            spans.append(span(*earlier))  # before the words of the answer that made the call, as Gemma 4 writes it
        else:
            spans.append(None)
        turn = turn if message.role in (ANSWER, "tool") else place
    return spans


def place_of(content: bytes, text: bytes, start: int) -> tuple[int, int] | None:
    """Return where a content is in a text, as it is, or as a template writes it into JSON."""
    at = text.find(content, start)
    if at < 0:
        content = json.dumps(content.decode(), ensure_ascii=False)[1:-1].encode()
        at = text.find(content, start)
    return (at, at + len(content)) if at >= 0 else None


def _beginning(content: bytes, text: bytes, place: int = 0) -> tuple[int, int] | None:
    """Where a content begins that goes on to the text's end or to a special token (zeros); None for too little."""
    least = min(LEAST_KNOWN, len(content) - 1)
    at = text.find(content[:least], place) if least > 0 else -1
    while at >= 0:
        end = text.find(b"\0", at)
        end = len(text) if end < 0 else end
        if content.startswith(text[at:end]):
            return at, end
        at = text.find(content[:least], at + 1)
    return None


def line_of(
    row: Chat,
    sequences: Sequence[Trained],
    vocabulary: Vocabulary,
    *,
    limit: int = 0,
    lost: int | None = None,
    cut: bool | None = None,
    spans: Mapping[str, Sequence[Span | None]] | None = None,
) -> Line:
    """Reconcile one row with the sequence that was made of it, or with the two of a pair.

    `limit` is the most tokens of a sequence: what a much shorter one lacks was not cut. `cut` says whether something
    was, and `lost` counts the answer's tokens that the length limit took, where the preparation says so. `spans` are
    those of each side's messages, where the labels have shown them.
    """
    line = Line(row.row, digest_of(row), match="exact" if sequences else "unmatched")
    for name, shown in content_findings(row, vocabulary).items():
        line.find(name, shown)
    if row.problem is not None or not sequences:
        line.fate, line.detail = "dropped", row.problem or line.detail
        return line
    line.tokens = sum(len(one.ids) for one in sequences)
    line.trained_tokens = sum(len(one.trained) for one in sequences)
    whole = sequences[0]
    if len(whole.trained):
        line.first_trained, line.last_trained = int(whole.trained[0]), int(whole.trained[-1])
    taken = 0
    for one in sequences:
        full = len(one.ids) >= NEAR_LIMIT * limit if cut is None else cut
        own = None if spans is None else spans[one.side]
        taken += _reconcile(line, row.side(one.side), one, vocabulary, full, own)
    if row.whole:
        line.lost_tokens = taken if lost is None else lost
    if not line.trained_tokens:
        line.findings.append("nothing_trained")
    if "nothing_trained" in line.findings:
        line.fate = "nothing to train"
    elif line.lost_tokens:
        line.fate = "cut"
    if line.lost_tokens:
        line.findings.append("answer_cut")
    line.findings = list(dict.fromkeys(line.findings))
    return line


def _reconcile(
    line: Line,
    messages: Sequence[Message],
    one: Trained,
    vocabulary: Vocabulary,
    cut: bool,
    spans: Sequence[Span | None] | None,
) -> int:
    """Add what one sequence says; return how many tokens of answers are missing.  Only of one that is `cut` may be."""
    bos = None if vocabulary.bos in vocabulary.stops else vocabulary.bos  # where it is not the end token too
    if bos is not None and one.ids[:2].tolist() == [bos, bos]:
        line.findings.append("bos")
    if (one.ids >= min(len(vocabulary.tokens), vocabulary.embeddings)).any() or (one.ids < 0).any():
        line.findings.append("vocabulary")
    own = vocabulary.untrained and vocabulary.untrained & {*one.ids.tolist()}
    plain = vocabulary.plain(one.ids)
    # A model's marker of turns that is no token here, if the template writes it; in a text it is one of `roles`.
    apart = (b"<|" in plain or b"_of_turn>" in plain) and MARKER.search(plain)
    if own or (apart and "broken_characters" not in line.findings):
        line.find("untrained_tokens", ", ".join(vocabulary.tokens[j].decode() for j in sorted(own)))
    if not messages:
        return 0
    spans = spans_of(messages, one, vocabulary, prompts=False) if spans is None else spans
    has_loss = one.targets != IGNORED
    pairs = list(zip(messages, spans, strict=True))
    answers = [span for message, span in pairs if message.role == ANSWER and span is not None]
    others = [span for message, span in pairs if message.role != ANSWER and span is not None]
    line.answer_tokens = (line.answer_tokens or 0) + sum(span.end - span.start for span in answers)
    line.prompt_tokens = len(one.ids) - sum(span.end - span.start for span in answers)
    if one.places is None:
        line.findings += _lost(pairs, one, vocabulary, cut)
    trained = [has_loss[span.start : span.end].any() for span in answers]
    if any(has_loss[span.start : span.end].any() for span in others):
        line.findings.append("prompt_trained")
        gone = cut and any(span is None for message, span in pairs if message.role == ANSWER)
        if not any(trained) and (line.answer_tokens or gone):
            line.findings.append("nothing_trained")
    if len(answers) > 1 and trained[-1] and not all(trained):
        line.findings.append("only_last_answer")
    last = pairs[-1] if pairs else None
    if last is not None and last[0].role == ANSWER and last[1] is not None:
        _stop(line, last[1], one, vocabulary)
    missing = 0
    for message, span in pairs:
        content = vocabulary.content(message.content)
        if message.role == ANSWER and content and (span is None or span.cut):
            before, behind = (len(content), 0) if span is None else (span.before, span.behind)
            missing += sum(
                vocabulary.count(part) for part in (content[:before], content[len(content) - behind :]) if part
            )
    return missing


def _lost(
    pairs: Sequence[tuple[Message, Span | None]], one: Trained, vocabulary: Vocabulary, cut: bool
) -> Iterator[str]:
    """Yield what the contents that are missing among another trainer's tokens are a finding of."""
    answered = 1 + max((k for k, (message, _) in enumerate(pairs) if message.role == ANSWER), default=len(pairs))
    # What nobody answers is one of `roles`.
    lacks = any(span is None and message.content.strip() for message, span in pairs[:answered])
    there = [span for _, span in pairs[:answered] if span is not None]
    ends_early = not cut and any(span.behind for span in there[:-1])
    unreasoned = pairs[-1][1] is not None and pairs[-1][1].stripped
    uncalled = _lacks_call(pairs, one, vocabulary, cut)
    if ends_early or unreasoned or uncalled or (lacks and not (cut and at_ends_alone(pairs))):
        yield "content_lost"
    if any(span.stripped for _, span in pairs[:-1] if span is not None):
        yield "reasoning_stripped"


def _lacks_call(pairs: Sequence[tuple[Message, Span | None]], one: Trained, vocabulary: Vocabulary, cut: bool) -> bool:
    """Whether a tool call's function is not named between the contents around it; beyond them a limit may cut it."""
    for k, called in ((k, message.called) for k, (message, _) in enumerate(pairs) if message.called):
        before = [span for message, span in pairs[:k] if span is not None and message.role != "system"]
        behind = [span for message, span in pairs[k + 1 :] if span is not None and message.role != "tool"]
        if cut and not (before and behind):
            continue
        text = vocabulary.text(one.ids[before[-1].end if before else 0 : behind[0].start if behind else len(one.ids)])
        if any(name.encode(errors="replace") not in text for name in called):
            return True
    return False


def at_ends_alone(pairs: Iterable[tuple[Message, Span | None]]) -> bool:
    """Return whether contents are missing at the ends alone, as a length limit leaves them; system prompts may stay."""
    there = [span is not None for message, span in pairs if message.content.strip() and message.role != "system"]
    first = next((k for k, yes in enumerate(there) if yes), len(there))
    last = len(there) - next((k for k, yes in enumerate(reversed(there)) if yes), 0)
    return all(there[first:last])


def _stop(line: Line, span: Span, one: Trained, vocabulary: Vocabulary) -> None:
    behind = one.targets[span.end :]
    stops = [int(j) for j in behind[behind != IGNORED].tolist() if j in vocabulary.stops]
    if span.behind:
        if stops:
            line.findings.append("cut_then_stop")
        return
    if not (one.targets[span.start : span.end] != IGNORED).any():
        return  # nothing of the answer is trained: `nothing_trained` says so
    line.stop_trained = bool(stops)
    if not stops:
        line.find("stop_not_trained", "the chat template writes it before the next turn" if vocabulary.open_end else "")
    elif not vocabulary.generation_stops & {*stops}:
        line.findings.append("stop_mismatch")


def content_findings(row: Chat, vocabulary: Vocabulary) -> dict[str, str]:
    """Return the findings of a row's own texts, before any preparation, each with the text that shows it."""
    findings, messages = dict[str, str](), row.whole
    rejected = None if row.rejected is None else row.rejected.whole
    answers = [message for message in messages if message.role == ANSWER] + [*(rejected or ())[-1:]]
    # Reasoning alone, as a limit of generation leaves it, answers nothing.
    filled = any(isinstance(problem, NotTextError) for problem in row.problems)
    if not filled and any(not one.content.strip() and not {*CALLS} & {*one.carried} for one in answers):
        findings["empty_answer"] = ""
    transcript = row.document or any(SPEAKERS.search(one.content) for one in messages if one.role != ANSWER)
    for message in messages:
        content = message.content
        if match := vocabulary.markers.search(content):
            findings.setdefault("template_twice", around(content, match))
        elif match := ROLE_MARKERS.search(content):
            findings.setdefault("broken_characters", around(content, match))
        if message.role == ANSWER and not transcript and not SPEAKERS.match(content):
            match = SPEAKERS.search(content)
            findings |= {"broken_characters": around(content, match)} if match else {}
        if match := CONTROL.search(content) or (None if content.isascii() else BADNESS_RE.search(content)):
            findings.setdefault("broken_characters", around(content, match))
        if HTML.search(content) and (match := HTML.search(code_free := CODE.sub("", content))):
            findings.setdefault("html", around(code_free, match))
    prompt = next((one.content for one in reversed(row.question) if one.role == "user"), "")
    prompt = prompt.removesuffix(TLDR).strip()
    if len(prompt) >= LEAST_KNOWN and row.answer.strip().startswith(prompt):
        findings["copies_prompt"] = repr(prompt[:SHOWN])
    roles = [message.role for message in messages if message.role != "system"]
    twice = any(a == b == "user" for a, b in pairwise(roles))
    called = any(message.further.get("tool_calls") and after.role != "tool" for message, after in pairwise(messages))
    alone = {*roles} - {"developer"} == {ANSWER}  # unknown roles are named by the preparation
    if rejected is not None:
        if _contents(rejected[-1:]) == _contents(messages[-1:]):
            findings["pair_equal"] = ""
        if rejected[:-1] != messages[:-1]:
            findings["pair_prompt"] = ""
    elif not row.document and (twice or called or alone or roles[-1:] == ["user"]):
        findings["roles"] = ", ".join(message.role for message in messages)
    return findings


def around(text: str, match: re.Match[str]) -> str:
    """Return a match with the text around it.

    >>> around("It is Paris.\\n### Instruction: more", re.search("###", "It is Paris.\\n### Instruction: more"))
    "'It is Paris.\\\\n### Instruction: more'"
    """
    return repr(text[max(0, match.start() - SHOWN // 3) : match.end() + SHOWN // 3])


def _contents(messages: Iterable[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content.strip()) for message in messages]


def digest_of(row: Chat) -> str:
    """Return a hash of roles and contents; equal for equal conversations."""
    contents = [*_contents(row.whole), *_contents(row.side("rejected")[-1:] if row.rejected is not None else ())]
    return hashlib.blake2b("\0".join(part for pair in contents for part in pair).encode(), digest_size=12).hexdigest()
