"""axolotl: `plugins: [tsqlora.plugins.axolotl.Plugin]`, and a block `tsqlora:` in its YAML."""

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel, ConfigDict


class Block(BaseModel):
    """The settings: findings whose rows are left out, and whether the model reads the answers."""

    model_config = ConfigDict(extra="forbid")

    drop: list[str] = []
    answers: bool = False


class Args(BaseModel):
    """The block in axolotl's settings."""

    tsqlora: Block | None = None


class Plugin(BasePlugin):
    """Audit what axolotl has prepared, leave out the rows of named findings, and report on the training.

    OUTPUT_DIR/tsqlora has the ledger, the findings and their page.
    """

    def register(self, cfg):
        # Here, not above: axolotl only logs an ImportError of a plugin's module, and trains without it.
        from tsqlora.run.prepared_rows import require_findings

        block = cfg.get("tsqlora") or {}
        require_findings(block.get("drop") or (), answers=bool(block.get("answers")))

    def get_input_args(self):
        return "tsqlora.plugins.axolotl.Args"

    def load_datasets(self, cfg, preprocess=False):
        """Load axolotl's data sets, audit the training rows, and count the steps again."""
        from pathlib import Path

        from axolotl.common.datasets import (  # pyright: ignore[reportMissingImports]
            TrainDatasetMeta,
            load_datasets,
        )
        from axolotl.utils.trainer import calculate_total_num_steps  # pyright: ignore[reportMissingImports]

        from tsqlora.distributed import launched
        from tsqlora.errors import SettingsError, UnsupportedError
        from tsqlora.run.prepared_rows import without_findings

        if cfg.rl:
            raise UnsupportedError(f"the plugin audits rows with one answer, and rl is {cfg.rl}; remove the plugin")
        if launched() > 1:
            raise SettingsError("the plugin prepares in one process; first run `axolotl preprocess` without the plugin")
        meta, block = load_datasets(cfg=cfg), cfg.get("tsqlora") or {}
        rows, summary = without_findings(
            meta.train_dataset,
            model=cfg.base_model,
            out=Path(cfg.output_dir) / ("tsqlora-preprocess" if preprocess else "tsqlora"),
            drop=block.get("drop") or (),
            answers=bool(block.get("answers")),
        )
        print(f"tsqlora: {summary['left_out']} of {summary['rows']} rows are left out; {summary['audit']} shows why")
        if not summary["left_out"]:
            return meta
        cfg.total_num_tokens = cfg.total_supervised_tokens = None  # of all rows
        steps = cfg.max_steps or calculate_total_num_steps(cfg, rows)
        return TrainDatasetMeta(train_dataset=rows, eval_dataset=meta.eval_dataset, total_num_steps=steps)

    def add_callbacks_post_trainer(self, cfg, trainer):
        """Keep run.json in OUTPUT_DIR, of which `tsqlora report` makes a page; steps that are not finite are undone."""
        from tsqlora.training.nonfinite import GuardCallback

        return [GuardCallback()]
