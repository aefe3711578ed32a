"""Does the ledger say what axolotl has prepared?

    python bench/trainers/axolotl.py [--env DIR]

axolotl packs at batch time alone, so its prepared set has a row for each source row.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from chats import LIMIT, compared, environment, place_of, save
from origin import parser_of

VERSION = "0.19.0"
PINS = (
    "huggingface_hub==1.17.0 peft==0.20.0 tokenizers==0.23.1 transformers==5.16.1 accelerate==1.13.0 datasets==4.8.4 "
    "trl==1.9.0 pydantic==2.12.5 typer==0.25.1 PyYAML addict fire einops colorama posthog pillow numba"
)
VARIANTS = {
    "plain": {},
    "cut": {"excess_length_strategy": "truncate"},
    "prompts too, without stops": {"roles_to_train": ["user", "assistant"], "train_on_eos": "none"},
}


def main() -> None:
    parser = parser_of(__doc__, "trainers-axolotl")
    parser.add_argument("--env", type=Path, default=Path(tempfile.gettempdir()) / "axolotl")
    request = parser.parse_args()
    own = ["--no-deps", f"axolotl=={VERSION}", "axolotl-contribs-lgpl", "axolotl-contribs-mit"]
    python = environment(request.env, ["torch"], own, PINS.split())
    cells = {}
    for name, variant in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            place = place_of(Path(folder))
            data = {"path": str(place / "chats.jsonl"), "ds_type": "json", "type": "chat_template"}
            data |= {"field_messages": "messages", "message_property_mappings": {"role": "role", "content": "content"}}
            data |= {key: value for key, value in variant.items() if key != "excess_length_strategy"}
            config = {"base_model": str(place / "model"), "datasets": [data], "chat_template": "tokenizer_default"}
            config |= {"sequence_len": LIMIT, "dataset_prepared_path": str(place / "prepared"), "val_set_size": 0}
            config |= {"output_dir": str(place / "out"), "micro_batch_size": 1, "num_epochs": 1, "learning_rate": 1e-4}
            config |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "bf16": False}
            config |= {key: value for key, value in variant.items() if key == "excess_length_strategy"}
            (place / "axolotl.yaml").write_text(json.dumps(config))  # which is YAML
            quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONPATH": ""}
            command = [python, "-m", "axolotl.cli.preprocess", place / "axolotl.yaml"]
            subprocess.run(command, check=True, env={**os.environ, **quiet}, cwd=place)
            (prepared,) = (one for one in (place / "prepared").iterdir() if one.is_dir())
            cells[name] = compared(prepared, place, place / "audit")
    save("axolotl", cells, request.out, version=VERSION)


if __name__ == "__main__":
    main()
