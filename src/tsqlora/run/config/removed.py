"""Settings that were removed or have other names elsewhere, and refused arguments of the Trainer: what to do."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# TrainingArguments that another setting decides, or that would break the method, with their cures.
REFUSED_ARGUMENTS: Mapping[str, str] = {
    "num_train_epochs": "set training.epochs",
    "per_device_train_batch_size": "set training.batch_size",
    "output_dir": "give the run directory as --out",
    "resume_from_checkpoint": "give --resume",
    "hub_token": "log in with `hf auth login` or set HF_TOKEN: settings are copied into the run's files",
    "data_seed": "set training.seed, which decides the draws too",
    "train_sampling_strategy": "remove it: the draw decides the order of rows",
    "dataloader_drop_last": "remove it: every drawn row is trained on",
    "dataloader_persistent_workers": "remove it: such workers would repeat the first epoch's draw",
    "remove_unused_columns": "remove it: the task chooses its columns",
}


# What other tools call a setting; with any section, or none.
ELSEWHERE: Mapping[str, str] = {
    "lr": "training.learning_rate",
    "bs": "training.batch_size",
    "per_device_train_batch_size": "training.batch_size",
    "micro_batch_size": "training.batch_size",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "r": "ranks.mean",
    "rank": "ranks.mean",
    "lora_r": "ranks.mean",
    "lora_rank": "ranks.mean",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.target_modules",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
}


class Removed(NamedTuple):
    """A removed setting: its former default, and its replacement or the reason."""

    default: Any
    why: str


# A file with one of them at its former default still loads: it describes the same run.
REMOVED_SETTINGS: Mapping[str, Removed] = {
    "data.max_target_length": Removed(None, "set data.max_length, which limits targets too"),
    "data.packing": Removed(False, "TRL's SFTTrainer packs, and takes tsqlora's callbacks; remove it"),
    "quality.reject": Removed(None, "rows whose label the judge calls wrong are always left out; remove it"),
    "quality.gate": Removed(None, "in place of a gate the question to the pool decides; remove it"),
    "quality.trusted_last": Removed(None, "the question to the pool decides that; remove it"),
    "quality.weights.reducible_loss": Removed(
        None, "the question to the pool decides how trusted rows are used; remove it"
    ),
    "quality.warmup": Removed(1.0, "rows are looked at before the first step; remove it"),
    "quality.warmup_limit": Removed(0.5, "rows are looked at before the first step; remove it"),
    "quality.scope": Removed("adapter", "gradients are those of trainable weights; remove it"),
    "quality.weights.ifd": Removed(None, "the ratio of losses with and without a prompt did not help; remove it"),
    "quality.weights": Removed(None, "use tsqlora.paper.ScoringRule(weights=…) in Python, or quality.preset: paper"),
    "quality.temperature": Removed(None, "use tsqlora.paper.ScoringRule(temperature=…) in Python"),
    "quality.look_again": Removed(True, "use tsqlora.paper.ScoringRule(look_again=False) in Python"),
    "quality.look": Removed(None, "use tsqlora train --look LOOK, or tsqlora.train(look=…)"),
    "quality.resample": Removed(True, "use tsqlora.QualitySubset(resample=False) in Python"),
    "ranks.depth": Removed("all", "use adapter.target_modules with a pattern, or tsqlora.wrap(depth=…) in Python"),
    "quality.reference": Removed(512, "use tsqlora.paper.ScoringRule(reference=…) in Python"),
    "quality.calibrate": Removed(True, "use tsqlora.paper.ScoringRule(calibration=…) in Python"),
    "quality.guard": Removed(True, "rows whose label the judge calls wrong are always left out; remove it"),
    "quality.unbiased": Removed(False, "rows drawn by Q taught less than random rows, also with weights; remove it"),
    "quality.recheck": Removed(False, "a second look for wrong labels did not help; remove it"),
    "quality.harvest": Removed(False, "terms from training's own passes hardly detect wrong labels; use tsqlora score"),
    "ranks.cache_gb": Removed(0.0, "it needed a base without dropout, and room on disk for all rows; remove it"),
    "ranks.estimator": Removed("sampled", "sensitivity has one formula"),
    "ranks.gamma": Removed(1.0, "use the argument of RankSchedule and tsqlora.paper.allocate"),
    "ranks.samples": Removed(256, "use the argument of RankCallback"),
    "ranks.warmup": Removed(0.1, "use the argument of RankSchedule"),
    "ranks.freeze": Removed(0.3, "use the argument of RankSchedule"),
    "ranks.moves": Removed(None, "use the argument of RankSchedule"),
    "training.eval_batch_size": Removed(64, "set training.per_device_eval_batch_size"),
}
