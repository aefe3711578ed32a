"""Does axolotl itself prepare with examples/axolotl_plugin.py, and train three steps with it?

    python bench/trainers/axolotl_plugin.py [--env DIR]

The environment is that of axolotl.py, with our package and its dependencies installed, and with wandb and triton, which
axolotl imports before it trains, on a CPU too.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

from chats import LIMIT, place_of
from origin import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", type=Path, default=Path(tempfile.gettempdir()) / "axolotl")
    parser.add_argument("--command", default="train", choices=["preprocess", "train"])
    request = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = place_of(Path(folder))
        data = {"path": str(place / "chats.jsonl"), "ds_type": "json", "type": "chat_template"}
        data |= {"field_messages": "messages", "message_property_mappings": {"role": "role", "content": "content"}}
        config = {"base_model": str(place / "model"), "datasets": [data], "chat_template": "tokenizer_default"}
        config |= {"sequence_len": LIMIT, "dataset_prepared_path": str(place / "prepared"), "val_set_size": 0}
        config |= {"excess_length_strategy": "truncate"}
        config |= {"output_dir": str(place / "out"), "micro_batch_size": 1, "max_steps": 3, "learning_rate": 1e-4}
        config |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "bf16": False}
        config |= {"gradient_accumulation_steps": 1, "optimizer": "adamw_torch", "num_epochs": 1, "tf32": False}
        config |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}  # they need triton
        config |= {"plugins": ["axolotl_plugin.TsqloraPlugin"], "tsqlora": {"drop": ["stop_not_trained"]}}
        (place / "axolotl.yaml").write_text(json.dumps(config))  # which is YAML
        quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
        command = [request.env / "bin" / "python", "-m", f"axolotl.cli.{request.command}", place / "axolotl.yaml"]
        quiet |= {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'examples'}"}
        subprocess.run(command, check=True, env={**os.environ, **quiet}, cwd=place)
        (audit,) = (place / "out").glob("tsqlora*")
        findings = json.loads((audit / "findings.json").read_text())["findings"]
        print([one["name"] for one in findings], sorted(path.name for path in (place / "out").iterdir()))


if __name__ == "__main__":
    main()
