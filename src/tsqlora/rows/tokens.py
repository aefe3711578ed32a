"""Tokenise rows: texts with loss on their targets alone, texts with a label, and words with tags."""

import reprlib
import signal
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from os.path import commonprefix
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tsqlora.errors import DataError, SettingsError, few, first_line
from tsqlora.rows.batches import IGNORED
from tsqlora.rows.chat import ANSWER, PLAINLY, REASONING, Chat, Format, Manner, Message
from tsqlora.rows.rows import Columns, Row, as_text, text_at, tokens_at
from tsqlora.rows.table import Samples, of_rows, samples_of

Encode = Callable[..., Samples]
"""Takes rows, their format or columns, a tokenizer, `max_length`, and without a format the encoded `labels`."""
SECONDS = 10.0
"""Time limit of a chat template for one chat: its loops may be endless."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a sample's text; `trained` if it is a target."""

    text: str
    trained: bool
    message: int | None
    """The number of its message in the row, of a prompt that of the last one; counted from the end if negative."""
    served: bool = False
    """Whether the text before it is, as it stands, the prompt that a server renders for it."""
    ids: list[int] = field(default_factory=list)
    """Its tokens, once it has any."""


class TemplateError(DataError):
    """A chat that its template does not render whole; `finding` names what is wrong."""

    def __init__(self, message: str, finding: str = "template_error") -> None:
        super().__init__(message)
        self.finding = finding


def pieces_of(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A plain text as it is, or a chat as the tokenizer's template renders it; an assistant's message is a target.

    A target is the difference between the template's prompt for a message and the template with it: exactly what a
    model has to write after the prompt that it will get. White space after the end token belongs to the next prompt.
    Where the template renders that prompt in another way once it is answered, and of a message that opens the chat, the
    target starts with its content. A chat that ends with another message ends with the prompt for an answer; if the
    template rewrites earlier answers, the last one alone is a target. Raises TemplateError if the template refuses the
    messages, or leaves out the last answer, its reasoning, tool calls, or tools.
    """
    messages, end = chat.messages, str(tokenizer.eos_token)
    if chat.plain:
        return [Piece(one.content, one.role == ANSWER, k) for k, one in enumerate(messages, -len(messages))]

    def rendered(count: int, *, prompt: bool) -> str:
        return render(replace(chat, messages=messages[:count]), tokenizer, prompt=prompt)

    def turn(i: int) -> tuple[str, Piece]:
        """The text before an answer, and the answer."""
        whole = rendered(i + 1, prompt=False)
        if i and whole.startswith(prompt := rendered(i, prompt=True)):
            return prompt, Piece(ended(whole[len(prompt) :]), i >= chat.context, i, served=True)
        probe = Message(ANSWER, "0" if messages[i].content.strip()[:1] != "0" else "1")
        other = render(replace(chat, messages=(*messages[:i], probe)), tokenizer, prompt=False)
        if other == whole:
            raise TemplateError(f"{chat.place}: the chat template does not write the last answer", "prompt_not_prefix")
        prompt = commonprefix([whole, other])  # noqa: RUF071  (texts, no paths)
        return prompt, Piece(ended(whole[len(prompt) :]), i >= chat.context, i)

    def ended(text: str) -> str:
        return text.rstrip() if tokenizer.eos_token and text.rstrip().endswith(end) else text

    preceding = [i - 1 if i and messages[i - 1].role != ANSWER else None for i in range(len(messages))]

    def made(answers: Sequence[int]) -> list[Piece]:
        """The text with these answers as targets; nothing where the template rewrites one once others follow."""
        pieces, seen = list[Piece](), ""
        for i in answers:
            prompt, answer = turn(i)
            # Some templates, as Phi 3's, close a whole text with an end token.
            if pieces and not prompt.startswith(seen):
                pieces.append(replace(closed := pieces.pop(), text=closed.text.removesuffix(end)))
                seen = seen.removesuffix(end)
            if not prompt.startswith(seen):
                return []
            pieces += [Piece(prompt[len(seen) :], False, preceding[i]), answer]
            seen = prompt + answer.text
        if messages[-1].role != ANSWER:
            final = rendered(len(messages), prompt=True)
            if not final.startswith(seen):
                return []
            pieces.append(Piece(final[len(seen) :], False, len(messages) - 1))
        return [piece for piece in pieces if piece.text]

    answers = [i for i, message in enumerate(messages) if message.role == ANSWER]
    return made(answers) or made(answers[-1:] if messages[-1].role == ANSWER else ())


def as_read(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The chat with what its messages carry beside their contents where the template reads it.

    What it reads shows in what it renders: reasoning may stand under another key. Raises TemplateError for what is not
    rendered in either way.
    """

    def text(*messages: Message, tools: Sequence[Any] = chat.tools) -> str | None:
        try:
            return render(replace(chat, messages=messages, tools=tools), tokenizer, prompt=False)
        except TemplateError:
            return None

    def require(read: Any, what: str) -> None:
        if not read:
            raise TemplateError(
                f"{chat.place}: the row has {what}, which the chat template does not read, so a model would not learn "
                "it; give a template that does, move it into the text, or remove it",
                "content_lost",
            )

    messages = [*chat.messages]
    for k, key in [(k, key) for k, message in enumerate(messages) for key in message.carried]:
        message, before = messages[k], messages[:k]
        bare = replace(message, further={name: value for name, value in message.further.items() if name != key})
        made, without, value = text(*before, message), text(*before, bare), message.further[key]
        if made is None or made != without:  # what is refused as it stands is refused below
            continue
        others = [replace(bare, further={**bare.further, name: value}) for name in REASONING if key in REASONING]
        way = next((other for other in others if text(*before, other) not in (None, without)), None)
        require(way, f"'{key}' ({reprlib.repr(value)})")
        messages[k] = way or message
    if chat.tools and (whole := text(*messages)) is not None:
        require(whole != text(*messages, tools=()), "'tools'")
    return replace(chat, messages=tuple(messages))


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase, *, prompt: bool) -> str:
    """The chat as its template writes it, with the `prompt` for an answer or without.  Raises TemplateError."""
    messages: list[Any] = [message.whole for message in chat.messages]
    tools: dict[str, Any] = {"tools": list(chat.tools)} if chat.tools else {}
    try:
        with _time_limit(SECONDS):
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **tools))
    except Exception as error:  # a template is a program of whoever made the model
        if not tokenizer.chat_template:
            raise TemplateError(
                f"{chat.place}: rows are chats, and the model's tokenizer has no chat template; give a model for "
                "chats, or put a chat_template.jinja into its folder",
                "no_template",
            ) from error
        raise TemplateError(
            f"{chat.place}: the chat template refuses these turns ({first_line(error)}); correct one of the two"
        ) from error
    return as_text(text, "the chat", chat.place)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the code inside after a time; only in the main thread, since others get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


