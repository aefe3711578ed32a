"""A row is read once, and what a template renders from its whole messages is what is trained."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from byte_tokenizers import byte_tokenizer
from families import FAMILIES, tokenizer_of
from runs import write_jsonl
from tsqlora.auditing.texts.findings import ERROR, FINDINGS, findings_of
from tsqlora.auditing.texts.ledger import Line, spans_of
from tsqlora.auditing.texts.raw import audited, prepared_rows
from tsqlora.auditing.texts.vocabulary import Vocabulary, vocabulary_of
from tsqlora.errors import DataError
from tsqlora.rows.chat import Manner, format_of
from tsqlora.rows.rows import Row
from tsqlora.rows.sources import open_table

QUESTION, ANSWER = "What is the capital of France, please?", "It is Paris, on the river Seine."
NEMO = (
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{% if tools and m == (rest | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% if loop.last and system %}{{ '[INST]' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS]' }}{% for call in m.tool_calls %}"
    "{% if call.id is not defined or call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{ call.function | tojson + call.id }}{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{ '[TOOL_RESULTS]' + m.content + m.tool_call_id + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
"""Mistral Nemo's: the system prompt stands before the last message, if nobody has answered that one."""
ENDS = {
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "phi3": "<|end|>",
    "glm4moe": "<|user|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "gptoss": "<|return|>",
    "nemo": "</s>",
}
"""What ends an answer, by family."""
SPECIAL = re.compile(r"<\|[\w▁]+\|>|<｜[\w▁]+｜>|<\w+_of_turn>|<\|?turn\|?>|\[/?INST\]")


def vocabulary(name: str, template: str | None = None, **how: Any) -> Vocabulary:
    """That of a family, or of a template of TRL's."""
    if name in FAMILIES:
        tokenizer = tokenizer_of(FAMILIES[name])
        if template is None:
            how["generation_ends"] = tokenizer.convert_tokens_to_ids(list(FAMILIES[name].stops))
        else:
            tokenizer.chat_template = template
        return vocabulary_of(tokenizer, **how)
    if name == "nemo":
        template = NEMO
    else:
        folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
        template = (folder / f"{name}.jinja").read_text()
    tokenizer: Any = byte_tokenizer(opens=False, closes=False)
    markers = dict.fromkeys([ENDS[name], *SPECIAL.findall(template)])
    tokenizer.add_special_tokens({"additional_special_tokens": [*markers]})
    tokenizer.eos_token, tokenizer.chat_template = ENDS[name], template
    return vocabulary_of(tokenizer)


def turns(*contents: str, system: str | None = None) -> dict[str, Any]:
    chat = [say(role, text) for role, text in zip(("user", "assistant") * len(contents), contents, strict=False)]
    return {"messages": [*([say("system", system)] if system else []), *chat]}


def say(role: str, content: str | None, **further: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **further}


def words(rng: np.random.Generator) -> str:
    """A text of a length as in life: most are short, and few are very long."""
    few = ["river", "60", "Σ", "日本", "naïve", "x < y", "`a`", "\n- ", "🙂", '"no"', "1.5 %"]
    return "It is " + " ".join(rng.choice(few) for _ in range(1 + int(rng.lognormal(2, 1.2)))).strip() + "."


TOOL = {
    "type": "function",
    "function": {
        "name": "get_capital",
        "description": "Finds it.",
        "parameters": {"type": "object", "properties": {"country": {"type": "string", "description": "Which?"}}},
    },
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "get_capital", "arguments": {"country": "France", "after": 60, "unit": None}},
}
REASON = "We think of rivers."


def chats(seed: int) -> dict[str, dict[str, Any]]:
    """Rows of life by what they have."""
    rng = np.random.default_rng(seed)
    ask, answer, more, last = say("user", words(rng)), words(rng), say("user", words(rng)), words(rng)
    result = say("tool", "60", tool_call_id="abcdefghi", name="get_capital")
    called = [ask, say("assistant", None, tool_calls=[CALL]), result, say("assistant", answer)]
    system = say("system", f"{words(rng)} Be brief.")
    return {
        "plain": {"messages": [ask, say("assistant", answer)]},
        "two": {"messages": [ask, say("assistant", answer), more, say("assistant", last)]},
        "system": {"messages": [system, ask, say("assistant", answer)]},
        "blanks": {"messages": [ask, say("assistant", f"  {answer}\n\n")]},
        "tools": {"messages": called, "tools": [TOOL]},
        "one line feed": {"messages": [ask, say("assistant", f"<think>\n{REASON}\n</think>\n{answer}")]},
        "no line feed": {"messages": [ask, say("assistant", f"<think>{REASON}</think>{answer}")]},
    }


