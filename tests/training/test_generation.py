"""Whole runs of models that generate text: train, evaluate, predict, score, explain, a dry run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartForConditionalGeneration, GPT2LMHeadModel, LlamaForCausalLM

from byte_tokenizers import byte_tokenizer
from models import generating, tiny_bart, tiny_gpt2, tiny_llama_classifier
from runs import save_checkpoint, write_config, write_jsonl
from seen import Seen
from tsqlora.auditing.scores import Scores
from tsqlora.errors import DataError, SettingsError
from tsqlora.libs.bitsandbytes import linear_bits
from tsqlora.model.eval_mode import eval_mode
from tsqlora.settings import load_config
from tsqlora.tasks import get_task
from tsqlora.tasks.text_metrics import TEXT_METRICS
from tsqlora.training import command as pipeline
from tsqlora.training.export import export, model_card
from tsqlora.training.job import load, open_run
from tsqlora.training.predict import evaluate_run, predict_run, predictor_of
from tsqlora.training.quality_callback import SCORES_FILE
from tsqlora.training.report.write import write_report
from tsqlora.training.run import arguments

LAYER = "model.layers.0.mlp.down_proj"
WORDS = ("pink", "blue", "grey", "teal")
TRAINING = {"epochs": 4, "batch_size": 8, "learning_rate": 0.01, "bf16": False, "logging_strategy": "no"}
PLAIN: dict[str, Any] = {
    "quality": {"enabled": False, "fraction": 1.0},
    "ranks": {"policy": "fixed", "mean": 2.0},
    "training": {**TRAINING, "epochs": 1},
}


def rows(n: int) -> list[dict[str, Any]]:
    """Documents whose summary is their first word."""
    return [{"document": f"{WORDS[j % 4]} {WORDS[j // 4 % 4]}", "summary": WORDS[j % 4]} for j in range(n)]


def trusted(folder: Path) -> str:
    """The setting that names trusted rows: of one word alone, with prompts that no row has."""
    values = [{"document": " ".join(["pink"] * n), "summary": "pink"} for n in range(3, 15)]
    return f"data.trusted={write_jsonl(folder / 'trusted.jsonl', values)}"


def checkpoint(folder: Path, kind: str) -> Path:
    """A tiny model that generates text, and a tokenizer of bytes."""
    tokenizer = byte_tokenizer(opens=kind == "causal-lm", closes=kind == "seq2seq")
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    still = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, **special, **still}
    if kind == "causal-lm":
        model: Any = generating(LlamaForCausalLM, tiny_llama_classifier(), **size)
    else:
        model = generating(BartForConditionalGeneration, tiny_bart(), decoder_start_token_id=2, **size)
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(folder: Path, kind: str, train: list[dict[str, Any]], **sections: Any) -> Path:
    """Settings with a checkpoint and these rows beside them."""
    task = {"type": kind} | sections.pop("task", {})
    model, data = checkpoint(folder / "model", kind), write_jsonl(folder / "train.jsonl", train)
    return write_config(folder / "tsq.yaml", model, data, task=task, **sections)


@pytest.fixture(scope="module", params=["causal-lm", "seq2seq"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, beside its config and data."""
    folder = tmp_path_factory.mktemp(request.param)
    write_jsonl(folder / "test.jsonl", rows(4))
    config = config_of(folder, request.param, rows(40), task={"max_new_tokens": 4}, training=TRAINING)
    also = ["data.max_length=32", f"data.test={folder / 'test.jsonl'}", trusted(folder)]
    pipeline.train(load_config(config, also), folder / "run")
    return folder / "run"


