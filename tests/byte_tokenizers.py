"""Tokenizers made in the test, for which a token is a byte, so that anybody can count them."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
PAD, BOS, EOS, START, END = range(len(SPECIAL))

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(
    *,
    opens: bool = True,
    closes: bool = False,
    merges: Sequence[tuple[str, str]] = (),
    chat_template: str | None = None,
    eos: str | None = "</s>",
) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each merge ("Ġ" is the space).

    `opens` puts <s> before a text, as Llama's does, `closes` </s> behind it, as T5's does.
    """
    letters = sorted(ByteLevel.alphabet())
    vocab = {token: j for j, token in enumerate([*SPECIAL, *letters, *(a + b for a, b in merges)])}
    inner = Tokenizer(BPE(vocab, list(merges)))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = ByteDecoder()  # type: ignore[assignment]
    if opens or closes:
        inner.post_processor = TemplateProcessing(  # type: ignore[assignment]
            single=f"{'<s> ' if opens else ''}$A{' </s>' if closes else ''}",
            special_tokens=[("<s>", BOS), ("</s>", EOS)],
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=eos,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=512,
    )
    made.chat_template = chat_template
    return made