def lines(rows: Sequence[Mapping[str, Any]], vocabulary: Vocabulary, limit: int = 20_000) -> list[Line]:
    format = format_of(list(rows[0]), "rows.jsonl")
    made = [Row(json.loads(json.dumps(cells)), "rows.jsonl", j + 1, j) for j, cells in enumerate(rows)]
    return audited(made, format, vocabulary, limit)


def texts(cells: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[str, str]:
    """What is read of a row, and what of it is trained."""
    row = Row(json.loads(json.dumps(cells)), "rows.jsonl", 1, 0)
    (made,) = prepared_rows([row], format_of(list(cells), "rows.jsonl"), vocabulary.tokenizer, max_length=20_000)
    one = made.sequences[-1]
    return vocabulary.text(one.ids).decode(), vocabulary.text(one.targets[one.trained]).decode()


@pytest.mark.parametrize("name", ENDS)
def test_what_the_template_renders_from_the_whole_message_is_what_is_trained(name: str) -> None:
    family = vocabulary(name)
    for seed in range(3):
        for kind, cells in chats(seed).items():
            (line,) = lines([cells], family)
            tools = cells.get("tools")
            try:
                rendered = str(family.tokenizer.apply_chat_template(cells["messages"], tools, tokenize=False))
            except Exception as error:
                rendered = str(error)
            if line.fate == "dropped":  # by the words of the template, or since it has no tools
                assert rendered in line.detail or ("content_lost" in line.findings and tools), (name, kind, line)
                continue
            read, trained = texts(cells, family)
            assert read.rstrip() == rendered.rstrip(), (name, kind)
            answer = cells["messages"][-1]["content"].rpartition("</think>")[2].strip()
            assert answer in trained, (name, kind)
            errors = {one for one in line.findings if FINDINGS[one].severity == ERROR}
            lost = {"content_lost"} if name == "deepseek_r1_distill" and "<think>" in str(cells) else set()
            assert errors == lost, (name, kind, line)
            assert "prompt_trained" not in line.findings


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "gptoss"])
def test_reasoning_is_trained_whatever_its_key(name: str) -> None:
    family, seen = vocabulary(name), set[str]()
    for key in ("reasoning_content", "reasoning", "thinking"):
        row = {"messages": [say("user", "Where?"), say("assistant", "There.", **{key: REASON})]}
        (line,) = lines([row], family)
        assert (line.fate, {*line.findings} - {"stop_not_trained"}) == ("trained", set()), (key, line)
        seen.add(texts(row, family)[1])
    (trained,) = seen
    assert REASON in trained


def test_what_a_template_does_not_read_is_named_with_its_text() -> None:
    family = vocabulary("qwen2_5")  # "thinking" stands in none of its names, "reasoning_content" neither
    family.tokenizer.chat_template = f"{{# reasoning_content, enable_thinking #}}{family.tokenizer.chat_template}"
    for key in ("reasoning_content", "thinking"):
        (line,) = lines([{"messages": [say("user", "Where?"), say("assistant", "There.", **{key: REASON})]}], family)
        assert (line.fate, line.findings) == ("dropped", ["content_lost"])
        assert all(part in line.detail for part in (key, REASON))
    (line,) = lines([{"messages": [say("user", "Where?", name="Ann"), say("assistant", "There.", id=7)]}], family)
    assert (line.fate, line.findings) == ("trained", [])


def test_results_of_tools_have_their_names_and_ids() -> None:
    row = chats(0)["tools"]
    assert "response:get_capital" in texts(row, vocabulary("gemma4"))[0]
    nemo = vocabulary("nemo")
    assert texts(row, nemo)[0].count("abcdefghi") == 2
    row["messages"][2]["tool_call_id"] = "short"
    (line,) = lines([row], nemo)
    assert (line.fate, line.findings) == ("dropped", ["template_error"])
    assert "length 9" in line.detail


