"""The audit of text by the command: ledger, findings, page and review, of a raw file and of a prepared set."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from transformers import LlamaConfig, LlamaForCausalLM

from families import FAMILIES, tokenizer_of
from masked import chats, masked
from runs import make_rows, write_jsonl
from tables import cells_of
from tsqlora.run.config import load_config, text_config

Run = Callable[..., tuple[int, str, str]]
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
    """A folder with a tokenizer and a config (no weights), and chats with some faults."""
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
    rows.append(rows[0])
    write_jsonl(folder / "chats.jsonl", rows)
    return folder


def test_a_raw_file_has_a_line_for_each_row_and_findings_with_places(place: Path, tsqlora: Run) -> None:
    out = place / "audit"
    evaluation = write_jsonl(place / "eval.jsonl", [right(3)[1]])
    command = ("audit", place / "chats.jsonl", "--model", place / "model", "--eval", evaluation, "--out", out)
    code, shown, err = tsqlora(*command, "--json")
    assert code == 0, err
    result = json.loads(shown)
    findings = {finding["name"]: finding for finding in json.loads((out / "findings.json").read_text())["findings"]}
    places = {name: finding["places"] for name, finding in findings.items()}
    assert places == {"empty_answer": [3], "answer_cut": [5], "dropped": [7], "duplicate": [20], "eval_leak": [1]}
    # The reason stands with the finding; a longer limit is no cure for a row that cannot be read.
    assert findings["dropped"]["cause"].startswith("the preparation left these rows out: ")
    assert findings["dropped"]["cure"] == {}
    assert findings["answer_cut"]["cure"]["TRL"] == "SFTConfig(max_length=2048)", (
        "512 and the 1,001 tokens that are lost"
    )
    assert {"name", "severity", "rows", "share", "places", "cause", "cure"} == {*findings["duplicate"]}
    lines = pq.read_table(out / "ledger.parquet").to_pylist()
    assert [line["row"] for line in lines] == [*range(21)]
    assert [lines[j]["fate"] for j in (0, 3, 5, 7, 20)] == [
        "trained",
        "dropped",
        "dropped",
        "dropped",
        "duplicate of 0",
    ]
    assert lines[0]["stop_trained"]
    assert lines[0]["trained_tokens"] == lines[0]["answer_tokens"] + 1
    assert sum(result["fates"].values()) == result["rows"] == 21
    page = (out / "audit.html").read_text()
    assert "eval_leak" in page
    assert tsqlora(*command)[0] == 2  # it holds an audit


def test_a_chat_that_is_too_long_has_lost_its_oldest_answers(place: Path, tsqlora: Run) -> None:
    system, chat = {"role": "system", "content": "Be brief."}, right(1)[0]["messages"]
    older = turns("And to Rome? " * 20, "Far away. " * 12)["messages"]
    rows = [{"messages": [system, *older, *chat]}, {"messages": [system, *chat, chat[0]]}]
    source = write_jsonl(place / "long.jsonl", rows)
    command = (
        "audit",
        source,
        "--model",
        place / "model",
        "--set",
        "data.max_length=200",
        "--out",
        place / "long",
        "--json",
    )
    code, shown, err = tsqlora(*command)
    assert code == 0, err
    findings = {finding["name"]: finding["places"] for finding in json.loads(shown)["findings"]}
    assert findings == {"answer_cut": [0], "roles": [1]}
    lines = pq.read_table(place / "long" / "ledger.parquet").to_pylist()
    assert (lines[0]["fate"], lines[0]["lost_tokens"]) == ("cut", len(older[1]["content"]) + 1)
    assert lines[0]["trained_tokens"] == lines[1]["trained_tokens"] == len(chat[1]["content"]) + 1


def test_a_baseline_shows_what_changed(place: Path, tsqlora: Run) -> None:
    command = ("audit", place / "chats.jsonl", "--model", place / "model", "--json")
    assert tsqlora(*command, "--out", place / "before")[0] == 0
    assert tsqlora("audit", "--drop-findings", "duplicate,dropped", "--out", place / "before")[0] == 0
    after = ("audit", place / "before" / "clean.jsonl", *command[2:], "--baseline", place / "before" / "findings.json")
    code, shown, err = tsqlora(*after, "--out", place / "after")
    assert code == 0, err
    assert json.loads(shown)["changes"] == [
        {"name": "dropped", "before": 1, "now": 0},
        {"name": "duplicate", "before": 1, "now": 0},
    ]
    assert tsqlora(*after[:-1], place / "chats.jsonl", "--out", place / "none")[0] == 3


def test_tokens_that_the_model_never_trained_are_a_warning(place: Path, tsqlora: Run) -> None:
    tokenizer, folder = tokenizer_of(FAMILIES["qwen 2.5"]), place / "untrained"
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes))
    model.get_input_embeddings().weight.data[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = write_jsonl(place / "right.jsonl", right(8))
    for model_of, severity in ((folder, "warning"), (place / "model", None)):
        code, shown, _ = tsqlora("audit", rows, "--model", model_of, "--out", place / f"of {model_of.name}", "--json")
        severities = {finding["name"]: finding["severity"] for finding in json.loads(shown)["findings"]}
        assert (code, severities.get("untrained_tokens")) == (0, severity)
    template = place / "chatml.jinja"
    template.write_text("{% for m in messages %}<|eot_id|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}")
    options = ("--chat-template", template, "--out", place / "fall apart", "--json")
    code, shown, _ = tsqlora("audit", rows, "--model", place / "model", *options)
    severities = {finding["name"]: finding["severity"] for finding in json.loads(shown)["findings"]}
    assert severities == {"untrained_tokens": "warning"}


def test_rows_of_very_different_length_are_much_padding(place: Path, tsqlora: Run) -> None:
    rows = [turns(f"Say {j}.", "so and " * (1 if j % 8 else 50)) for j in range(40)]
    source = write_jsonl(place / "lengths.jsonl", rows)
    code, shown, _ = tsqlora("audit", source, "--model", place / "model", "--out", place / "lengths", "--json")
    result = json.loads(shown)
    assert code == 0
    assert "lengths" in [finding["name"] for finding in result["findings"]]
    assert "lengths" not in (place / "lengths" / "suspects.csv").read_text(), "no row can be left out for it"
    lengths = json.loads((place / "lengths" / "findings.json").read_text())["lengths"]
    assert lengths["rows"] == sum(entry["rows"] for entry in lengths["histogram"]) == 40
    assert lengths["packed"] < 40 * (1 - lengths["padding"]) + 1


def test_an_error_ends_a_strict_audit_with_4(place: Path, tsqlora: Run) -> None:
    command = ("audit", place / "chats.jsonl", "--model", place / "model", "--strict", "--json")
    template = place / "no_stop.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    code, shown, _ = tsqlora(*command, "--chat-template", template, "--out", place / "strict")
    assert code == 4
    severities = {finding["name"]: finding["severity"] for finding in json.loads(shown)["findings"]}
    assert severities["stop_not_trained"] == "error"
    assert tsqlora(*command, "--out", place / "not strict")[0] == 0


def test_a_file_of_which_no_row_is_trained_is_an_error(place: Path, tsqlora: Run) -> None:
    command = ("--model", place / "model", "--no-model", "--strict", "--json", "--out")
    roles = [{"role": "human", "content": "Hi."}, {"role": "gpt", "content": "Hello."}]
    bad = write_jsonl(place / "roles.jsonl", [{"messages": roles}] * 3)
    long = write_jsonl(place / "too long.jsonl", [turns(f"How far is {town}?", "Far. " * 200) for town in TOWNS])
    for rows in (bad, long):
        code, shown, _ = tsqlora("audit", rows, *command, place / f"none of {rows.stem}")
        severities = {finding["name"]: finding["severity"] for finding in json.loads(shown)["findings"]}
        assert (code, severities["dropped"]) == (4, "error")


def test_a_row_that_the_template_cannot_hold_says_what_train_says(place: Path, tsqlora: Run) -> None:
    template, chat = place / "plain.jinja", right(1)[0]["messages"]
    template.write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    chat[1] = {**chat[1], "tool_calls": [call]}
    rows = write_jsonl(place / "tools.jsonl", [*right(12), {"messages": chat}])
    command = ("audit", rows, "--model", place / "model", "--chat-template", template, "--no-model", "--out")
    code, shown, err = tsqlora(*command, place / "tools", "--json")
    assert code == 0, err
    error = next(one for one in json.loads(shown)["findings"] if one["name"] == "content_lost")
    assert error["places"] == [12]
    assert "'tool_calls' ([{" in error["cause"]
    assert "which the chat template does not read" in error["cause"]


def test_the_terminal_shows_trained_rows_first_and_the_cure_of_errors(place: Path, tsqlora: Run) -> None:
    template = place / "without stop.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    rows = write_jsonl(place / "first is empty.jsonl", [turns("How far is Paris?", " "), *right(300)])
    command = ("audit", rows, "--model", place / "model", "--chat-template", template, "--no-model", "--out")
    code, shown, err = tsqlora(*command, place / "shown")
    assert code == 0, err
    assert "300 trained, 1 dropped" in shown
    assert "(row 0)" in shown
    assert "stop_not_trained, with axolotl: train_on_eos: turn" in shown


def test_a_review_parts_the_rows(place: Path, tsqlora: Run) -> None:
    out, source = place / "reviewed", place / "chats.jsonl"
    assert tsqlora("audit", source, "--model", place / "model", "--out", out)[0] == 0
    (place / "reviewed.csv").write_text("row,finding,reviewed\n4,duplicate,drop\n9,duplicate,keep\n10,,\n")
    assert tsqlora("audit", "--apply", place / "reviewed.csv", "--out", out)[0] == 0
    lines = cells_of(source)
    assert cells_of(out / "quarantine.jsonl") == lines[4:5]
    assert cells_of(out / "clean.jsonl") == lines[:4] + lines[5:]
    code, shown, _ = tsqlora("audit", "--drop-findings", "empty_answer, duplicate", "--out", out, "--json")
    assert (code, json.loads(shown)["dropped"], json.loads(shown)["dropped_before"]) == (0, 3, 1)
    assert cells_of(out / "quarantine.jsonl") == (lines[3], lines[4], lines[20])  # a drop stays, until it is kept
    (place / "reviewed.csv").write_text("row,finding,reviewed\n4,duplicate,keep\n3,empty_answer,\n")
    assert tsqlora("audit", "--apply", place / "reviewed.csv", "--out", out)[0] == 0
    assert cells_of(out / "quarantine.jsonl") == (lines[3], lines[20])
    for without in ("row,finding\n4,duplicate\n", "finding,reviewed\nduplicate,keep\n"):
        (place / "reviewed.csv").write_text(without)
        assert tsqlora("audit", "--apply", place / "reviewed.csv", "--out", out)[0] == 3
    (place / "reviewed.csv").write_text("row,finding,reviewed\n99,duplicate,drop\n")
    assert tsqlora("audit", "--apply", place / "reviewed.csv", "--out", out)[0] == 3


def test_texts_in_parts_that_changed_since_are_refused(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    rows, out = right(12), tmp_path / "out"
    write_jsonl(tmp_path / "a.jsonl", rows[:6])
    write_jsonl(tmp_path / "b.jsonl", [*rows[6:], rows[0]])
    Dataset.from_list([{"input_ids": [1], "labels": [1]}] * 2).save_to_disk(tmp_path / "prepared")
    command, pattern = ("audit", "--model", place / "model", "--no-model"), tmp_path / "*.jsonl"
    assert tsqlora(*command, pattern, "--out", out)[0] == 0  # chats by the first file's columns
    assert tsqlora(*command, "--prepared", tmp_path / "prepared", "--data", pattern, "--out", tmp_path / "of")[0] == 0
    drop = ("audit", "--drop-findings", "duplicate", "--json", "--out")
    code, shown, _ = tsqlora(*drop, out)
    assert (code, json.loads(shown)["dropped"]) == (0, 1)
    write_jsonl(tmp_path / "a.jsonl", rows[1:6])
    assert [tsqlora(*drop, folder)[0] for folder in (out, tmp_path / "of")] == [3, 3]


def test_a_prepared_set_is_reconciled_with_its_source(place: Path, tsqlora: Run) -> None:
    tokenizer, rows = tokenizer_of(FAMILIES["qwen 2.5"]), right(12)
    made = []
    for j, row in enumerate(rows):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tokenizer(text)["input_ids"]
        answer = len(tokenizer(text.partition("assistant\n")[0] + "assistant\n")["input_ids"])
        labels = [-100] * answer + ids[answer:]
        if j == 2:
            labels = [-100] * len(ids)
        made.append({"input_ids": ids, "labels": labels})
    Dataset.from_list(made[:4] + made[5:]).save_to_disk(place / "prepared")
    source, out = write_jsonl(place / "source.jsonl", rows), place / "of prepared"
    command = ("audit", "--prepared", place / "prepared", "--model", place / "model", "--json")
    code, shown, err = tsqlora(*command, "--data", source, "--out", out)
    assert code == 0, err
    places = {finding["name"]: finding["places"] for finding in json.loads(shown)["findings"]}
    assert places == {"nothing_trained": [2], "dropped": [4]}
    lines = pq.read_table(out / "ledger.parquet").to_pylist()
    assert {line["match"] for line in lines if line["row"] != 4} == {"exact"}
    write_jsonl(source, rows[:9])
    _, shown, _ = tsqlora(*command, "--data", source, "--out", place / "of fewer rows")
    assert json.loads(shown)["unmatched_places"] == [{"row": row, "sequence": 0} for row in (8, 9, 10)]
    _, shown, _ = tsqlora(*command[:-1], "--data", source, "--out", place / "as text")
    assert "3 of the set's sequences have no source row: sequence 0 of row 8, 0 of row 9, 0 of row 10" in " ".join(
        shown.split()
    )
    code, shown, _ = tsqlora(*command, "--out", place / "without source")
    assert (code, [f["name"] for f in json.loads(shown)["findings"]]) == (0, ["nothing_trained"])


def test_an_audit_without_source_rows_offers_no_review_and_says_why(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    tokenizer, out = tokenizer_of(FAMILIES["qwen 2.5"]), tmp_path / "out"
    rows = chats(20)
    Dataset.from_list([masked(tokenizer, row) for row in [*rows, rows[0]]]).save_to_disk(tmp_path / "prepared")
    command = ("audit", "--prepared", tmp_path / "prepared", "--model", place / "model", "--no-model", "--out")
    code, shown, err = tsqlora(*command, out)
    assert code == 0, err
    assert "duplicate" in shown
    assert "--apply" not in shown + (out / "audit.html").read_text(encoding="utf-8")
    for name, why in (("roles", "--data"), ("eval_leak", "--eval"), ("cut_answer", "model"), ("lengths", "all rows")):
        code, _, err = tsqlora("audit", "--drop-findings", name, "--out", out)
        assert (code, name in err, why in err) == (2, True, True)
    code, _, err = tsqlora("audit", "--drop-findings", "duplicate", "--out", out)
    assert (code, "--data" in err) == (2, True)
    source = write_jsonl(tmp_path / "rows.jsonl", [{"messages": row} for row in [*rows, rows[0]]])
    assert tsqlora(*command, tmp_path / "of rows", "--data", source)[0] == 0
    assert "--apply" in (tmp_path / "of rows" / "audit.html").read_text(encoding="utf-8")
    assert tsqlora("audit", "--drop-findings", "duplicate", "--out", tmp_path / "of rows")[0] == 0
    assert cells_of(tmp_path / "of rows" / "clean.jsonl") == cells_of(source)[:-1]


@pytest.mark.parametrize("source", [False, True])
def test_a_set_that_trains_prompts_and_no_answer_is_an_error(
    source: bool, place: Path, tmp_path: Path, tsqlora: Run
) -> None:
    tokenizer, rows = tokenizer_of(FAMILIES["qwen 2.5"]), chats(12)
    Dataset.from_list([masked(tokenizer, row, "prompts") for row in rows]).save_to_disk(tmp_path / "prepared")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": row} for row in rows])
    command = ("audit", "--prepared", tmp_path / "prepared", "--model", place / "model", "--no-model", "--strict")
    code, shown, err = tsqlora(*command, "--json", "--out", tmp_path / "out", *(("--data", data) if source else ()))
    (error,) = [finding for finding in json.loads(shown)["findings"] if finding["severity"] == "error"]
    assert (code, error["name"], error["rows"]) == (4, "nothing_trained", 12), err
    assert "prompt" in error["cause"]


def test_bad_input_is_one_line_and_writes_nothing(place: Path, tsqlora: Run) -> None:
    out = place / "nothing"
    assert tsqlora("audit", "--prepared", place / "model", "--model", place / "model", "--out", out)[0] == 3
    code, _, err = tsqlora("audit", place / "chats.jsonl", "--no-model", "--out", out)
    assert (code, "give --model M" in err) == (2, True)
    assert not out.exists()


def test_options_that_do_not_go_together_are_named(place: Path, tsqlora: Run) -> None:
    rows, review, model = place / "chats.jsonl", place / "some review.csv", ("--model", place / "model")
    for words, named in (
        (("--drop-findings", "duplicate"), "tsqlora audit --drop-findings duplicate --out AUDIT"),
        (("--apply", review, "--out", place / "a"), f"tsqlora audit --apply '{review}' --out '{place / 'a'}'"),
        (("--prepared", place), f"tsqlora audit --prepared '{place}' --data '{rows}'"),
    ):
        code, _, err = tsqlora("audit", rows, *model, *words)
        assert code == 2
        assert f"DATA and {words[0]} do not go together" in err
        assert named in err
    assert tsqlora("audit")[0] == 2


def test_an_option_without_effect_is_refused_and_named_columns_are_read(place: Path, tsqlora: Run) -> None:
    out, model = place / "options", ("--model", place / "model")
    for words in (
        ("audit", "--apply", place / "chats.jsonl", "--baseline", "x.jsonl"),
        ("audit", "--apply", place / "chats.jsonl", "--chat-template", "9"),
        ("audit", "--drop-findings", "duplicate", "--strict"),
        ("audit", place / "chats.jsonl", *model, "--data", "x.jsonl"),
        ("audit", "--prepared", place, *model, "--chat-template", "9"),
        ("audit", write_jsonl(place / "labels.jsonl", make_rows(20)), *model, "--strict"),
    ):
        code, _, err = tsqlora(*words, "--out", out)
        assert (code, str(words[-2] if words[-1] in ("x.jsonl", "9") else words[-1]) in err) == (2, True)
    rows = write_jsonl(place / "named.jsonl", [{"q": "How far is it to Rome?", "a": "It is far away."}] * 2)
    named = ("--set", "task.type=causal-lm", "--set", "data.prompt=q", "--set", "data.target=a")
    code, shown, err = tsqlora("audit", rows, *model, *named, "--out", out, "--json")
    assert code == 0, err
    assert [finding["name"] for finding in json.loads(shown)["findings"]] == ["duplicate"]


def test_answers_that_are_labels_are_audited_as_such_by_naming_their_column(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Is it?", "completion": "yes"}])
    assert text_config(str(rows), "model", []) is not None
    assert text_config(str(rows), "model", ["data.text=prompt", "data.label=completion"]) is None


@pytest.mark.parametrize("kind", ["packed", "shards", "saved"])
def test_chats_are_chats_in_whatever_form_they_come(kind: str, place: Path, tmp_path: Path, tsqlora: Run) -> None:
    source, rows = tmp_path / "chats.jsonl.gz", right(9)
    if kind == "packed":
        source.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif kind == "shards":
        (source := tmp_path / "shards").mkdir()
        for k in range(3):
            Dataset.from_list(rows[3 * k : 3 * k + 3]).to_parquet(source / f"train-{k:05}-of-00003.parquet")
    else:
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(source := tmp_path / "saved")
    command = ("audit", source, "--no-model", "--model", place / "model", "--out", tmp_path / "out", "--json")
    code, shown, err = tsqlora(*command)
    assert (code, json.loads(shown)["rows"], json.loads(shown)["fates"]) == (0, 9, {"trained": 9}), err
    config = load_config(None, [f"data.train={source}", f"model.path={_causal(tmp_path)}"])
    assert config.task.type == "causal-lm"


def _causal(folder: Path) -> Path:
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return folder


def test_evaluation_rows_are_read_as_the_training_rows_are(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    lines = [f'"Wie weit ist es nach {town} bei Köln?"^"Es sind {j} Stunden."' for j, town in enumerate(TOWNS)]
    files = tmp_path / "train.csv", tmp_path / "eval.csv"
    for file, own in zip(files, (lines, lines[2:3]), strict=True):
        file.write_bytes("\n".join(["Frage^Antwort", *own, ""]).encode("cp850"))
    named = ("delimiter=^", "encoding=cp850", "prompt=Frage", "target=Antwort")
    words = [word for one in named for word in ("--set", f"data.{one}")]
    command = ("audit", files[0], "--model", place / "model", "--no-model", "--set", "task.type=causal-lm", *words)
    code, shown, err = tsqlora(*command, "--eval", files[1], "--out", tmp_path / "out", "--json")
    assert code == 0, err
    assert {one["name"]: one["places"] for one in json.loads(shown)["findings"]}["eval_leak"] == [2]


def test_labelled_rows_are_audited_for_their_labels(place: Path, tsqlora: Run) -> None:
    from runs import save_checkpoint

    rows = write_jsonl(place / "labelled.jsonl", make_rows(40))
    code, _, err = tsqlora("audit", rows, "--model", save_checkpoint(place / "encoder"), "--out", place / "labels")
    assert code == 0, err
    assert (place / "labels" / "audit.json").exists()


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


def test_a_file_of_texts_is_audited_by_the_settings_of_its_text(place: Path, tsqlora: Run) -> None:
    rows, out = place / "latin.csv", place / "latin"
    rows.write_bytes("prompt,completion\ntěch kůň,žluťoučký\nPraha,Brno\n".encode("cp1250"))
    code, shown, err = tsqlora(
        "audit", rows, "--model", place / "model", "--set", "data.encoding=cp1250", "--out", out, "--json"
    )
    assert (code, json.loads(shown or "{}").get("rows")) == (0, 2), err
    code, _, err = tsqlora("audit", "--drop-findings", "duplicate", "--out", out)
    assert code == 0, err
    assert "žluťoučký" in (out / "clean.jsonl").read_text(encoding="utf-8")
