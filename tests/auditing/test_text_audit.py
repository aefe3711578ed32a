"""The audit of text by the command: ledger, findings, page and review, of a raw file and of a prepared set."""

import csv
import gzip
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from string import ascii_letters
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from transformers import LlamaConfig, LlamaForCausalLM

from families import FAMILIES, tokenizer_of
from masked import chats, masked
from runs import make_rows, save_checkpoint, write_jsonl
from tables import cells_of
from texts.test_before import FOREIGN_ROWS, ROWS, Repeats
from tsqlora.auditing.texts import command as text_audit
from tsqlora.auditing.texts.command import audit_text, no_judge
from tsqlora.settings import load_config, text_config
from words import llama

Run = Callable[..., tuple[int, str, str]]
Audit = Callable[..., tuple[int, dict[str, Any]]]
TOWNS = ("Paris", "Rome", "Oslo", "Bern", "Lima", "Cairo", "Delhi", "Quito")


def turns(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": r, "content": text} for r, text in zip(roles, contents, strict=False)]}


def right(n: int) -> list[dict[str, Any]]:
    return [
        turns(f"How far is {TOWNS[j % 8]} from town number {j}, by road?", f"It is {j + 3} hours from {TOWNS[j % 8]}.")
        for j in range(n)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a config (no weights), chats with some faults, and templates without a stop."""
    folder = tmp_path_factory.mktemp("text audit")
    tokenizer = tokenizer_of(FAMILIES["qwen 2.5"])
    tokenizer.save_pretrained(folder / "model")
    ends = tokenizer.eos_token_id
    LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=ends).save_pretrained(
        folder / "model"
    )
    rows = right(20)
    rows[3] = turns("How far is Paris?", " ")
    rows[5] = turns("How far is Rome?", "Far away. " * 100)
    rows[7] = {"messages": "no list"}
    write_jsonl(folder / "chats.jsonl", [*rows, rows[0]])
    (folder / "no_stop.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    return folder


@pytest.fixture
def audit(place: Path, tmp_path: Path, tsqlora: Run) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Audit with the model of `place` into a new folder; return the exit code and the result."""

    def run(*words: Any, model: Path | None = None, out: Path | None = None) -> tuple[int, dict[str, Any]]:
        out = out or tmp_path / f"audit {len([*tmp_path.iterdir()])}"
        code, shown, err = tsqlora("audit", *words, "--model", model or place / "model", "--out", out, "--json")
        assert code in (0, 4), err
        return code, json.loads(shown)

    return run


def by_name(result: Mapping[str, Any], key: str = "places") -> dict[str, Any]:
    return {finding["name"]: finding[key] for finding in result["findings"]}


def test_a_raw_file_has_a_line_for_each_row_and_findings_with_places(
    place: Path, tmp_path: Path, audit: Audit, tsqlora: Run
) -> None:
    out, evaluation = tmp_path / "audit", write_jsonl(tmp_path / "eval.jsonl", [right(3)[1]])
    code, result = audit(place / "chats.jsonl", "--eval", evaluation, out=out)
    assert code == 0
    written = json.loads((out / "findings.json").read_text())
    assert by_name(written) == {
        "empty_answer": [3], "answer_cut": [5], "dropped": [7], "duplicate": [20], "eval_leak": [1]
    }  # fmt: skip
    # The reason stands with the finding; a longer limit is no cure for a row that cannot be read.
    assert by_name(written, "cause")["dropped"].startswith("the preparation left these rows out: ")
    cures = by_name(written, "cure")
    assert cures["dropped"] == {}
    assert cures["answer_cut"]["TRL"] == "SFTConfig(max_length=2048)", "512 and the 1,001 tokens that are lost"
    assert {"name", "severity", "rows", "share", "places", "cause", "cure"} == {*written["findings"][0]}
    lines = pq.read_table(out / "ledger.parquet").to_pylist()
    assert {name: [line["row"] for line in lines if name in line["findings"]] for name in by_name(written)} == by_name(
        written
    )
    assert [line["row"] for line in lines] == [*range(21)]
    fates = [lines[j]["fate"] for j in (0, 3, 5, 7, 20)]
    assert fates == ["trained", "dropped", "dropped", "dropped", "duplicate of 0"]
    assert lines[0]["stop_trained"]
    assert lines[0]["trained_tokens"] == lines[0]["answer_tokens"] + 1
    assert sum(result["fates"].values()) == result["rows"] == 21
    assert "eval_leak" in (out / "audit.html").read_text()
    prompts = write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": json.loads(evaluation.read_text())["messages"][0]["content"]}]
    )
    _, result = audit(place / "chats.jsonl", "--eval", prompts, out=tmp_path / "of prompts")
    assert by_name(result)["eval_leak"] == [1]
    assert tsqlora("audit", place / "chats.jsonl", "--model", place / "model", "--out", out)[0] == 2, "it has an audit"


def test_a_chat_that_is_too_long_has_lost_its_oldest_answers(tmp_path: Path, audit: Audit) -> None:
    system, chat = {"role": "system", "content": "Be brief."}, right(1)[0]["messages"]
    older = turns("And to Rome? " * 20, "Far away. " * 12)["messages"]
    rows = [{"messages": [system, *older, *chat]}, {"messages": [system, *chat, chat[0]]}]
    out = tmp_path / "out"
    _, result = audit(write_jsonl(tmp_path / "long.jsonl", rows), "--set", "data.max_length=200", out=out)
    assert by_name(result) == {"answer_cut": [0], "roles": [1]}
    lines = pq.read_table(out / "ledger.parquet").to_pylist()
    assert (lines[0]["fate"], lines[0]["lost_tokens"]) == ("cut", len(older[1]["content"]) + 1)
    assert lines[0]["trained_tokens"] == lines[1]["trained_tokens"] == len(chat[1]["content"]) + 1


def test_a_baseline_shows_what_changed(place: Path, tmp_path: Path, audit: Audit, tsqlora: Run) -> None:
    before = tmp_path / "before"
    audit(place / "chats.jsonl", out=before)
    assert tsqlora("audit", "--drop-findings", "duplicate,dropped", "--out", before)[0] == 0
    _, result = audit(before / "clean.jsonl", "--baseline", before / "findings.json")
    assert result["changes"] == [{"name": name, "before": 1, "now": 0} for name in ("dropped", "duplicate")]
    words = ("--model", place / "model", "--baseline", place / "chats.jsonl", "--out", tmp_path / "none")
    assert tsqlora("audit", place / "chats.jsonl", *words)[0] == 3


def test_tokens_that_the_model_never_trained_are_a_warning(place: Path, tmp_path: Path, audit: Audit) -> None:
    tokenizer, folder = tokenizer_of(FAMILIES["qwen 2.5"]), tmp_path / "untrained"
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, num_attention_heads=2, **sizes)
    model = LlamaForCausalLM(config)
    model.get_input_embeddings().weight.data[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows, template = write_jsonl(tmp_path / "right.jsonl", right(8)), tmp_path / "chatml.jinja"
    assert by_name(audit(rows, model=folder)[1], "severity")["untrained_tokens"] == "warning"
    assert by_name(audit(rows)[1]) == {}
    template.write_text("{% for m in messages %}<|eot_id|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}")
    assert by_name(audit(rows, "--chat-template", template)[1], "severity") == {"untrained_tokens": "warning"}


def test_rows_of_very_different_length_are_much_padding(tmp_path: Path, audit: Audit) -> None:
    rows = [turns(f"Say {j}.", "so and " * (1 if j % 8 else 50)) for j in range(40)]
    out = tmp_path / "out"
    _, result = audit(write_jsonl(tmp_path / "lengths.jsonl", rows), out=out)
    assert "lengths" in by_name(result)
    assert "lengths" not in (out / "suspects.csv").read_text(), "no row can be left out for it"
    lengths = json.loads((out / "findings.json").read_text())["lengths"]
    assert lengths["rows"] == sum(entry["rows"] for entry in lengths["histogram"]) == 40
    assert lengths["packed"] < 40 * (1 - lengths["padding"]) + 1


def test_an_error_ends_a_strict_audit_with_4(place: Path, tmp_path: Path, audit: Audit) -> None:
    roles = [{"role": "human", "content": "Hi."}, {"role": "gpt", "content": "Hello."}]
    bad = write_jsonl(tmp_path / "roles.jsonl", [{"messages": roles}] * 3)
    long = write_jsonl(tmp_path / "too long.jsonl", [turns(f"How far is {town}?", "Far. " * 200) for town in TOWNS])
    unstopped = (place / "chats.jsonl", "--chat-template", place / "no_stop.jinja")
    for name, words in (("stop_not_trained", unstopped), ("dropped", [bad]), ("dropped", [long])):
        code, result = audit(*words, "--no-model", "--strict")
        assert (code, by_name(result, "severity")[name]) == (4, "error")
    assert audit(place / "chats.jsonl", "--no-model", "--strict")[0] == 0


def test_a_row_that_the_template_cannot_hold_says_what_train_says(tmp_path: Path, audit: Audit) -> None:
    template, chat = tmp_path / "plain.jinja", right(1)[0]["messages"]
    template.write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    chat[1] = {**chat[1], "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    rows = write_jsonl(tmp_path / "tools.jsonl", [*right(12), {"messages": chat}])
    _, result = audit(rows, "--chat-template", template, "--no-model")
    assert by_name(result)["content_lost"] == [12]
    cause = by_name(result, "cause")["content_lost"]
    assert "'tool_calls' ([{" in cause
    assert "which the chat template does not read" in cause


def test_the_terminal_shows_trained_rows_first_and_the_cure_of_errors(
    place: Path, tmp_path: Path, tsqlora: Run
) -> None:
    html = turns("How far is Rome?", "It is <b>far</b> away.")
    rows = write_jsonl(tmp_path / "first is empty.jsonl", [turns("How far is Paris?", " "), *right(300), html])
    command = ("audit", rows, "--model", place / "model", "--chat-template", place / "no_stop.jinja", "--no-model")
    code, shown, err = tsqlora(*command, "--out", tmp_path / "shown")
    assert code == 0, err
    for one in ("301 trained, 1 dropped", "(row 0)", "(row 301:", "stop_not_trained, with axolotl: train_on_eos: turn"):
        assert one in shown
    assert "(row 301)" not in shown  # the cause names it


def test_a_review_parts_the_rows(place: Path, tmp_path: Path, audit: Audit, tsqlora: Run) -> None:
    out, source, review = tmp_path / "reviewed", place / "chats.jsonl", tmp_path / "reviewed.csv"
    audit(source, out=out)
    lines = cells_of(source)

    def applied(text: str) -> int:
        review.write_text(text)
        return tsqlora("audit", "--apply", review, "--out", out)[0]

    assert applied("row,finding,reviewed\n4,duplicate,drop\n9,duplicate,keep\n10,,\n") == 0
    assert cells_of(out / "quarantine.jsonl") == lines[4:5]
    assert cells_of(out / "clean.jsonl") == lines[:4] + lines[5:]
    code, shown, _ = tsqlora("audit", "--drop-findings", "empty_answer, duplicate", "--out", out, "--json")
    assert (code, json.loads(shown)["dropped"], json.loads(shown)["dropped_before"]) == (0, 3, 1)
    assert cells_of(out / "quarantine.jsonl") == (lines[3], lines[4], lines[20])  # a drop stays, until it is kept
    assert applied("row,finding,reviewed\n4,duplicate,keep\n3,empty_answer,\n") == 0
    assert cells_of(out / "quarantine.jsonl") == (lines[3], lines[20])
    for bad in ("row,finding\n4,duplicate\n", "finding,reviewed\nduplicate,keep\n", "row,reviewed\n99,drop\n"):
        assert applied(bad) == 3


def test_texts_in_parts_that_changed_since_are_refused(tmp_path: Path, audit: Audit, tsqlora: Run) -> None:
    rows, pattern = right(12), tmp_path / "*.jsonl"
    write_jsonl(tmp_path / "a.jsonl", rows[:6])
    write_jsonl(tmp_path / "b.jsonl", [*rows[6:], rows[0]])
    made = [masked(tokenizer_of(FAMILIES["qwen 2.5"]), row["messages"]) for row in rows]
    Dataset.from_list(made).save_to_disk(tmp_path / "prepared")
    audit(pattern, "--no-model", out=tmp_path / "out")  # chats by the first file's columns
    audit("--prepared", tmp_path / "prepared", "--data", pattern, "--no-model", out=tmp_path / "of")
    drop = ("audit", "--drop-findings", "duplicate", "--json", "--out")
    code, shown, _ = tsqlora(*drop, tmp_path / "out")
    assert (code, json.loads(shown)["dropped"]) == (0, 1)
    write_jsonl(tmp_path / "a.jsonl", rows[1:6])
    assert [tsqlora(*drop, tmp_path / name)[0] for name in ("out", "of")] == [3, 3]


def test_a_prepared_set_is_reconciled_with_its_source(place: Path, tmp_path: Path, audit: Audit, tsqlora: Run) -> None:
    tokenizer, rows = tokenizer_of(FAMILIES["qwen 2.5"]), right(12)
    made = [masked(tokenizer, row["messages"]) for row in rows]
    made[2]["labels"] = [-100] * len(made[2]["labels"])
    Dataset.from_list(made[:4] + made[5:]).save_to_disk(tmp_path / "prepared")
    source, out = write_jsonl(tmp_path / "source.jsonl", rows), tmp_path / "of prepared"
    command = ("--prepared", tmp_path / "prepared")
    _, result = audit(*command, "--data", source, out=out)
    assert by_name(result) == {"nothing_trained": [2], "dropped": [4]}
    lines = pq.read_table(out / "ledger.parquet").to_pylist()
    assert {line["match"] for line in lines if line["row"] != 4} == {"exact"}
    write_jsonl(source, rows[:9])
    _, result = audit(*command, "--data", source)
    assert result["unmatched_places"] == [{"row": row, "sequence": 0} for row in (8, 9, 10)]
    words = ("--model", place / "model", "--data", source, "--out", tmp_path / "as text")
    shown = " ".join(tsqlora("audit", *command, *words)[1].split())
    places = "sequence 0 of row 8, 0 of row 9, 0 of row 10"
    assert f"3 of the set's sequences have no source row: {places}" in shown
    assert [*by_name(audit(*command)[1])] == ["nothing_trained"]


def test_source_rows_or_a_tokenizer_of_another_set_are_refused(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    rows, others = right(12), [{"messages": row} for row in chats(12)]
    made = [masked(tokenizer_of(FAMILIES["qwen 2.5"]), row["messages"]) for row in rows]
    foreign = [{**one, "input_ids": [(j + 7) % 256 for j in one["input_ids"]]} for one in made]  # by another tokenizer
    for number, (sequences, data, code) in enumerate(((made, rows, 0), (made, others, 3), (foreign, rows, 3))):
        folder, source = tmp_path / f"prepared {number}", write_jsonl(tmp_path / f"{number}.jsonl", data)
        Dataset.from_list(sequences).save_to_disk(folder)
        words = ("--data", source, "--model", place / "model", "--no-model", "--out", tmp_path / f"out {number}")
        got, _, err = tsqlora("audit", "--prepared", folder, *words)
        assert (got, "--data" in err, "--model" in err) == (code, code == 3, code == 3), err


def test_an_audit_without_source_rows_offers_no_review_and_says_why(
    place: Path, tmp_path: Path, audit: Audit, tsqlora: Run
) -> None:
    tokenizer, out, rows = tokenizer_of(FAMILIES["qwen 2.5"]), tmp_path / "out", chats(20)
    rows += rows[:1]
    Dataset.from_list([masked(tokenizer, row) for row in rows]).save_to_disk(tmp_path / "prepared")
    command = ("--prepared", tmp_path / "prepared", "--no-model")
    code, shown, err = tsqlora("audit", *command, "--model", place / "model", "--out", out)
    assert code == 0, err
    assert "duplicate" in shown
    assert "tsqlora apply" not in shown + (out / "audit.html").read_text(encoding="utf-8")
    names = {"roles": "--data", "eval_leak": "--eval", "cut_answer": "model", "lengths": "all rows"}
    for name, why in {**names, "duplicate": "--data"}.items():
        code, _, err = tsqlora("audit", "--drop-findings", name, "--out", out)
        assert (code, why in err) == (2, True)
    source, of = write_jsonl(tmp_path / "rows.jsonl", [{"messages": row} for row in rows]), tmp_path / "of rows"
    audit(*command, "--data", source, out=of)
    assert "tsqlora apply" in (of / "audit.html").read_text(encoding="utf-8")
    assert tsqlora("audit", "--drop-findings", "duplicate", "--out", of)[0] == 0
    assert cells_of(of / "clean.jsonl") == cells_of(source)[:-1]


@pytest.mark.parametrize("source", [False, True])
def test_a_set_that_trains_prompts_and_no_answer_is_an_error(source: bool, tmp_path: Path, audit: Audit) -> None:
    tokenizer, rows = tokenizer_of(FAMILIES["qwen 2.5"]), chats(12)
    Dataset.from_list([masked(tokenizer, row, "prompts") for row in rows]).save_to_disk(tmp_path / "prepared")
    data = ("--data", write_jsonl(tmp_path / "rows.jsonl", [{"messages": row} for row in rows]))
    code, result = audit("--prepared", tmp_path / "prepared", "--no-model", "--strict", *(data if source else ()))
    (error,) = [finding for finding in result["findings"] if finding["severity"] == "error"]
    assert (code, error["name"], error["rows"]) == (4, "nothing_trained", 12)
    assert "prompt" in error["cause"]


def test_what_does_not_go_together_or_has_no_effect_is_refused_and_writes_nothing(
    place: Path, tmp_path: Path, tsqlora: Run
) -> None:
    rows, model, out = place / "chats.jsonl", ("--model", place / "model"), tmp_path / "out"
    review, labels = tmp_path / "some review.csv", write_jsonl(tmp_path / "labels.jsonl", make_rows(20))
    together, drop = "DATA and {} do not go together", ("--drop-findings", "duplicate")
    cases: list[tuple[int, tuple[Any, ...], tuple[str, ...]]] = [
        (2, (), ()),
        (2, (rows, "--no-model"), ("give --model M",)),
        (3, ("--prepared", place / "model", *model), ()),
        (
            2,
            (rows, *drop),
            (together.format(drop[0]), f"tsqlora audit '{rows}' --out", f"{' '.join(drop)} --out {out}"),
        ),
        (2, (rows, "--apply", review), (together.format("--apply"), f"tsqlora audit --apply '{review}' --out {out}")),
        (2, (rows, "--prepared", place), (together.format("--prepared"), f"--prepared '{place}' --data '{rows}'")),
        (2, ("--apply", rows, "--baseline", "x.jsonl"), ("--baseline",)),
        (2, ("--apply", rows, "--chat-template", "9"), ("--chat-template",)),
        (2, (*drop, "--strict"), ("--strict",)),
        (2, (rows, *model, "--data", "x.jsonl"), ("--data",)),
        (2, ("--prepared", place, *model, "--chat-template", "9"), ("--chat-template",)),
        (2, (labels, *model, "--strict"), ("--strict", "--set task.type=causal-lm")),
    ]
    for expected, words, named in cases:
        code, _, err = tsqlora("audit", *words, "--out", out)
        assert (code, [one for one in named if one not in err]) == (expected, []), words
        assert not out.exists()


def test_answers_that_are_labels_are_audited_as_such_by_naming_their_column(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Is it?", "completion": "yes"}])
    assert text_config(str(rows), "model", []) is not None
    assert text_config(str(rows), "model", ["data.text=prompt", "data.label=completion"]) is None


@pytest.mark.parametrize("kind", ["packed", "shards", "saved"])
def test_chats_are_chats_in_whatever_form_they_come(kind: str, tmp_path: Path, audit: Audit) -> None:
    source, rows = tmp_path / "chats.jsonl.gz", right(9)
    if kind == "packed":
        source.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif kind == "shards":
        (source := tmp_path / "shards").mkdir()
        for k in range(3):
            Dataset.from_list(rows[3 * k : 3 * k + 3]).to_parquet(source / f"train-{k:05}-of-00003.parquet")
    else:
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(source := tmp_path / "saved")
    _, result = audit(source, "--no-model")
    assert (result["rows"], result["fates"]) == (9, {"trained": 9})
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert load_config(None, [f"data.train={source}", f"model.path={tmp_path}"]).task.type == "causal-lm"


def test_texts_and_evaluation_rows_are_read_by_the_settings_of_their_text(
    tmp_path: Path, audit: Audit, tsqlora: Run
) -> None:
    lines = [f'"Wie weit ist es nach {town} bei Köln?"^"Es sind {j} Stunden."' for j, town in enumerate(TOWNS)]
    files, out = (tmp_path / "train.csv", tmp_path / "eval.csv"), tmp_path / "out"
    for file, own in zip(files, (lines, lines[2:3]), strict=True):
        file.write_bytes("\n".join(["Frage^Antwort", *own, ""]).encode("cp850"))
    named = ("delimiter=^", "encoding=cp850", "prompt=Frage", "target=Antwort")
    words = [word for one in named for word in ("--set", f"data.{one}")]
    options = ("--no-model", "--set", "task.type=causal-lm", *words)
    assert by_name(audit(files[0], *options, "--eval", files[1], out=out)[1])["eval_leak"] == [2]
    assert tsqlora("audit", "--drop-findings", "duplicate", "--out", out)[0] == 0
    assert "bei Köln" in (out / "clean.jsonl").read_text(encoding="utf-8")


def test_labelled_rows_are_audited_for_their_labels(tmp_path: Path, audit: Audit) -> None:
    rows, out = write_jsonl(tmp_path / "labelled.jsonl", make_rows(40)), tmp_path / "labels"
    audit(rows, model=save_checkpoint(tmp_path / "encoder"), out=out)
    assert (out / "audit.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "hints"),
    [
        ("cp1250.csv", "text,label\ntěch kůň,a\nžluťoučký,b\n".encode("cp1250"), ["data.encoding=cp1250"]),
        ("quotes.tsv", b'text\tlabel\n"5 inch\ta\n6 inch\tb\n', []),
        ("quotes.tsv", b'text\tlabel\n"5 inch\ta\n6 inch\tb\n', ["data.quoting=literal"]),
        ("hats.csv", b"a,b^text^label\n1^x,y^z\n", ["data.delimiter=^"]),
    ],
)
def test_whether_a_file_has_labels_is_read_by_the_settings_of_its_text(
    name: str, content: bytes, hints: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert text_config(str(tmp_path / name), None, hints) is None


def test_a_model_without_weights_here_reads_no_answers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert no_judge(str(tmp_path)) == f"the weights of {tmp_path} are not on this machine"
    assert "not on this machine" in no_judge("someone/model")


def test_a_model_that_memory_cannot_hold_reads_no_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert no_judge(str(tmp_path)) == ""
    monkeypatch.setattr(text_audit, "MARGIN", shutil.disk_usage("/").total)
    assert "give --model a smaller one with the same tokenizer" in no_judge(str(tmp_path))


def test_an_audit_names_answers_of_other_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, config = tokenizer_of(FAMILIES["qwen 2.5"]), llama().config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 200
    model = Repeats(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(text_audit.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    rng = np.random.default_rng(0)
    words = [rng.permutation([*ascii_letters])[:8] for _ in range(ROWS)]
    with (tmp_path / "rows.jsonl").open("w") as file:
        for j, own in enumerate(words):
            answer = rng.permutation(words[j + 1] if j in FOREIGN_ROWS else own)
            contents = zip(("user", "assistant"), ("".join(own), "".join(answer)), strict=True)
            file.write(json.dumps({"messages": [{"role": a, "content": b} for a, b in contents]}) + "\n")
    told, out = list[str](), tmp_path / "audit"
    audit_text(str(tmp_path / "rows.jsonl"), model=str(tmp_path / "model"), out=out, tell=told.append)
    assert told == [f"reads {ROWS} answers of {ROWS} rows"]
    result = json.loads((out / "findings.json").read_text())
    (found,) = (one for one in result["findings"] if one["name"] == "foreign_answer")
    assert set(found["places"]) <= set(FOREIGN_ROWS)
    assert found["rows"] >= 0.7 * len(FOREIGN_ROWS)
    lines = pq.read_table(out / "ledger.parquet").to_pylist()
    assert [line["row"] for line in lines if "foreign_answer" in line["findings"]] == found["places"]
    assert any(shift[2] == 1 for shift in result["answers"]["shifts"])
    suspects = csv.DictReader((out / "suspects.csv").read_text().splitlines())
    assert min(float(one["probability"]) for one in suspects if one["finding"] == "foreign_answer") > 0.5
    page = (out / "audit.html").read_text()
    assert "Answers that do not fit" in page
    shown = json.loads(page.partition('id="page-data">')[2].partition("</script>")[0])["rows"]
    assert "u" in shown[str(found["places"][0])]["parts"][0]["kinds"]
    assert "fits the prompt of row" in shown[str(found["places"][0])]["detail"]
