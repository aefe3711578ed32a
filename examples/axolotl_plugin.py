"""axolotl with our audit: it leaves out the rows of findings that you name, and writes run.json as it trains.

Copy this file next to your axolotl.yaml, add these lines to it, and run `PYTHONPATH=. axolotl train axolotl.yaml`:

    plugins: [axolotl_plugin.TsqloraPlugin]
    tsqlora:
      drop: [stop_not_trained, duplicate]   # names of findings
      answers: false                        # true: the model reads the answers, too

OUTPUT_DIR/tsqlora has the ledger, the findings and their page; `tsqlora report OUTPUT_DIR` shows the training. axolotl
trains without a plugin that it does not find, and only logs it: see that it says how many rows are left out.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel, ConfigDict

OF_TOKENS = ["nothing_trained", "answer_cut", "stop_not_trained", "stop_mismatch", "bos", "vocabulary"]
OF_TOKENS += ["untrained_tokens", "empty_answer", "broken_characters", "html", "duplicate", "conflicting_answers"]
OF_TOKENS += ["one_answer"]
OF_ANSWERS = ["foreign_answer", "cut_answer", "disordered_answer"]


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid")

    drop: list[str] = []
    answers: bool = False


class Args(BaseModel):
    tsqlora: Block | None = None


class TsqloraPlugin(BasePlugin):
    def register(self, cfg):
        import tsqlora as tsq  # not above: axolotl only logs an ImportError of this file

        block = cfg.get("tsqlora") or {}
        can = OF_TOKENS + (OF_ANSWERS if block.get("answers") else [])
        if unknown := sorted({*(block.get("drop") or ())} - {*can}):
            raise tsq.SettingsError(f"no row can have the finding '{unknown[0]}' here; drop takes {', '.join(can)}")

    def get_input_args(self):
        return f"{__name__}.Args"

    def load_datasets(self, cfg, preprocess=False):
        from axolotl.common.datasets import TrainDatasetMeta, load_datasets  # pyright: ignore[reportMissingImports]
        from axolotl.utils.trainer import calculate_total_num_steps  # pyright: ignore[reportMissingImports]

        import tsqlora as tsq

        if cfg.rl:
            raise tsq.UnsupportedError(f"the plugin audits rows with one answer, and rl is {cfg.rl}; remove the plugin")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise tsq.SettingsError("the plugin needs one process; first run `axolotl preprocess` without the plugin")
        meta, block = load_datasets(cfg=cfg), cfg.get("tsqlora") or {}
        rows, drop = meta.train_dataset, block.get("drop") or []
        out = Path(cfg.output_dir) / ("tsqlora-preprocess" if preprocess else "tsqlora")
        with tempfile.TemporaryDirectory() as folder:
            rows.save_to_disk(folder)
            audit = ["-m", "tsqlora", "audit", "--prepared", folder, "--model", cfg.base_model, "--out", str(out)]
            subprocess.run([sys.executable, *audit, *([] if block.get("answers") else ["--no-model"])], check=True)
        about = json.loads((out / "findings.json").read_text(encoding="utf-8"))
        for name in drop:
            if name in about["cannot"]:
                raise tsq.SettingsError(f"no row can have the finding '{name}' here: {about['cannot'][name]}")
        if about["rows"] != len(rows):
            raise tsq.UnsupportedError("the rows are packed; set sample_packing, which packs batches, or no packing")
        left_out = {place for one in about["findings"] if one["name"] in drop for place in one["places"]}
        if len(left_out) > len(rows) / 2:
            raise tsq.DataError(
                f"{', '.join(drop)} would leave out {len(left_out)} of {len(rows)} rows, more than half; see {out}, "
                "and remove the cause"
            )
        print(f"tsqlora: {len(left_out)} of {len(rows)} rows are left out; {out} shows why")
        if not left_out:
            return meta
        rows = rows.select([place for place in range(len(rows)) if place not in left_out])
        cfg.total_num_tokens = cfg.total_supervised_tokens = None  # of all rows
        steps = cfg.max_steps or calculate_total_num_steps(cfg, rows)
        return TrainDatasetMeta(train_dataset=rows, eval_dataset=meta.eval_dataset, total_num_steps=steps)
