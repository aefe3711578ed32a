"""Read cells of text as prompt and target: instructions, completions, documents with summaries, plain text."""

from tsqlora.data.cells import MissingError, Row, as_text, is_missing, text_at, text_or_empty
from tsqlora.data.columns import Columns
from tsqlora.data.formats.chats import Chat, Example, Manner, Turn
from tsqlora.errors import UnsupportedError

# Taori et al. (2023), Stanford Alpaca: the two prompts of its training code.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def _target(row: Row, columns: Columns, manner: Manner) -> str | None:
    if not manner.targets or columns.label is None:
        return None
    cell = row.cells.get(columns.label)
    if not isinstance(cell, dict) or not isinstance(cell.get("text"), list):
        return text_at(row, columns.label)
    # SQuAD (Rajpurkar et al., 2016): all answers and their places; none has an unanswerable question of version 2.
    first = next(iter(cell["text"]), None)
    if is_missing(first):
        raise MissingError(row.place, f"no text in column '{columns.label}'")
    return as_text(first, f"column '{columns.label}'", row.place)


def exchange(row: Row, columns: Columns, prompt: str, target: str | None, *, chat: bool) -> Example | Chat:
    """The row's system prompt, the prompt and its target: as a chat, or as text with a blank line after the first."""
    system = text_or_empty(row, columns.system)
    if chat:
        turns = (Turn("system", system), Turn("user", prompt), Turn("assistant", target or ""))
        return Chat(tuple(turn for turn in turns if turn.content))
    return Example(f"{system}\n\n{prompt}" if system else prompt, target)


def is_chat(columns: Columns, manner: Manner) -> bool:
    # By the column of system prompts, not by its cell: one file is read in one way.
    return columns.system is not None and manner.chat and not manner.seq2seq


def read_alpaca(row: Row, columns: Columns, manner: Manner) -> Example | Chat:
    """A chat of one exchange if the tokenizer has a template, else Alpaca's own prompt.

    A sequence-to-sequence model reads instruction and input with a blank line between them.
    """
    instruction = text_at(row, columns.text)
    further = text_or_empty(row, columns.text_pair)
    output = _target(row, columns, manner)
    plain = f"{instruction}\n\n{further}" if further else instruction
    if not manner.chat and not manner.seq2seq:
        plain = (WITH_INPUT if further else WITHOUT_INPUT).format(instruction=instruction, input=further)
    return exchange(row, columns, plain, output, chat=manner.chat and not manner.seq2seq)


def read_prompt(row: Row, columns: Columns, manner: Manner) -> Example | Chat:
    """A prompt and its completion with nothing between them: a space must be part of one of the texts.

    A context stands before the prompt, with a blank line between them, unless the prompt has it.
    """
    target = _target(row, columns, manner)
    prompt, context = text_at(row, columns.text), text_or_empty(row, columns.text_pair)
    plain = prompt if context in prompt else f"{context}\n\n{prompt}"
    return exchange(row, columns, plain, target, chat=is_chat(columns, manner))


# Radford et al. (2019), GPT-2: the prompt for a summary.
TLDR = "\n\nTL;DR:"


def read_document(row: Row, columns: Columns, manner: Manner) -> Example:
    """The document and "TL;DR:", then the summary; a sequence-to-sequence model reads the document alone.

    The space between them belongs to the summary: most tokenizers have words with the space before them.
    """
    document = text_at(row, columns.text)
    summary = _target(row, columns, manner)
    if manner.seq2seq:
        return Example(document, summary)
    return Example(document + TLDR, None if summary is None else f" {summary}")


def read_text(row: Row, columns: Columns, manner: Manner) -> Example:
    """Plain text: all target, or all prompt if targets are not read."""
    if manner.seq2seq:
        raise UnsupportedError(
            f"{row.source}: plain text in column '{columns.text}' has no target for a sequence-to-sequence model; "
            "set data.prompt and data.target"
        )
    text = text_at(row, columns.text)
    return Example("", text) if manner.targets else Example(text, None)
