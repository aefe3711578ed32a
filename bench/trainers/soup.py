"""The ledger compared with Soup's `data doctor` and `data lint`, on the same files with the same faults.

    python bench/trainers/soup.py [--env DIR]

Faults are planted in 3 % of Alpaca's 900 rows, as in bench/ledger.py, or in the template that all rows go through.
Soup reads every row (its default is a sample of 200). A check of Soup's counts as finding a fault if its verdict or
its number of rows differs from that on the file without the fault.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from chats import environment
from ledger import CHAT_FAULTS, PAIR_FAULTS, ROW_FAULTS, SHARE, alpaca, answered, as_messages, as_pairs, near
from origin import commit, machine, parser_of, write
from transformers import LlamaConfig

from families import FAMILIES, tokenizer_of
from tsqlora.run.text_audit import audit_text

VERSION, LIMIT = "0.77.0", 2_900
Rows = list[dict[str, Any]]


def planted(rows: Rows, fault: Callable[[dict[str, Any]], dict[str, Any]]) -> tuple[Rows, set[int]]:
    places = set(np.random.default_rng([46, 0]).permutation(len(rows))[: round(SHARE * len(rows))].tolist())
    return [fault(row) if j in places else row for j, row in enumerate(rows)], places


def copied(rows: Rows, change: Callable[[dict[str, Any]], dict[str, Any]]) -> tuple[Rows, set[int]]:
    """The rows, and changed copies of some at the end, with more than 60 words."""
    long = [j for j, row in enumerate(rows) if len(str(row).split()) > 60][: round(SHARE * len(rows))]
    return [*rows, *(change(rows[j]) for j in long)], {len(rows) + k for k in range(len(long))}


def model_of(folder: Path, family: str, change: Callable[[str], str] = str) -> Path:
    """A tokenizer and a config, with the family's template changed."""
    tokenizer = tokenizer_of(FAMILIES[family])
    tokenizer.chat_template = change(str(tokenizer.chat_template))
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "eos_token_id": tokenizer.eos_token_id}
    LlamaConfig(**sizes).save_pretrained(folder)
    return folder


def ours(file: Path, model: Path, out: Path, places: set[int], before: Mapping[str, set[int]]) -> dict[str, Any]:
    """The findings that name planted rows, and how many other rows they name that they did not name before."""
    result = audit_text(str(file), model=str(model), max_length=LIMIT, out=out)
    findings = {one["name"]: set(one["places"]) for one in result["findings"] if one["severity"] != "note"}
    named = {name: len(rows & places) for name, rows in findings.items() if rows & places - before.get(name, set())}
    others = {name: len(rows - places - before.get(name, set())) for name, rows in findings.items()}
    return {"named": named, "others": {name: n for name, n in others.items() if n}, "findings": findings}


def soup(python: Path, file: Path, model: Path, command: str) -> dict[str, Any]:
    """Verdict, message and number of rows of each check."""
    report = file.with_suffix(f".{command}.json")
    options = ["--max-length", str(LIMIT)] if command == "doctor" else []
    call = [python.parent / "soup", "data", command, file, "--model", model, "--sample", "20000", *options]
    done = subprocess.run([*map(str, call), "--output", str(report)], capture_output=True, text=True, cwd=file.parent)
    if not report.exists():  # it exits with 2 on a finding, and writes its report all the same
        raise RuntimeError(f"{' '.join(map(str, call))}: {done.stdout}{done.stderr}")
    checks = dict[str, Any]()
    for check in json.loads(report.read_text())["checks"]:
        rows = re.search(r"(\d+)/\d+ rows", check["message"])
        checks[check["name"]] = {
            "verdict": check["verdict"],
            "message": check["message"],
            "rows": None if rows is None else int(rows[1]),
        }
    return checks


def main() -> None:
    parser = parser_of(__doc__, "trainers-soup")
    parser.add_argument("--env", type=Path, default=Path(tempfile.gettempdir()) / "soup")
    request = parser.parse_args()
    python = environment(request.env, [f"soup-cli[data]=={VERSION}", "transformers>=5.16", "jinja2"])
    chats, pairs, results = as_messages(alpaca()), as_pairs(alpaca()), dict[str, Any]()
    system = [{"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]} for row in chats]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        qwen, llama, gemma = (model_of(folder / one.split()[0], one) for one in ("qwen 2.5", "llama 3", "gemma 2"))
        mute = model_of(folder / "mute", "qwen 2.5", lambda text: text.replace("<|im_end|>", ""))
        twice = model_of(folder / "twice", "llama 3", lambda text: "{{ bos_token }}{{ bos_token }}" + text)
        faults = {**ROW_FAULTS, "roles": CHAT_FAULTS["roles"]}
        cases = {name: (planted(chats, fault), chats, qwen, qwen, "doctor") for name, fault in faults.items()}
        cases["duplicate, exact"] = (copied(chats, dict), chats, qwen, qwen, "doctor")
        cases["duplicate, near"] = (
            copied(chats, lambda row: answered(row, lambda _, text: near(text))), chats, qwen, qwen, "doctor",
        )  # fmt: skip
        every = set(range(len(chats)))
        cases["stop_not_trained, by the template"] = ((chats, every), chats, mute, qwen, "doctor")
        cases["bos, by the template"] = ((chats, every), chats, twice, llama, "doctor")
        cases["template_error, system"] = ((system, every), chats, gemma, gemma, "doctor")
        for fault_name, fault in {
            **PAIR_FAULTS,
            **{n: ROW_FAULTS[n] for n in ("empty_answer", "copies_prompt")},
        }.items():
            cases[f"{fault_name}, pairs"] = (planted(pairs, fault), pairs, qwen, qwen, "lint")
        cases["duplicate, pairs"] = (copied(pairs, dict), pairs, qwen, qwen, "lint")
        before = dict[Any, Any]()
        for number, (case, ((rows, places), clean, model, clean_model, command)) in enumerate(cases.items()):
            key = (command, clean_model)
            for part, (some, with_) in {"clean": (clean, clean_model), "fault": (rows, model)}.items():
                if part == "clean" and key in before:
                    continue
                file = folder / f"{number}.{part}.jsonl"
                file.write_text("".join(json.dumps(row) + "\n" for row in some))
                named = before[key]["ours"]["findings"] if part == "fault" else {}
                both = {
                    "ours": ours(file, with_, folder / f"{number}.{part}", places if part == "fault" else set(), named),
                    "soup": soup(python, file, with_, command),
                }
                if part == "clean":
                    before[key] = both
            was = before[key]["soup"]
            differs = {
                name: check
                for name, check in both["soup"].items()
                if (check["verdict"], check["rows"]) != tuple(was.get(name, {}).get(one) for one in ("verdict", "rows"))
            }
            results[case] = {
                "planted": len(places),
                "named": both["ours"]["named"],
                "others": both["ours"]["others"],
                "soup": differs,
            }
            print(case, json.dumps(results[case]), flush=True)
    write(request.out, {"soup": VERSION, "limit": LIMIT, "commit": commit(), "machine": machine(), "cases": results})


if __name__ == "__main__":
    main()