def test_a_template_that_renders_prompts_in_two_ways_trains_every_answer_of_the_whole_chat() -> None:
    rows = chats(1)
    for name, kind in (("deepseek_r1_distill", "two"), ("nemo", "system")):
        family, cells = vocabulary(name), rows[kind]
        (line,) = lines([cells], family)
        assert (line.fate, line.findings) == ("trained", ["prompt_not_prefix"]), line
        assert line.stop_trained
        answers = [one["content"] for one in cells["messages"] if one["role"] == "assistant"]
        assert texts(cells, family)[1] == "".join(f"{answer}{ENDS[name]}" for answer in answers)
    assert "Be brief." in line.detail  # the system prompt, which the model is served and not trained with


def test_reasoning_that_the_template_cuts_off_the_last_answer_is_lost() -> None:
    family = vocabulary("deepseek_r1_distill")
    row = {"messages": [say("user", "Where?"), say("assistant", f"<think>\n{REASON}\n</think>\n\nThere.")]}
    (line,) = lines([row], family)
    assert line.findings == ["prompt_not_prefix", "content_lost"]
    assert REASON in line.shows["content_lost"]


def test_nulls_of_a_row_stay_and_none_are_added(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"unit": None, "place": "Rome"}}}
    messages = [say("user", "Where?"), {"role": "assistant", "content": None, "tool_calls": [call]}, say("tool", "a")]
    written = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])
    (row,) = open_table(written)
    assert row.cells["messages"] == messages
    table = pa.Table.from_pylist([{"messages": [say("user", "Where?"), messages[1], say("tool", "a", name="f")]}])
    pq.write_table(table, tmp_path / "rows.parquet")
    (row,) = open_table(tmp_path / "rows.parquet")
    assert row.cells["messages"][0] == say("user", "Where?")
    assert row.cells["messages"][2] == say("tool", "a", name="f")


ALPACA = {"instruction": "Add them up.", "input": "1 and 2", "output": "It is 3."}
SQUAD = {"context": "Ann lives in Rome.", "question": "Where does Ann live?", "answer": "In Rome."}


@pytest.mark.parametrize(
    "row",
    [
        ALPACA,
        {**ALPACA, "system": "Be brief, and polite."},
        SQUAD,
        {**SQUAD, "system": "Be brief, and polite."},
        {**SQUAD, "question": "Ann lives in Rome.\n\nWhere does Ann live?"},
        {"document": "Ann lives in Rome, and Ben in Oslo.", "summary": "They live apart."},
        {"text": "### Instruction:\nAdd.\n\n### Response:\n3\n"},
    ],
)
@pytest.mark.parametrize("template", [False, True])
def test_prompts_of_several_columns_lose_nothing(row: dict[str, Any], template: bool) -> None:
    family = vocabulary("qwen2_5")
    if not template:
        family.tokenizer.chat_template = None
    (line,) = lines([row], family)
    assert (line.fate, line.findings, line.stop_trained) == ("trained", [], True)


def test_the_answer_behind_alpacas_prompt_is_in_its_place() -> None:
    family = vocabulary("qwen2_5")
    family.tokenizer.chat_template = None
    (made,) = prepared_rows(
        [Row(ALPACA, "r", 1, 0)], format := format_of([*ALPACA], "r"), family.tokenizer, max_length=999
    )
    (one,) = made.sequences
    question, answered = spans_of(format.show(Row(ALPACA, "r", 1, 0)).messages, one, family)
    assert question is not None
    assert answered is not None
    assert family.text(one.ids[question.end : answered.start]) == b"\n\n### Response:\n"
    assert family.text(one.ids[answered.start : answered.end]) == b"It is 3."