def test_a_run_learns_scores_moves_ranks_and_measures_texts(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["data"]["format"] == "document"
    assert record["quality"]["used"]
    assert record["rank_events"]
    assert record["quality"]["scores"]["weights"] == {"density_ratio": 4.0}
    assert len(record["quality"]["looks"]) == 1  # training hardly changes which texts are alike
    assert "why_not" in record["quality"]["question"]  # trusted texts are mixed in
    scores = Scores.load(run / SCORES_FILE)
    pink = scores.row_ids % 4 == 0
    assert scores.quality[pink].mean() > scores.quality[~pink].mean() + 1
    measured = set(get_task(record["task"]).measured)
    assert set(record["metrics"]["validation"]) == measured
    assert set(record["metrics"]["test"]) == measured | set(TEXT_METRICS)


def test_evaluating_writes_again_what_the_run_wrote(run: Path) -> None:
    stored = evaluate_run(run)
    again = evaluate_run(run, run.parent / "test.jsonl")
    assert again == pytest.approx(stored, rel=1e-4)
    assert evaluate_run(run, overrides=["task.max_new_tokens=1"])["chrf"] <= stored["chrf"]


def test_predictions_are_texts_whatever_the_batch(run: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "new.jsonl", [{"document": row["document"]} for row in rows(6)])
    predict_run(run, data, tmp_path / "out.jsonl")
    predict_run(run, data, tmp_path / "one.jsonl", overrides=["training.per_device_eval_batch_size=1"])
    together, alone = ((tmp_path / name).read_text() for name in ("out.jsonl", "one.jsonl"))
    assert together == alone
    assert all(isinstance(json.loads(line)["prediction"], str) for line in together.splitlines())


def test_rows_whose_target_does_not_fit_are_evaluated_without_as_training_took_them(run: Path, tmp_path: Path) -> None:
    mixed = [*rows(4), {"document": "pink", "summary": "pink " * 40}]
    with pytest.warns(UserWarning, match=r"^1 of 5 rows are left out: the answer .*mixed\.jsonl"):
        result = evaluate_run(run, write_jsonl(tmp_path / "mixed.jsonl", mixed))
    assert result == evaluate_run(run, write_jsonl(tmp_path / "four.jsonl", rows(4)))


def test_a_second_part_of_prompts_may_be_missing_altogether(tmp_path: Path) -> None:
    instructions = [{"instruction": row["document"], "input": "", "output": row["summary"]} for row in rows(20)]
    config = config_of(tmp_path, "seq2seq", instructions, task={"max_new_tokens": 4}, **PLAIN)
    pipeline.train(load_config(config, ["data.max_length=64"]), tmp_path / "run")
    without = write_jsonl(
        tmp_path / "new.jsonl", [{k: row[k] for k in ("instruction", "output")} for row in instructions]
    )
    assert predict_run(tmp_path / "run", without, tmp_path / "out.jsonl") == 20
    asked_again = write_jsonl(tmp_path / "old.jsonl", instructions)
    assert evaluate_run(tmp_path / "run", without) == evaluate_run(tmp_path / "run", asked_again)


def test_what_leaves_no_room_for_a_prompt_is_refused_before_training(tmp_path: Path) -> None:
    """A token that opens the text, and two of it."""
    config = config_of(tmp_path, "causal-lm", rows(20))
    also = [f"data.test={write_jsonl(tmp_path / 'test.jsonl', rows(3))}", "task.max_new_tokens="]
    pipeline.dry_run(load_config(config, [also[0], also[1] + "125"]))
    with pytest.raises(SettingsError, match="a prompt of 3 tokens and 126 new ones are more than the model's 128 pos"):
        pipeline.dry_run(load_config(config, [also[0], also[1] + "126"]))


def test_plain_text_of_which_nothing_is_written_needs_no_room_and_no_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [{"text": row["document"]} for row in rows(20)]
    config = config_of(tmp_path, "causal-lm", plain, task={"max_new_tokens": 500})
    monkeypatch.setattr("tsqlora.training.run.require_text_metrics", lambda: pytest.fail("it asked for rouge-score"))
    pipeline.dry_run(load_config(config, [f"data.test={write_jsonl(tmp_path / 'test.jsonl', plain[:3])}"]))


def test_a_causal_models_prompts_leave_room_for_what_it_writes(tmp_path: Path) -> None:
    long = {"document": "pink " * 30, "summary": "pink"}
    config = config_of(tmp_path, "causal-lm", rows(20), task={"max_new_tokens": 4}, **PLAIN)
    also = ["data.max_length=128", f"data.test={write_jsonl(tmp_path / 'test.jsonl', [*rows(3), long])}"]
    with pytest.warns(UserWarning, match=r"^1 of 4 prompts of .*test\.jsonl were cut to 124 tokens$"):
        record = pipeline.train(load_config(config, also), tmp_path / "run")
    assert record.status == "finished"


@pytest.mark.parametrize(("kind", "beams"), [("causal-lm", 1), ("seq2seq", 2)])
def test_what_the_bases_generation_config_wants_changes_no_text(kind: str, beams: int, tmp_path: Path) -> None:
    config = config_of(tmp_path, kind, rows(20), task={"max_new_tokens": 12, "beams": beams})
    job = load(load_config(config))
    model: Any = job.pretrained.model
    predictor = predictor_of(job, arguments(job.config, tmp_path))
    prompts = predictor.prompts(job.data["validation"])
    plain = predictor.texts(prompts, phase="")
    wants = {"min_length": 12, "min_new_tokens": 12, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    model.generation_config.update(**wants, length_penalty=3.0, early_stopping=True)
    assert predictor.texts(prompts, phase="") == plain


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, LlamaForCausalLM])
def test_a_model_that_checkpoints_activations_writes_the_same(kind: Any) -> None:
    like = tiny_gpt2() if kind is GPT2LMHeadModel else tiny_llama_classifier()
    model = generating(kind, like, torch.float32, use_cache=True)
    tokenizer = byte_tokenizer(opens=True, closes=False)
    prompts = [{"input_ids": [5, 9, 12, 7], "attention_mask": [1] * 4}]
    collate = get_task("causal-lm").reading.collate(model, tokenizer, max_length=32, prompts=True)

    def written() -> list[list[int]]:
        batch = collate(prompts)
        with torch.inference_mode(), eval_mode(model):
            return model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()

    before = written()
    model.train()
    model.activation_checkpointing_enable()
    assert written() == before
    assert model.training


