"""Instructions: `instruction`, perhaps an `input`, and the `output` that follows them."""

from tsqlora.data.cells import text_at, text_or_nothing
from tsqlora.data.columns import Columns
from tsqlora.data.formats.chat import refuse_unread
from tsqlora.data.formats.example import Chat, Example, Manner, Turn
from tsqlora.data.rows import Rows

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


def read(rows: Rows, i: int, columns: Columns, manner: Manner) -> Example | Chat:
    """One exchange of a chat where the tokenizer has a template for it, else Alpaca's own prompt.

    A sequence-to-sequence model reads instruction and input as they stand, a blank line between them.
    """
    refuse_unread(rows, i, ("system", "history"))
    instruction = text_at(rows, i, columns.text)
    further = text_or_nothing(rows, i, columns.text_pair)
    output = text_at(rows, i, columns.label) if manner.targets and columns.label is not None else None
    plain = f"{instruction}\n\n{further}" if further else instruction
    if manner.seq2seq:
        return Example(plain, output)
    if manner.chat:
        answer = () if output is None else (Turn("assistant", output),)
        return Chat((Turn("user", plain), *answer))
    template = WITH_INPUT if further else WITHOUT_INPUT
    return Example(template.format(instruction=instruction, input=further), output)
