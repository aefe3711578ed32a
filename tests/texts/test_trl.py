"""The ledger of sets that TRL's trainers have prepared is what they train on."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, disable_progress_bars
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import tsqlora as tsq
from families import FAMILIES, tokenizer_of
from masked import masked
from tsqlora.auditing.texts.findings import OF_TOKENS
from tsqlora.auditing.texts.reconcile import Reconciled, audit_sequences
from tsqlora.auditing.texts.vocabulary import vocabulary_of
from tsqlora.errors import UnsupportedError

trl = pytest.importorskip("trl", reason="needs trl")

disable_progress_bars()
pytestmark = [
    # TRL 1.16 sets these by their old names, and warns of the end of its own options.
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:::trl"),
]

TOKENIZER = tokenizer_of(FAMILIES["qwen 2.5"])
# `assistant_only_loss` trains what these marks enclose; nothing else reads them.
TOKENIZER.chat_template = TOKENIZER.chat_template.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}",
)
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


def trained(rows: list[dict[str, Any]], folder: Path, *, pairs: bool = False, **options: Any) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sizes |= {"num_key_value_heads": 2, "eos_token_id": TOKENIZER.eos_token_id}
    config = LlamaConfig(vocab_size=len(TOKENIZER), max_position_embeddings=2048, **sizes)
    common = {"output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, **options}
    trainer, arguments = (trl.DPOTrainer, trl.DPOConfig) if pairs else (trl.SFTTrainer, trl.SFTConfig)
    reference = {"ref_model": LlamaForCausalLM(config)} if pairs else {}
    return trainer(
        model=LlamaForCausalLM(config),
        args=arguments(**common),
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
        **reference,
    )


def audited(rows: list[dict[str, Any]], folder: Path, *, source: bool = True, **options: Any) -> tuple[Reconciled, Any]:
    made, data = trained(rows, folder, **options), rows if source else None
    return audit_sequences(made.train_dataset, made.data_collator, vocabulary_of(TOKENIZER), data=data), made


@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize(
    ("rows", "options", "findings"),
    [
        (MESSAGES, {}, ["prompt_trained"]),
        (COMPLETIONS, {}, []),
        (MESSAGES, {"assistant_only_loss": True}, []),
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


def test_packed_rows_find_their_source(tmp_path: Path) -> None:
    result, _ = audited(MESSAGES, tmp_path, packing=True, packing_strategy="bfd", max_length=512)
    assert {line.fate for line in result.lines} == {"trained"}
    assert {line.match for line in result.lines} == {"exact"}
    assert result.unmatched == []
    assert all(line.stop_trained for line in result.lines)


def test_rows_that_packing_cut_at_the_limit_are_cut(tmp_path: Path) -> None:
    options: dict[str, Any] = {"packing": True, "packing_strategy": "bfd", "max_length": 140}
    packed, alone = (audited(MESSAGES, tmp_path, source=source, **options)[0] for source in (True, False))
    cut = sum("answer_cut" in line.findings for line in alone.lines)
    assert sum("answer_cut" in line.findings for line in packed.lines) == cut > 3
    assert {line.fate for line in packed.lines} == {"trained", "cut"}
    assert packed.unmatched == []


def test_parts_of_a_stream_are_rows_of_their_own(tmp_path: Path) -> None:
    result, trainer = audited(MESSAGES, tmp_path, packing=True, packing_strategy="wrapped", max_length=512)
    assert ([line.row for line in result.lines], result.finds) == ([*range(len(trainer.train_dataset))], OF_TOKENS)


def test_pieces_that_packing_cut_are_named_by_their_place(tmp_path: Path) -> None:
    long = [
        {
            "messages": [
                chat[0],
                {**chat[1], "content": chat[1]["content"] + "".join(f" {j} and {k}." for k in range(j * 3))},
            ]
        }
        for j, chat in enumerate(CHATS)
    ]
    result, trainer = audited(long, tmp_path, packing=True, packing_strategy="bfd_split", max_length=200)
    assert {(line.fate, line.match) for line in result.lines} == {("trained", "exact"), ("unknown", "unmatched")}
    whole = sum(line.match == "exact" for line in result.lines)
    made = sum(len(row["seq_lengths"]) for row in trainer.train_dataset)
    assert len(result.unmatched) == made - whole
    assert len({(one["row"], one["sequence"]) for one in result.unmatched}) == made - whole


def test_what_the_length_limit_takes_is_counted(tmp_path: Path) -> None:
    result, trainer = audited(MESSAGES, tmp_path, max_length=140)
    vocabulary = vocabulary_of(TOKENIZER)
    for line, row, chat in zip(result.lines, trainer.train_dataset, CHATS, strict=True):
        answer_left = (
            vocabulary.text(row["input_ids"])
            .partition(b"assistant\n")[2]
            .removesuffix(b"\n")
            .removesuffix(b"<|im_end|>")
        )
        lost = len(chat[1]["content"].encode()) - len(answer_left)
        assert line.lost_tokens == lost
        assert ("answer_cut" in line.findings) == (lost > 0)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("pairs", [False, True])
def test_rows_of_one_length_are_cut_and_not_packed(pairs: bool, mode: str, tmp_path: Path) -> None:
    texts = [" ".join(f"{name} and number {k}." for k in range(20)) for name in ("Ann", "Bob", "Cy", "Dee", "Eve")]
    rows: list[dict[str, Any]] = [{"text": text} for text in texts]
    if pairs:
        rows = [{"prompt": "Who is there?", "chosen": f" {text}", "rejected": f" Not {text}"} for text in texts]
    result, _ = audited(rows, tmp_path, pairs=pairs, max_length=60, truncation_mode=mode)
    assert {(line.match, line.tokens) for line in result.lines} == {("exact", 120 if pairs else 60)}


def test_both_answers_of_a_pair_are_read(tmp_path: Path) -> None:
    result, trainer = audited(PAIRS, tmp_path, pairs=True)
    for line, row in zip(result.lines, trainer.train_dataset, strict=True):
        assert (line.findings, line.fate) == ([], "trained")
        assert line.trained_tokens == len(row["chosen_ids"]) + len(row["rejected_ids"])


@pytest.mark.parametrize("pairs", [False, True])
def test_the_end_token_that_trl_writes_into_texts_is_a_stop(pairs: bool, tmp_path: Path) -> None:
    texts = [{"prompt": chat[0]["content"], "completion": f" {chat[1]['content']}"} for chat in CHATS]
    both = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " I do not know, sorry."} for row in texts
    ]
    result, _ = audited(both if pairs else texts, tmp_path, source=False, pairs=pairs)
    assert [(line.findings, line.stop_trained) for line in result.lines] == [([], True)] * len(CHATS)


@pytest.mark.parametrize("kind", ["SFTTrainer", "DPOTrainer", "Trainer"])
def test_a_trainer_that_was_built_is_audited_as_the_command_audits(kind: str, tmp_path: Path) -> None:
    rows = PAIRS if kind == "DPOTrainer" else COMPLETIONS
    trainer = trained(rows, tmp_path, pairs=kind == "DPOTrainer")
    if kind == "Trainer":
        made = [{"input_ids": row["input_ids"], "text": "a column that is no input"} for row in trainer.train_dataset]
        trainer = Trainer(
            trainer.model,
            TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            DataCollatorForLanguageModeling(TOKENIZER, mlm=False),  # which masks every pad, and so every end token
            train_dataset=Dataset.from_list(made),
            processing_class=TOKENIZER,
        )
    result = tsq.audit(trainer, data=rows, out=tmp_path / "audit")
    counts = {finding["name"]: finding["rows"] for finding in result["findings"] if finding["severity"] != "note"}
    assert counts == ({"stop_not_trained": 24} if kind == "Trainer" else {})
    assert result["fates"] == {"trained": 24}
    assert {line["match"] for line in pq.read_table(tmp_path / "audit" / "ledger.parquet").to_pylist()} == {"exact"}
    assert (tmp_path / "audit" / "audit.html").exists()
    alone = tsq.audit(trainer)
    assert alone["ledger"]["trained_tokens"].to_pylist() == [
        line["trained_tokens"] for line in pq.read_table(tmp_path / "audit" / "ledger.parquet").to_pylist()
    ]


def test_a_draw_of_a_trainer_is_audited_by_the_numbers_of_its_rows(tmp_path: Path) -> None:
    trainer = trained(COMPLETIONS, tmp_path)
    whole = tsq.audit(trainer)
    trainer.train_dataset = tsq.QualitySubset(trainer.train_dataset, fraction=0.5, seed=3)
    drawn = tsq.audit(trainer)
    assert drawn["ledger"].equals(whole["ledger"])


def test_a_trainer_whose_mask_is_inverted_is_an_error(tmp_path: Path) -> None:
    trainer = trained(COMPLETIONS, tmp_path)
    trainer = Trainer(
        trainer.model,
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
        DataCollatorForSeq2Seq(TOKENIZER),
        train_dataset=Dataset.from_list([masked(TOKENIZER, chat, "prompts") for chat in CHATS]),
        processing_class=TOKENIZER,
    )
    for rows in (COMPLETIONS, None):
        result = tsq.audit(trainer, data=rows)
        errors = {finding["name"]: finding["rows"] for finding in result["findings"] if finding["severity"] == "error"}
        assert errors == {"nothing_trained": len(CHATS)}


def test_a_trainer_without_rows_to_look_at_is_refused(tmp_path: Path) -> None:
    trainer = trained(COMPLETIONS, tmp_path)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(UnsupportedError, match="stream"):
        tsq.audit(trainer)