def tokens_of(pieces: Sequence[Sequence[Piece]], tokenizer: PreTrainedTokenizerBase) -> list[list[Piece]]:
    """The pieces of each sample with their tokens, without the tokenizer's special tokens.

    A piece's tokens follow those of the piece before it in their joint text. If a token would span the two, the piece
    is tokenised alone. So every piece has the same tokens whether or not another follows it.
    """
    # A row's last piece, most often the longest, is seldom read alone.
    alone = iter(plain_tokens([piece.text for row in pieces for piece in (row[:-1] or row)], tokenizer))
    joint = iter(plain_tokens([a.text + b.text for row in pieces for a, b in pairwise(row)], tokenizer))
    tokens = list[list[Piece]]()
    for row in pieces:
        made, before = list[Piece](), list[int]()
        for j, piece in enumerate(row):
            own = next(alone) if j < len(row) - 1 or not j else None
            both = next(joint) if j else own or []
            follows = both[: len(before)] == before
            if own is None and not follows:
                own = plain_tokens([piece.text], tokenizer)[0]
            made.append(replace(piece, ids=both[len(before) :] if follows else own or []))
            before = own or []
        tokens.append(made)
    return tokens


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    text = [k for k, special in enumerate(mask) if not special]
    return (ids[: text[0]], ids[text[-1] + 1 :]) if text else (ids, [])


def plain_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each text alone, without special tokens; long texts are cut and counted later."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False, return_attention_mask=False)
    return encoded["input_ids"]  # pyright: ignore[reportReturnType]


_SHOWN = 3
"""Rows that a note lists."""


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A row's sample, whether it was cut, and the tokens that its target needs."""

    sample: dict[str, Any]
    cut: bool
    needs: int
    places: tuple[tuple[int, int, int], ...] = ()
    """Number of the message, start and end of each piece among the tokens; an end may lie beyond them."""
    chat: Chat = field(default_factory=lambda: Chat(()))
    """The row as its template reads it."""
    pieces: Sequence[Piece] = ()
    """All of the row, also those that the limit cuts."""

    @property
    def targets(self) -> int:
        """Tokens of all targets, also of those that are cut."""
        return sum(len(piece.ids) for piece in self.pieces if piece.trained)


