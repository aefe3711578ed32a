"""LLaMA-Factory with our audit between its preparation and its training; run it where `llamafactory-cli` runs:

    python llama_factory.py sft.yaml --out run --drop-findings empty_answer,duplicate

It prepares by the settings of `llamafactory-cli train`, writes the audit to run/audit and the set without the rows of
these findings to run/filtered, and lets LLaMA-Factory train on that (tokenized_path). A packed row is left out whole.
"""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

OF_TOKENS = ["nothing_trained", "answer_cut", "stop_not_trained", "stop_mismatch", "bos", "vocabulary"]
OF_TOKENS += ["untrained_tokens", "empty_answer", "broken_characters", "html", "duplicate", "conflicting_answers"]
OF_TOKENS += ["one_answer"]
OF_ANSWERS = ["foreign_answer", "cut_answer", "disordered_answer"]


def prepare(settings: dict) -> None:
    """Let LLaMA-Factory save its set in tokenized_path."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer  # pyright: ignore[reportMissingImports]
    from llamafactory.hparams import get_train_args  # pyright: ignore[reportMissingImports]
    from llamafactory.model import load_tokenizer  # pyright: ignore[reportMissingImports]

    model, data, training, _, _ = get_train_args(settings)
    tokens = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(tokens["tokenizer"], data)
    try:
        get_dataset(template, model, data, training, stage="sft", **tokens)
    except SystemExit as ended:  # after saving
        if ended.code:
            raise


def unpacked(rows: dict, numbers: list[int]) -> dict:
    """The sequences of packed rows, which start position_ids anew, as each token of the padding does."""
    parts = {"input_ids": [], "labels": [], "row": []}
    for j, positions in enumerate(rows["position_ids"]):
        starts = [place for place, position in enumerate(positions) if position == 0]
        for start, end in pairwise([*starts, len(positions)]):
            if end > start + 1:
                parts["input_ids"].append(rows["input_ids"][j][start:end])
                parts["labels"].append(rows["labels"][j][start:end])
                parts["row"].append(numbers[j])
    return parts


def without_findings(rows, prepared: Path, model: str, out: Path, drop: list[str], answers: bool):
    """Write the audit of the rows to `out`, and return the rows without those findings."""
    packed = "position_ids" in rows.column_names
    if packed:
        sequences = rows.map(unpacked, batched=True, with_indices=True, remove_columns=rows.column_names)
        prepared = prepared.with_name("sequences")
        sequences.remove_columns("row").save_to_disk(str(prepared))
    audit = ["-m", "tsqlora", "audit", "--prepared", str(prepared), "--model", model, "--out", str(out)]
    if code := subprocess.run([sys.executable, *audit, *([] if answers else ["--no-model"])]).returncode:
        sys.exit(code)
    about = json.loads((out / "findings.json").read_text(encoding="utf-8"))
    for name in drop:
        if name in about["cannot"]:
            sys.exit(f"no row can have the finding '{name}' here: {about['cannot'][name]}")
    places = {place for one in about["findings"] if one["name"] in drop for place in one["places"]}
    left_out = {sequences["row"][place] for place in places} if packed else places
    cure = "remove the cause, or prepare the rows without packing" if packed else "remove the cause"
    if len(left_out) > len(rows) / 2:
        sys.exit(f"{len(left_out)} of {len(rows)} rows would be left out, more than half; see {out}, and {cure}")
    whole = f" whole, for {len(places)} of their sequences" if packed else ""
    print(f"{len(left_out)} of {len(rows)} rows are left out{whole}; {out} shows why")
    return rows.select([place for place in range(len(rows)) if place not in left_out])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="settings of `llamafactory-cli train`, stage sft")
    parser.add_argument("--out", type=Path, required=True, help="directory for the audit and the filtered set")
    parser.add_argument("--drop-findings", default="", metavar="NAMES", help="leave out the rows of these findings")
    parser.add_argument("--answers", action="store_true", help="read the answers with the model, too")
    parser.add_argument("--no-train", action="store_true", help="only prepare, audit and filter")
    request = parser.parse_args()
    drop = [name.strip() for name in request.drop_findings.split(",") if name.strip()]
    can = OF_TOKENS + (OF_ANSWERS if request.answers else [])
    if unknown := sorted({*drop} - {*can}):
        parser.error(f"no row can have the finding '{unknown[0]}' here; --drop-findings takes {', '.join(can)}")
    if not request.config.is_file():
        parser.error(f"{request.config}: no such file; give the settings of `llamafactory-cli train`")
    if request.out.exists() and any(request.out.iterdir()):
        parser.error(f"--out {request.out} is not empty; name another directory")
    from datasets import DatasetDict, load_from_disk

    from tsqlora.libs.yaml import load_yaml

    settings = load_yaml(request.config.read_bytes())
    if not isinstance(settings, dict) or settings.get("stage") != "sft":
        parser.error(f"{request.config} does not have stage: sft, which alone is supported")
    if settings.get("tokenized_path"):
        parser.error(f"{request.config} has a tokenized_path; leave it out, since the filtered set takes its place")
    prepared, filtered = request.out / "prepared", request.out / "filtered"
    prepare(settings | {"tokenized_path": str(prepared)})
    made = load_from_disk(str(prepared))
    train, model = made["train"] if isinstance(made, DatasetDict) else made, settings["model_name_or_path"]
    rows = without_findings(train, prepared, model, request.out / "audit", drop, request.answers)
    made = DatasetDict({**made, "train": rows}) if isinstance(made, DatasetDict) else rows
    made.save_to_disk(str(filtered))
    if not request.no_train:
        from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports]

        run_exp(settings | {"tokenized_path": str(filtered)})


if __name__ == "__main__":
    main()
