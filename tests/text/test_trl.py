"""What the ledger says of sets that TRL's trainers have prepared is what they train on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM

from families import FAMILIES, tokenizer_of
from tsqlora.run.text_audit import Reconciled, audit_sequences
from tsqlora.text.vocabulary import vocabulary_of

trl = pytest.importorskip("trl", reason="needs trl")

disable_progress_bars()
pytestmark = [
    # TRL 1.16 sets these by their old names, and warns of the end of its own options.
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:::trl"),
]

TOKENIZER = tokenizer_of(FAMILIES["qwen 2.5"])
CHATS = [
    [
        {"role": "user", "content": f"What is the number {j} plus one, in words please?"},
        {"role": "assistant", "content": f"The number is {j + 1}, as everybody knows." + f" More of {j}." * (j % 7)},
    ]
    for j in range(24)
]
MESSAGES = [{"messages": chat} for chat in CHATS]
COMPLETIONS = [{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS]
PAIRS = [
    {"prompt": [question], "chosen": [answer], "rejected": [{"role": "assistant", "content": "I do not know, sorry."}]}
    for question, answer in CHATS
]


def audited(
    rows: list[dict[str, Any]], folder: Path, *, pairs: bool = False, source: bool = True, **options: Any
) -> tuple[Reconciled, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(TOKENIZER), num_key_value_heads=2, max_position_embeddings=2048, **sizes)
    common = {"output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, **options}
    trainer, arguments = (trl.DPOTrainer, trl.DPOConfig) if pairs else (trl.SFTTrainer, trl.SFTConfig)
    reference = {"ref_model": LlamaForCausalLM(config)} if pairs else {}
    made = trainer(
        model=LlamaForCausalLM(config),
        args=arguments(**common),
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
        **reference,
    )
    data = rows if source else None
    return audit_sequences(made.train_dataset, made.data_collator, vocabulary_of(TOKENIZER), data=data), made


@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize(
    ("rows", "options", "findings"),
    [
        (MESSAGES, {}, ["prompt_trained"]),
        (COMPLETIONS, {}, []),
        (MESSAGES, {"padding_free": True, "max_length": None}, ["prompt_trained"]),
    ],
)
def test_a_row_has_the_tokens_of_its_batch(
    rows: list[dict[str, Any]], options: dict[str, Any], findings: list[str], source: bool, tmp_path: Path
) -> None:
    result, trainer = audited(rows, tmp_path, source=source, **options)
    for line, row in zip(result.lines, trainer.train_dataset, strict=True):
        assert (line.findings, line.fate, line.match, line.stop_trained) == (findings, "trained", "exact", True)
        labels = np.asarray(trainer.data_collator([row])["labels"]).reshape(-1)[1:]
        assert line.trained_tokens == (labels != -100).sum()


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_find_their_source(strategy: str, tmp_path: Path) -> None:
    result, _ = audited(MESSAGES, tmp_path, packing=True, packing_strategy=strategy, max_length=512)
    assert {line.fate for line in result.lines} == {"trained"}
    assert {line.match for line in result.lines} == {"exact"}
    assert result.unmatched == 0
    assert all(line.stop_trained for line in result.lines)


def test_what_the_length_limit_takes_is_counted(tmp_path: Path) -> None:
    result, trainer = audited(MESSAGES, tmp_path, max_length=140)
    vocabulary = vocabulary_of(TOKENIZER)
    for line, row, chat in zip(result.lines, trainer.train_dataset, CHATS, strict=True):
        kept = (
            vocabulary.text(row["input_ids"])
            .partition(b"assistant\n")[2]
            .removesuffix(b"\n")
            .removesuffix(b"<|im_end|>")
        )
        lost = len(chat[1]["content"].encode()) - len(kept)
        assert line.lost_tokens == lost
        assert ("answer_cut" in line.findings) == (lost > 0)


def test_both_answers_of_a_pair_are_read(tmp_path: Path) -> None:
    result, trainer = audited(PAIRS, tmp_path, pairs=True)
    for line, row in zip(result.lines, trainer.train_dataset, strict=True):
        assert (line.findings, line.fate) == ([], "trained")
        assert line.trained_tokens == len(row["chosen_ids"]) + len(row["rejected_ids"])