def tokenise_generation(
    rows: Sequence[Row],
    format: Format,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seq2seq: bool,
    with_targets: bool = True,
    measured: bool = False,
    refused: dict[int, DataError] | None = None,
) -> Samples:
    """One sample a row, not padded: input_ids, attention_mask, and labels if `with_targets`.

    The input of a causal model is prompt and target, and labels are -100 outside targets. The input of a
    sequence-to-sequence model is the prompt, and its labels are the target. Targets end with the end token. No token
    spans prompt and target: the prompt alone, which `with_targets=False` makes, has the tokens of training.

    With `measured` a chat ends before its last answer, the reference of a generated one.

    A long prompt loses its beginning, after the tokens that open every text, and a long plain text its end. A chat
    loses whole exchanges, the oldest first, and keeps its system prompt. `truncated` counts all three. A row whose
    target, or a chat whose last exchange, does not fit whole is left out. Raises DataError with file and row for
    missing values and empty targets, and for what a template refuses; or adds the errors of a causal model's rows to
    `refused`, by the places of the rows in their file.
    """
    # Targets of a sequence-to-sequence model may end with the token that closes its texts.
    if tokenizer.eos_token_id is None and not (seq2seq and special_tokens(tokenizer)[1]):
        raise SettingsError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no end token, so answers would not end; "
            "set its eos_token"
        )
    require_room(max_length, least_prompt(tokenizer) - 2, 2)
    manner = Manner(seq2seq=seq2seq, chat=bool(tokenizer.chat_template), targets=with_targets, measured=measured)
    if seq2seq:
        made = _seq2seq([format.read(row, manner) for row in rows], tokenizer, max_length)
    else:
        made = causal_rows([format.parse(row, manner) for row in rows], tokenizer, max_length)
    errors = {row.id: one for row, one in zip(rows, made, strict=True) if isinstance(one, DataError)}
    if errors and refused is None:
        raise next(iter(errors.values()))
    (refused if refused is not None else {}).update(errors)
    both = [(row, one) for row, one in zip(rows, made, strict=True) if isinstance(one, Tokenised)]
    fitting = [(row, one) for row, one in both if one.needs <= max_length]
    return of_rows(
        [one.sample for _, one in fitting],
        [row for row, _ in fitting],
        format.columns,
        truncated=sum(one.cut for _, one in fitting),
        left_out=tuple((row.place, one.needs) for row, one in both if one.needs > max_length),
    )


def tokenise_pairs(
    rows: Sequence[Row],
    format: Format,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    refused: dict[int, DataError] | None = None,
) -> Samples:
    """One sample a preference row: both answers, each after its prompt, in one list, and where the second begins.

    A row is left out if one of its answers does not fit whole.
    """
    chosen, rejected = (
        tokenise_generation(rows, one, tokenizer, max_length=max_length, seq2seq=False, refused=refused)
        for one in format.sides
    )
    first, second = ({row: j for j, row in enumerate(split.ids.tolist())} for split in (chosen, rejected))
    both = [row for row in first if row in second]
    sides = ((chosen[first[row]], rejected[second[row]]) for row in both)
    samples = [{key: [*a[key], *b[key]] for key in a} | {"second": len(a["input_ids"])} for a, b in sides]
    left_out = {place: needs for split in (chosen, rejected) for place, needs in split.left_out}
    return samples_of(
        samples,
        tuple(chosen.hashes[first[row]] for row in both),
        max(chosen.truncated, rejected.truncated),
        np.array(both, dtype=np.int64),
        tuple(left_out.items()),
    )


def require_room(max_length: int, special: int, texts: int) -> None:
    """Raises SettingsError if special tokens leave no room for a token of each text."""
    if max_length < special + texts:
        raise SettingsError(
            f"data.max_length {max_length} leaves no room for text beside {special} special tokens; "
            f"set it to {special + texts} or more"
        )


def require_tokens(ids: Sequence[int], place: str) -> None:
    """Raises DataError with the place for a text without any token."""
    if not ids:
        raise DataError(f"{place}: the tokenizer makes no token of this text; remove the row")


def left_out(split: Samples) -> list[str]:
    """A note that counts the rows left out and lists the first, if there are any."""
    if not split.left_out:
        return []
    count, first = len(split.left_out), few([place for place, _ in split.left_out], _SHOWN)
    why = "the answer (of a chat, with its question) is longer than max_length"
    return [f"{count} of {len(split) + count} rows are left out: {why}: {first}"]


