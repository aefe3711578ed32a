"""Read cells of text as prompt and target: instructions, completions, documents with summaries, plain text."""

from tsqlora.data.cells import text_at, text_or_empty
from tsqlora.data.columns import Columns
from tsqlora.data.formats.chats import Chat, Example, Manner, Turn, refuse_unread
from tsqlora.data.rows import Rows
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


def _target(rows: Rows, i: int, columns: Columns, manner: Manner) -> str | None:
    return text_at(rows, i, columns.label) if manner.targets and columns.label is not None else None


def read_alpaca(rows: Rows, i: int, columns: Columns, manner: Manner) -> Example | Chat:
    """A chat of one exchange if the tokenizer has a template, else Alpaca's own prompt.

    A sequence-to-sequence model reads instruction and input with a blank line between them.
    """
    refuse_unread(rows, i, ("system", "history"))
    instruction = text_at(rows, i, columns.text)
    further = text_or_empty(rows, i, columns.text_pair)
    output = _target(rows, i, columns, manner)
    plain = f"{instruction}\n\n{further}" if further else instruction
    if manner.seq2seq:
        return Example(plain, output)
    if manner.chat:
        answer = () if output is None else (Turn("assistant", output),)
        return Chat((Turn("user", plain), *answer))
    template = WITH_INPUT if further else WITHOUT_INPUT
    return Example(template.format(instruction=instruction, input=further), output)


def read_prompt(rows: Rows, i: int, columns: Columns, manner: Manner) -> Example:
    """A prompt and its completion with nothing between them: a space must be part of one of the texts."""
    target = _target(rows, i, columns, manner)
    return Example(text_at(rows, i, columns.text), target)


# Radford et al. (2019), GPT-2: the prompt for a summary.
TLDR = "\n\nTL;DR:"


def read_document(rows: Rows, i: int, columns: Columns, manner: Manner) -> Example:
    """The document and "TL;DR:", then the summary; a sequence-to-sequence model reads the document alone.

    The space between them belongs to the summary: most tokenizers have words with the space before them.
    """
    document = text_at(rows, i, columns.text)
    summary = _target(rows, i, columns, manner)
    if manner.seq2seq:
        return Example(document, summary)
    return Example(document + TLDR, None if summary is None else f" {summary}")


def read_text(rows: Rows, i: int, columns: Columns, manner: Manner) -> Example:
    """Plain text: all target, or all prompt if targets are not read."""
    if manner.seq2seq:
        raise UnsupportedError(
            f"{rows.source}: plain text in column '{columns.text}' has no target for a sequence-to-sequence model; "
            "set data.prompt and data.target"
        )
    text = text_at(rows, i, columns.text)
    return Example("", text) if manner.targets else Example(text, None)