def test_the_cards_own_code_loads_the_adapter(run: Path) -> None:
    code = (run / "adapter" / "README.md").read_text().split("```python\n")[1].split("\n```")[0]
    code = code.replace('"model"', repr(str(run.parent / "model"))).replace("THIS-DIRECTORY", str(run / "adapter"))
    values: dict[str, Any] = {}
    exec(code, values)
    trained, loaded = open_run(run).model.state_dict(), values["model"].state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())
    auto = next(name for name in values if name.startswith("Auto"))
    assert f"model = {auto}.from_pretrained(" in model_card(run, format="merged")


def test_the_report_shows_prompts_with_their_targets_and_no_labels(run: Path) -> None:
    seen = Seen(write_report(run).read_text())
    heads = [text for text in seen.texts["button"] if text in ("label", "model says", "target tokens", "why here")]
    assert heads == ["why here", "target tokens"]
    assert any("→ " in text and text.split()[0] in WORDS for text in seen.texts["th"])


def test_a_dry_run_shows_samples_and_refuses_too_few_positions_and_a_model_of_the_other_kind(run: Path) -> None:
    config = load_config(run / "config.yaml")
    plan = pipeline.dry_run(config)
    assert plan["format"] == "document"
    assert "with a loss" in plan["samples"]
    with pytest.raises(SettingsError, match="128 new ones are more than the model's 128 positions"):
        pipeline.dry_run(load_config(run / "config.yaml", ["task.max_new_tokens=128"]))
    other = {"causal-lm": "seq2seq", "seq2seq": "causal-lm"}[config.task.type]
    with pytest.raises(SettingsError, match=rf"task\.type is {other}; set it to {config.task.type}"):
        pipeline.dry_run(load_config(run / "config.yaml", [f"task.type={other}"]))


def chats_of(answer: str) -> list[dict[str, Any]]:
    """A word and a number, and an answer of them."""
    asked = [(WORDS[j % 4], j) for j in range(12)]
    turns = [[("user", f"{word} {j}"), ("assistant", answer.format(word, j))] for word, j in asked]
    return [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]


def set_template(folder: Path, content: str) -> None:
    """Give the model in a folder another chat template."""
    turns = "{% for m in messages %}{{ m.role }} " + content + "{% endfor %}"
    made = byte_tokenizer(chat_template=turns + "{% if add_generation_prompt %}assistant {% endif %}")
    made.save_pretrained(folder / "model")


def test_the_worst_findings_are_said_before_training_and_errors_in_all_rows_refused(tmp_path: Path) -> None:
    chats = chats_of("{0}")
    chats[3]["messages"][1]["content"] = f"{chats[3]['messages'][0]['content']} {WORDS[0]}" * 4
    config = config_of(tmp_path, "causal-lm", chats)

    set_template(tmp_path, "{{ m.content }}{% if loop.index0 == 0 or 'pink' not in m.content %}</s>{% endif %}")
    with pytest.warns(UserWarning, match="^stop_not_trained: no stop is trained") as warned:
        plan = pipeline.dry_run(load_config(config))
    assert any(str(one.message) in plan["notes"] for one in warned)
    set_template(tmp_path, "{{ m.content }}; ")
    with pytest.raises(DataError, match=r"all rows of .*train\.jsonl.*`tsqlora audit .*train\.jsonl --model .*model`"):
        pipeline.dry_run(load_config(config))