def references(rows: Iterable[Row], format: Format) -> list[str]:
    """Each row's target, of a chat the last assistant turn, without white space around it."""
    return [format.read(row, PLAINLY).messages[-1].content.strip() for row in rows]


def causal_rows(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Tokenised | DataError]:
    """What a causal model reads of each row, or why nothing."""
    made, read = dict[int, Tokenised | DataError](), dict[int, tuple[Chat, list[Piece]]]()
    for j, chat in enumerate(chats):
        try:
            if chat.problems:
                raise chat.problems[0]
            chat = as_read(chat, tokenizer)
            read[j] = chat, pieces_of(chat, tokenizer)
        except DataError as error:
            made[j] = error
    tokens = tokens_of([pieces for _, pieces in read.values()], tokenizer)
    for (j, (chat, _)), pieces in zip(read.items(), tokens, strict=True):
        try:
            require_tokens(pieces[-1].ids, chat.place)
            made[j] = replace(causal_sample(chat, pieces, tokenizer, max_length), chat=chat, pieces=pieces)
        except DataError as error:
            made[j] = error
    return [made[j] for j in range(len(chats))]


def causal_sample(
    chat: Chat, pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Tokenised:
    """Make one sample of a causal model.  A chat that is too long loses whole exchanges, the oldest first."""
    made = _causal_sample(pieces, tokenizer, max_length, plain=chat.plain)
    if chat.plain or not made.cut:
        return made
    messages = chat.messages
    system = next((k for k, one in enumerate(messages) if one.role not in ("system", "developer")), len(messages))
    starts = [k for k, one in enumerate(messages) if one.role == "user" and k > system]

    def from_message(k: int) -> Tokenised:
        context = max(chat.context - k + system, min(chat.context, system))
        rest = replace(chat, messages=(*messages[:system], *messages[k:]), context=context)
        pieces = tokens_of([pieces_of(rest, tokenizer)], tokenizer)[0]
        made = _causal_sample(pieces, tokenizer, max_length, plain=False)
        places = ((j if j < system else j + k - system, *span) for j, *span in made.places)
        return replace(made, places=tuple(places))

    fits = bisect_left(starts, True, key=lambda k: not from_message(k).cut)
    return replace(from_message(starts[min(fits, len(starts) - 1)]), cut=True) if starts else made


def _causal_sample(
    pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase, max_length: int, *, plain: bool
) -> Tokenised:
    if not plain:  # the template writes the special tokens
        opening, start, first = list[int](), tokenizer.bos_token_id, pieces[0]
        # A start token that marks every turn opens no text.
        if isinstance(start, int) and first.ids[:1] == [start] and sum(piece.ids.count(start) for piece in pieces) == 1:
            opening, pieces = [start], [replace(first, ids=first.ids[1:]), *pieces[1:]]
    else:
        (opening, _), last, end = special_tokens(tokenizer), pieces[-1], tokenizer.eos_token_id
        if last.trained and end is not None and last.ids[-1:] != [end]:
            pieces = [*pieces[:-1], replace(last, ids=[*last.ids, end])]
    # The opening is never cut, and the pieces are, to the rest.
    room, total = max_length - len(opening), sum(len(piece.ids) for piece in pieces)
    lone = len(pieces) == 1 and pieces[0].trained and plain
    over = 0 if lone else max(0, total - room)
    ids = [token for piece in pieces for token in piece.ids]
    labels = [token if piece.trained else IGNORED for piece in pieces for token in piece.ids]
    span = slice(over, over + room)
    input_ids = [*opening, *ids[span]]
    sample: dict[str, Any] = {"input_ids": input_ids, "attention_mask": [1] * len(input_ids)}
    ends = np.cumsum([len(opening) - over, *(len(piece.ids) for piece in pieces)]).tolist()
    both = zip(pieces, pairwise(ends), strict=True)
    places = tuple((piece.message, max(0, start), end) for piece, (start, end) in both if piece.message is not None)
    if not pieces or not pieces[-1].trained:
        return Tokenised(sample, total > room, 0, places)
    needs = 0 if lone else len(opening) + (len(pieces[-1].ids) + 1 if plain else total)
    labels = [*[IGNORED] * len(opening), *labels[span]]
    labels[0] = IGNORED  # nothing predicts the first token
    return Tokenised({**sample, "labels": labels}, total > room, needs, places)


def _seq2seq(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Tokenised]:
    assert all(chat.plain for chat in chats), "formats refuse chats for sequence-to-sequence models"
    front, back = special_tokens(tokenizer)
    room, end = max_length - len(front) - len(back), tokenizer.eos_token_id
    answers, targets = [chat.answer for chat in chats if chat.ends_answered], list[list[int]]()
    if answers:
        encoded: Any = tokenizer(text_target=answers, verbose=False)["input_ids"]
        targets = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in encoded]
    special, tokenised = set(tokenizer.all_special_ids), list[Tokenised]()
    prompts = ["".join(message.content for message in chat.question) for chat in chats]
    for i, ids in enumerate(plain_tokens(prompts, tokenizer)):
        require_tokens(ids, chats[i].place)
        input_ids = [*front, *ids[-room:], *back]
        sample: dict[str, Any] = {"input_ids": input_ids, "attention_mask": [1] * len(input_ids)}
        if targets:
            require_tokens([token for token in targets[i] if token not in special], chats[i].place)
            sample["labels"] = targets[i]
        tokenised.append(Tokenised(sample, len(ids) > room, len(targets[i]) if targets else 0))
    return tokenised


