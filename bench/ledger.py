"""Does the ledger find what is planted, and nothing else?

    python bench/ledger.py [--draws 10]

Rows are Alpaca's 900, as messages, as Alpaca's own columns, as prompt and completion, and as pairs with another row's
answer rejected. Each fault is planted in 3 % of them, in ten draws of places. Faults of a preparation are planted in
the tokens and labels that `tsqlora train` makes. Recall counts planted rows with the finding; false alarms other rows
with a finding that they do not have without the fault.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from origin import ROOT, commit, machine, parser_of, write

sys.path.append(str(ROOT / "tests"))

from families import FAMILIES, tokenizer_of
from tsqlora.auditing.texts.among import among_rows
from tsqlora.auditing.texts.ledger import Line, line_of
from tsqlora.auditing.texts.prepared import Trained
from tsqlora.auditing.texts.raw import audited, prepared_rows
from tsqlora.auditing.texts.vocabulary import Vocabulary, vocabulary_of
from tsqlora.rows.batches import IGNORED
from tsqlora.rows.chat import Chat, Format, format_of
from tsqlora.rows.rows import Row

SHARE, LIMIT = 0.03, 8_192
Cells = dict[str, Any]
Rows = list[Cells]


def alpaca() -> Rows:
    lines = (ROOT / ".." / "shared" / "data" / "alpaca" / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def prompt_of(row: Cells) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]


def as_messages(rows: Rows) -> Rows:
    return [
        {"messages": [{"role": "user", "content": prompt_of(r)}, {"role": "assistant", "content": r["output"]}]}
        for r in rows
    ]


def as_completions(rows: Rows) -> Rows:
    return [{"prompt": prompt_of(row), "completion": row["output"]} for row in rows]


def as_pairs(rows: Rows) -> Rows:
    others = [row["output"] for row in rows[1:] + rows[:1]]
    return [
        {"prompt": prompt_of(row), "chosen": row["output"], "rejected": other}
        for row, other in zip(rows, others, strict=True)
    ]


FORMATS: Mapping[str, Callable[[Rows], Rows]] = {
    "messages": as_messages,
    "alpaca": list,
    "prompt": as_completions,
    "preference": as_pairs,
}
ANSWER = {"alpaca": "output", "prompt": "completion", "preference": "chosen"}


def answered(cells: Cells, change: Callable[[str, str], str]) -> Cells:
    """The row with another answer: `change(prompt, answer)`."""
    if "messages" in cells:
        question, answer = cells["messages"]
        return {"messages": [question, {**answer, "content": change(question["content"], answer["content"])}]}
    column = next(name for name in ANSWER.values() if name in cells)
    prompt = cells["prompt"] if "prompt" in cells else prompt_of(cells)
    return {**cells, column: change(prompt, cells[column])}


def near(text: str) -> str:
    """The text without one of its words, where it has many."""
    words = text.split(" ")
    return " ".join(words[: len(words) // 2] + words[len(words) // 2 + 1 :])


ROW_FAULTS: Mapping[str, Callable[[Cells], Cells]] = {
    "empty_answer": lambda row: answered(row, lambda _, __: " "),
    "copies_prompt": lambda row: answered(row, lambda prompt, answer: f"{prompt} {answer}"),
    "template_twice": lambda row: answered(row, lambda _, answer: f"{answer}<|im_end|>"),
    "broken_characters": lambda row: answered(row, lambda _, answer: f"{answer} cafÃ©"),
    "answer_cut": lambda row: answered(row, lambda _, answer: f"{answer} and so on" + ", and on" * 2000),
}
CHAT_FAULTS: Mapping[str, Callable[[Cells], Cells]] = {
    "roles": lambda row: {"messages": [row["messages"][0], *row["messages"]]},
    "template_error": lambda row: {"messages": [{"role": "tool", "content": "RAISE"}, *row["messages"]]},
}
PAIR_FAULTS: Mapping[str, Callable[[Cells], Cells]] = {
    "pair_equal": lambda row: {**row, "rejected": row["chosen"]},
}
PREPARED_FAULTS: Mapping[str, Callable[[Trained, Vocabulary], Trained]] = {
    "nothing_trained": lambda one, _: replace(one, targets=np.full(len(one.ids), IGNORED)),
    "stop_not_trained": lambda one, vocabulary: replace(
        one, targets=np.where(np.isin(one.targets, [*vocabulary.stops]), IGNORED, one.targets)
    ),
    "answer_cut": lambda one, _: Trained(one.ids[:-6], one.targets[:-6], one.row),
    "cut_then_stop": lambda one, vocabulary: Trained(
        np.r_[one.ids[:-8], min(vocabulary.stops)], np.r_[one.targets[:-8], min(vocabulary.stops)], one.row
    ),
    "prompt_trained": lambda one, _: replace(one, targets=one.ids),
    "vocabulary": lambda one, vocabulary: Trained(
        np.r_[one.ids, len(vocabulary.tokens) + 5], np.r_[one.targets, IGNORED], one.row
    ),
    "content_lost": lambda one, _: Trained(
        np.delete(one.ids, slice(50, 58)), np.delete(one.targets, slice(50, 58)), one.row
    ),
}


def lines_of(rows: Rows, vocabulary: Vocabulary) -> tuple[list[Line], list[Chat], list[Row], Format]:
    format = format_of(list(rows[0]), "rows")
    made = [Row(cells, "rows", j, j) for j, cells in enumerate(rows)]
    talks = [format.show(row) for row in made]
    return audited(made, format, vocabulary, LIMIT), talks, made, format


def found_in(rows: Rows, vocabulary: Vocabulary, evaluation: Rows | None = None) -> dict[str, set[int]]:
    lines, talks, *_ = lines_of(rows, vocabulary)
    unseen = None
    if evaluation is not None:
        own = format_of(list(evaluation[0]), "evaluation")
        unseen = [own.show(Row(cells, "evaluation", j, j)) for j, cells in enumerate(evaluation)]
    findings = {name: set(places) for name, places in among_rows(talks, lines, unseen).items()}
    for line in lines:
        for name in line.findings:
            findings.setdefault(name, set()).add(line.row)
    return findings


def scored(
    name: str, planted: set[int], findings: Mapping[str, set[int]], before: Mapping[str, set[int]]
) -> dict[str, Any]:
    """Recall of the fault; and the share of other rows with a finding of its name that they lack without it."""
    own, was = findings.get(name, set()), before.get(name, set())
    return {
        "recall": len(own & planted) / len(planted),
        "false_alarms": len(own - planted - was) / max(1, len(planted) / SHARE),
    }


def cells(draws: int) -> list[dict[str, Any]]:
    tokenizer = tokenizer_of(FAMILIES["qwen 2.5"])
    refusing = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    )
    tokenizer.chat_template = refusing + str(tokenizer.chat_template)
    vocabulary, results = vocabulary_of(tokenizer), list[dict[str, Any]]()
    for format, make in FORMATS.items():
        rows = make(alpaca())
        before = found_in(rows, vocabulary)
        results.append({"format": format, "fault": "none", "found": {name: len(own) for name, own in before.items()}})
        faults = {
            **ROW_FAULTS,
            **(CHAT_FAULTS if format == "messages" else {}),
            **(PAIR_FAULTS if format == "preference" else {}),
        }
        for draw in range(draws):
            rng = np.random.default_rng([46, draw])
            planted = set(rng.permutation(len(rows))[: round(SHARE * len(rows))].tolist())
            about = {"format": format, "draw": draw}
            for name, fault in faults.items():
                spoilt = [fault(row) if j in planted else row for j, row in enumerate(rows)]
                results.append({**about, "fault": name, **scored(name, planted, found_in(spoilt, vocabulary), before)})
            results += _copies(rows, sorted(planted), about, vocabulary)
            if format == "messages":
                results += _prepared(rows, planted, about, vocabulary)
            print(format, draw, flush=True)
    return results


def _copies(rows: Rows, planted: Sequence[int], about: dict[str, Any], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Exact and near copies of some rows at the end, and in an evaluation file."""
    before, results = found_in(rows, vocabulary), list[dict[str, Any]]()
    for kind, change in (("exact", lambda row: row), ("near", lambda row: answered(row, lambda _, text: near(text)))):
        long = [j for j in planted if len(str(rows[j]).split()) > 60] if kind == "near" else list(planted)
        copies = [change(rows[j]) for j in long]
        later = {len(rows) + k for k in range(len(copies))}
        result = scored("duplicate", later, found_in([*rows, *copies], vocabulary), before)
        results.append({**about, "fault": f"duplicate, {kind}", **result})
        result = scored("eval_leak", {*long}, found_in(rows, vocabulary, copies), {})
        results.append({**about, "fault": f"eval_leak, {kind}", **result})
    return results


