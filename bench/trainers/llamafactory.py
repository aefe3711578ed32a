"""Does the ledger say what LLaMA-Factory has prepared?

python bench/trainers/llamafactory.py [--env DIR] [--work DIR]
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from chats import LIMIT, compared, environment, place_of, save
from origin import parser_of

VERSION = "0.9.5"
PREPARE = """
import importlib.machinery, json, sys, types
sound = sys.modules["torchaudio"] = types.ModuleType("torchaudio")  # its wheel wants CUDA
sound.__version__, sound.__spec__ = "0", importlib.machinery.ModuleSpec("torchaudio", None)
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
for one in json.load(open(sys.argv[1])):
    model, data, training, _, _ = get_train_args(one)
    tokens = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(tokens["tokenizer"], data)
    try:
        get_dataset(template, model, data, training, stage="sft", **tokens)
    except SystemExit:
        pass
"""
VARIANTS = {
    "plain": {},
    "last answer alone": {"mask_history": True},
    "packed": {"packing": True, "neat_packing": True, "cutoff_len": 1024},
}


def main() -> None:
    parser = parser_of(__doc__, "trainers-llamafactory")
    parser.add_argument("--env", type=Path, default=Path(tempfile.gettempdir()) / "llamafactory")
    request = parser.parse_args()
    python = environment(request.env, ["torch", "torchvision"], [f"llamafactory=={VERSION}"])
    with tempfile.TemporaryDirectory() as folder:
        place = place_of(Path(folder))
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        info = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": {**tags, "system_tag": "system"}}
        (place / "dataset_info.json").write_text(json.dumps({"chats": {"file_name": "chats.jsonl", **info}}))
        common = {
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "model_name_or_path": str(place / "model"),
        }
        common |= {"dataset": "chats", "dataset_dir": str(place), "template": "qwen", "cutoff_len": LIMIT}
        common |= {
            "output_dir": str(place / "out"),
            "use_cpu": True,
            "report_to": "none",
            "preprocessing_num_workers": 1,
        }
        runs = [{**common, **variant, "tokenized_path": str(place / name)} for name, variant in VARIANTS.items()]
        (place / "runs.json").write_text(json.dumps(runs))
        quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        subprocess.run([python, "-c", PREPARE, place / "runs.json"], check=True, env={**os.environ, **quiet})
        cells = {name: compared(place / name, place, place / f"audit {name}") for name in VARIANTS}
    save("LLaMA-Factory", cells, request.out, version=VERSION)


if __name__ == "__main__":
    main()