def least_prompt(tokenizer: PreTrainedTokenizerBase) -> int:
    """The least tokens that leave room for text: the special ones, and two."""
    return sum(map(len, special_tokens(tokenizer))) + 2


def tokenise(
    rows: Sequence[Row],
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    labels: Sequence[Any] | None,
) -> Samples:
    """One sample a row, of at most `max_length` tokens, not padded; `labels` are encoded, or None.

    Raises DataError with file and row for a text that is missing or not text, SettingsError if `max_length`
    leaves no room for text.
    """
    pair = columns.text_pair
    require_room(max_length, tokenizer.num_special_tokens_to_add(pair=pair is not None), 1 if pair is None else 2)
    texts = [text_at(row, columns.text) for row in rows]
    pairs = None if pair is None else [text_at(row, pair) for row in rows]

    def encoded(places: Sequence[int], **cut: Any) -> list[dict[str, Any]]:
        first, second = [texts[i] for i in places], None if pairs is None else [pairs[i] for i in places]
        # Long texts are counted, not warned about.
        made = tokenizer(first, second, padding=False, return_attention_mask=True, verbose=False, **cut)
        return [{key: values[k] for key, values in made.items()} for k in range(len(places))]

    samples = encoded(range(len(rows)))
    long = [i for i, sample in enumerate(samples) if len(sample["input_ids"]) > max_length]
    if long:  # only these are tokenised twice
        for i, sample in zip(long, encoded(long, truncation=True, max_length=max_length), strict=True):
            samples[i] = sample
    for row, sample in zip(rows, samples, strict=True):
        require_tokens(sample["input_ids"], row.place)
    if labels is not None:
        samples = [{**sample, "labels": label} for sample, label in zip(samples, labels, strict=True)]
    return of_rows(samples, rows, columns, truncated=len(long))


def tokenise_words(
    rows: Sequence[Row],
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    labels: Sequence[Sequence[int]] | None,
) -> Samples:
    """One sample a row of tokens; the first piece of each has its tag as label, every other place -100.

    Without `labels` the first piece has the number of its token. A token behind the cut has no piece, and is counted.
    Raises DataError with file and row, SettingsError for a tokenizer that does not say which pieces a token has.
    """
    require_room(max_length, tokenizer.num_special_tokens_to_add(), 1)
    if not tokenizer.is_fast:
        raise SettingsError("token classification needs a fast tokenizer (tokenizer.json); give another model")
    samples, truncated, cut = list[dict[str, Any]](), 0, 0
    for i, row in enumerate(rows):
        words = tokens_at(row, columns.text)
        tags = range(len(words)) if labels is None else labels[i]
        whole = tokenizer(words, is_split_into_words=True, verbose=False)
        part = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length, verbose=False)
        own = [-1 if j is None else j for j in part.word_ids()]
        require_tokens([j for j in own if j >= 0], row.place)
        first = [j >= 0 and j != before for before, j in zip([-1, *own], own, strict=False)]
        truncated += len(part["input_ids"]) < len(whole["input_ids"])
        cut += len({j for j in whole.word_ids() if j is not None} - set(own))
        targets = [tags[j] if begins else IGNORED for j, begins in zip(own, first, strict=True)]
        samples.append({**{key: list(values) for key, values in part.items()}, "labels": targets})
    return of_rows(samples, rows, columns, truncated=truncated, cut_words=cut)