def test_a_pair_of_whole_chats_has_its_prompt_once() -> None:
    family = vocabulary("qwen2_5")
    prompt = [say("system", "Be brief."), say("user", "Where is Ann?")]
    sides = {name: [*prompt, say("assistant", text)] for name, text in (("chosen", "In Rome."), ("rejected", "No."))}
    alone = {name: side[-1:] for name, side in sides.items()}
    plain = {name: side[-1]["content"] for name, side in sides.items()}
    for row in (sides, {"prompt": prompt, **sides}, {"prompt": prompt, **alone}, {"prompt": prompt, **plain}):
        (line,) = lines([row], family)
        assert (line.fate, line.findings) == ("trained", [])
        assert texts(row, family)[0].count("Where is Ann?") == 1


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        ({"prompt": "\n\nHuman: Where is it?\n\nAssistant:", "completion": " In Rome."}, None),
        ({"prompt": "### Instruction:\nWhere?\n\n### Response:\n", "completion": "In Rome."}, None),
        (
            {"chosen": "\n\nHuman: Where?\n\nAssistant: In Rome.", "rejected": "Human: Hm?\n\nAssistant: No."},
            None,
        ),
        ({"prompt": "How?", "completion": "Type ssh <user>@<host> there."}, None),
        ({"prompt": "How?", "completion": "Like this.\n\nHuman: And this?"}, "broken_characters"),
        ({"prompt": "How?", "completion": "Like this.<|eot_id|>"}, "broken_characters"),
        ({"prompt": "How?", "completion": "Like this.\n### Instruction: More."}, "broken_characters"),
        ({"prompt": "How?", "completion": "A cafÃ© it is."}, "broken_characters"),
        ({"messages": [say("user", "How?"), say("assistant", "Like this.<|im_end|>")]}, "template_twice"),
    ],
)
def test_markers_of_roles_are_broken_where_nobody_meant_them(row: dict[str, Any], finding: str | None) -> None:
    (line,) = lines([row], vocabulary("qwen2_5"))
    assert line.findings == ([] if finding is None else [finding])
    assert (line.detail != "") == (finding is not None)
    assert finding is None or FINDINGS[finding].severity != ERROR


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [say("human", "Where?"), say("assistant", "There.")]},
        {"messages": [say("user", "Where?"), say("assistant", " ")]},
        {"messages": [say("user", "Where?"), say("assistant", "There.", weight=0)]},
        {"messages": [say("user", "Where?")]},
        {"messages": "no list"},
        {"messages": [say("user", "Where?"), "There."]},
        {"messages": [say("user", "Where?"), say("assistant", "There.")], "functions": [{"name": "f"}]},
        {"messages": [say("user", "Where? \ud83d"), say("assistant", "There.")]},
    ],
)
def test_the_audit_says_of_a_row_what_training_says(row: dict[str, Any]) -> None:
    family, format = vocabulary("qwen2_5"), format_of([*row], "rows.jsonl")
    made = Row(row, "rows.jsonl", 7, 0)
    with pytest.raises(DataError) as caught:
        format.read(made, Manner(seq2seq=False, chat=True))
    (line,) = audited([made], format, family, 999)
    assert line.fate == "dropped"
    assert str(caught.value) == f"rows.jsonl:7: {line.detail}"
    assert {*line.findings} & {"dropped", "roles", "empty_answer"}


@pytest.mark.parametrize("name", FAMILIES)
def test_right_chats_have_no_finding(name: str) -> None:
    family = FAMILIES[name]
    rows = [
        turns(QUESTION, ANSWER),
        turns(QUESTION, f" {ANSWER}\n"),
        turns(QUESTION, "Ünï 漢字 🙂, with a list:\n- a\n- b"),
    ]
    if "thinking" not in name:  # it rewrites earlier answers, so that a conversation is one answer
        rows.append(turns(QUESTION, ANSWER, "And of Spain?", "Madrid."))
    rows += [turns(QUESTION, ANSWER, system="Be brief.")] if family.system else []
    for line in lines(rows, vocabulary(name)):
        assert (line.findings, line.fate, line.stop_trained) == ([], "trained", True), (name, line)


def test_right_tool_calls_have_no_finding() -> None:
    result = say("tool", "Paris")
    chat = [say("user", QUESTION), say("assistant", "", tool_calls=[CALL]), result, say("assistant", ANSWER)]
    for messages, findings in ((chat, []), (chat[:2] + chat[3:], ["roles"])):
        (line,) = lines([{"messages": messages, "tools": [TOOL]}], vocabulary("qwen 2.5, tools"))
        assert (line.findings, line.fate, line.stop_trained) == (findings, "trained", True), line


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_does_not_fit_is_cut_or_left_out(name: str) -> None:
    (line,) = lines([turns(QUESTION, ANSWER * 20)], vocabulary(name), limit=200)
    assert line.findings == ["answer_cut"]
    assert line.lost_tokens


def test_a_template_that_rewrites_earlier_answers_trains_the_last_one_alone() -> None:
    reasoning = "<think>\nFrance.\n</think>\n\n"
    family = vocabulary("qwen 3, thinking")
    plain, thinks, fits = lines(
        [turns(QUESTION, a, "And of Spain?", b) for a, b in ((ANSWER, "Madrid."), (reasoning + ANSWER, "Madrid."))]
        + [turns(QUESTION, ANSWER)],
        family,
    )
    assert plain.findings == ["prompt_not_prefix"]
    assert thinks.findings == ["prompt_not_prefix", "reasoning_stripped"]
    assert {(line.fate, line.stop_trained) for line in (plain, thinks, fits)} == {("trained", True)}
    assert fits.findings == []