def test_what_all_rows_lose_stops_a_training_unless_it_is_meant(tmp_path: Path) -> None:
    """DeepSeek-R1's template cuts the reasoning off every answer."""
    config = config_of(tmp_path, "causal-lm", chats_of("<think>of {1}</think>{0}"))
    set_template(tmp_path, "{{ m.content.split('</think>')[-1] }}</s>")
    audit = r"`tsqlora audit .*train\.jsonl --model .*model`"
    with pytest.raises(DataError, match=rf"content_lost in all rows of .*train\.jsonl.*row \d+: 'of \d+'.*{audit}"):
        pipeline.dry_run(load_config(config))
    with pytest.warns(UserWarning, match="^error content_lost"):
        assert pipeline.dry_run(load_config(config, ["data.max_bad_rows=1"]))


def test_a_token_beyond_the_embedding_is_named_before_training(tmp_path: Path) -> None:
    config = config_of(tmp_path, "causal-lm", rows(8))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([WORDS[0]])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=r"train\.jsonl: row 0 has token \d+ .*, and the model has \d+ embeddings"):
        pipeline.dry_run(load_config(config))


def test_a_classifier_is_no_generator(tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "tsq.yaml",
        save_checkpoint(tmp_path / "model"),
        write_jsonl(tmp_path / "train.jsonl", rows(8)),
        task={"type": "causal-lm"},
    )
    with pytest.raises(SettingsError, match=r"lacks .* weights of a model that generates text"):
        pipeline.dry_run(load_config(config))


@pytest.mark.parametrize("kind", ["causal-lm", "seq2seq"])
def test_accumulated_steps_are_those_of_one_large_batch(kind: str, tmp_path: Path) -> None:
    """A mean over tokens, whatever the model makes of the number of tokens that the Trainer tells it."""
    # Adam would hide a gradient that is twice too large.
    plain = {**TRAINING, "epochs": 1, "optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0}
    result = []
    for name, batch, steps in (("whole", 8, 1), ("parts", 4, 2)):
        training = {**plain, "batch_size": batch, "gradient_accumulation_steps": steps}
        # One row for validation, eight for the one step.
        config = config_of(tmp_path / name, kind, rows(9), **PLAIN | {"training": training})
        record = pipeline.train(load_config(config, ["data.max_length=32"]), tmp_path / name / "run")
        result.append(record.metrics["validation"]["loss"])
    assert result[0] == pytest.approx(result[1], rel=1e-3)


# torch warns of its own script_method, which bitsandbytes imports.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_packed_base_is_trained_on_and_its_adapter_merged_into_the_whole_one(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = config_of(tmp_path, "causal-lm", rows(40), training=TRAINING)
    run = tmp_path / "run"
    also = [
        "data.max_length=32",
        "model.quantization=4bit",
        f"data.test={write_jsonl(tmp_path / 'test.jsonl', rows(4))}",
        trusted(tmp_path),
    ]
    record = pipeline.train(load_config(config, also), run)
    assert record.quality["used"]
    assert record.rank_events
    assert linear_bits(open_run(run).model.get_submodule(f"base_model.model.{LAYER}.base_layer")) == 4
    assert evaluate_run(run, tmp_path / "test.jsonl") == pytest.approx(record.metrics["test"], rel=1e-4)
    report = export(run, tmp_path / "merged", format="merged")
    assert report["logits_difference"] <= 1e-4 * report["largest_logit"]
    (note,) = report["notes"]
    assert "4bit" in note
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert not linear_bits(merged.get_submodule(LAYER))


def test_many_rows_left_out_are_a_warning_before_training(tmp_path: Path) -> None:
    long = [{"document": "pink", "summary": "pink " * 20}] * 4
    config = config_of(tmp_path, "causal-lm", [*rows(20), *long])
    validation = write_jsonl(tmp_path / "few.jsonl", rows(20))
    with pytest.warns(
        UserWarning, match=r"^4 of 24 rows are left out: the answer .* is longer than max_length"
    ) as warned:
        plan = pipeline.dry_run(load_config(config, ["data.max_length=32", f"data.validation={validation}"]))
    (text,) = (str(one.message) for one in warned if "left out" in str(one.message))
    assert text in plan["notes"]
    assert "train.jsonl:21" in text
    assert plan["rows"]["train"] == 20