def _prepared(rows: Rows, planted: set[int], about: dict[str, Any], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    _, talks, made, format = lines_of(rows, vocabulary)
    whole, results = prepared_rows(made, format, vocabulary.tokenizer, max_length=LIMIT), list[dict[str, Any]]()
    limit = max(len(s.ids) for one in whole for s in one.sequences)
    long = {j for j in planted if len(talks[j].answer) >= 24}  # a shorter answer would be cut away whole
    for name, fault in PREPARED_FAULTS.items():
        planted = long if name == "cut_then_stop" else planted
        findings = dict[str, set[int]]()
        for talk, one in zip(talks, whole, strict=True):
            sequences = [fault(s, vocabulary) if talk.row in planted else s for s in one.sequences]
            for finding in line_of(talk, sequences, vocabulary, limit=limit).findings if sequences else ():
                findings.setdefault(finding, set()).add(talk.row)
        results.append({**about, "fault": f"{name}, prepared", **scored(name, planted, findings, {})})
    return results


def main() -> None:
    parser = parser_of(__doc__, "ledger")
    parser.add_argument("--draws", type=int, default=10)
    request = parser.parse_args()
    about = {"share": SHARE, "limit": LIMIT, "draws": request.draws, "commit": commit(), "machine": machine()}
    write(request.out, {**about, "cells": cells(request.draws)})


if __name__ == "__main__":
    main()