def test_completions_of_a_base_model_have_no_finding() -> None:
    family = vocabulary("zephyr", "")
    (line,) = lines([{"prompt": f"{QUESTION} ", "completion": ANSWER}], family)
    assert (line.findings, line.stop_trained) == ([], True)
    assert not family.stops - {family.tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("template", "finding", "severity"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "stop_not_trained", "error"),
        # As GLM's, which ends an answer by the next turn alone.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}",
            "stop_not_trained",
            "warning",
        ),
    ],
)
def test_a_template_that_writes_no_stop_is_named(template: str, finding: str, severity: str) -> None:
    (line,) = lines([turns(QUESTION, ANSWER, QUESTION, ANSWER)], vocabulary("qwen 2.5", template))
    assert [(one.name, one.severity) for one in findings_of([line])] == [(finding, severity)]


def test_an_error_of_all_rows_is_one_of_all_that_the_template_takes() -> None:
    bad, gone, fine = (Line(row, "", fate=fate) for row, fate in enumerate(("trained", "dropped", "trained")))
    bad.find("nothing_trained")
    gone.find("template_error")
    assert {finding.name: finding.severity for finding in findings_of([bad, gone])}["nothing_trained"] == "error"
    assert {finding.name: finding.severity for finding in findings_of([bad, gone, fine])}["nothing_trained"] != "error"


def test_a_stop_at_which_generation_does_not_stop_and_a_doubled_bos() -> None:
    qwen, llama = FAMILIES["qwen 2.5"], FAMILIES["llama 3"]
    ends = tokenizer_of(qwen).convert_tokens_to_ids(["<|endoftext|>"])
    (line,) = lines([turns(QUESTION, ANSWER)], vocabulary("qwen 2.5", qwen.template, generation_ends=ends))
    assert line.findings == ["stop_mismatch"]
    (line,) = lines([turns(QUESTION, ANSWER)], vocabulary("llama 3", "{{ bos_token }}" + llama.template))
    assert "bos" in line.findings


def test_a_template_that_refuses_a_role_names_the_rows() -> None:
    first, second = lines([turns(QUESTION, ANSWER, system="Be brief."), turns(QUESTION, ANSWER)], vocabulary("gemma 2"))
    assert (first.findings, first.fate) == (["template_error"], "dropped")
    assert "System role not supported" in first.detail
    assert second.findings == []


def test_a_cause_of_one_row_is_not_that_of_the_rows_that_the_limit_cuts() -> None:
    cut = [Line(row, "", fate="dropped", findings=["answer_cut"]) for row in range(9)]
    causes = {one.name: one for one in findings_of([*cut, Line(9, "", fate="dropped", detail="no text")])}
    assert causes["dropped"].cause.endswith(": 9 by the length limit; 1 for this reason: no text")
    assert causes["dropped"].cure
    several = [Line(row, "", fate="dropped", detail=f"reason {max(0, row - 2)}") for row in range(7)]
    cause = {one.name: one for one in findings_of(several)}["dropped"].cause
    assert "3 for this reason: reason 0; 1 for this reason: reason 1;" in cause
    assert cause.endswith("2 for others (the ledger has them)")
    whys = ["no 'name' ('a')", "no 'name' ('b')", "no 'tools'"]
    lost = [Line(row, "", fate="dropped", findings=["content_lost"], detail=why) for row, why in enumerate(whys)]
    assert findings_of(lost)[0].cause == "2 of these: no 'name' ('a'); 1 of these: no 'tools'"
    other = Line(9, "", fate="trained", findings=["content_lost"])  # what another trainer left out has no reason
    assert "1 of these: the preparation leaves out content of a message" in findings_of([*lost, other])[0].cause
    assert findings_of(lost[:2])[0].cause == "no 'name' ('a')"


def test_half_a_character_drops_its_row_alone() -> None:
    called = turns(QUESTION, ANSWER)
    called["messages"][1]["tool_calls"] = [{"function": {"name": "capital", "arguments": {"country": "\ud83d"}}}]
    rows = [turns(QUESTION, ANSWER), turns(QUESTION, f"{ANSWER} \ud83d"), called]
    whole, *halves = lines(rows, vocabulary("qwen 2.5, tools"))
    assert (whole.fate, whole.findings) == ("trained", [])
    assert {line.fate for line in halves} == {"dropped"}
    assert all("surrogate" in line.detail for line in halves)
