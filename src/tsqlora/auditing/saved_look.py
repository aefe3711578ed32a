"""A look in a folder: scores, head, judge, and what they were made of; for a model that will be sharded, and for rows
with labels that it was not taken at, each by itself."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from tsqlora import distributed
from tsqlora.auditing.draw.epochs import sample
from tsqlora.auditing.draw.subset import hash_of, hash_of_some
from tsqlora.auditing.labels.judge import DOUBT, Verdict, judged_features
from tsqlora.auditing.look import Look, predictions
from tsqlora.auditing.scores import PREDICTIONS, WHY, Scores, from_terms
from tsqlora.auditing.texts.unfit import answer_columns
from tsqlora.errors import DataError, Finding, SettingsError, UnsupportedError
from tsqlora.files import parents_of, replacing, write_json, write_tensors
from tsqlora.libs.bitsandbytes import linear_bits
from tsqlora.libs.deepspeed import gathered, whole_shape
from tsqlora.model.forward import ACTIVATIONS, Forward, Head, forward_pass
from tsqlora.model.modules import plain_name
from tsqlora.model.request import Compute, LookRequest, RowNames, ScoringRule
from tsqlora.rows.datasets import Dataset
from tsqlora.rows.labels import UNSEEN
from tsqlora.tasks import Batch, Collate, Task, answers_of, task_of

SCORES, HEAD, JUDGE, ABOUT = "scores.parquet", "head.safetensors", "judge.safetensors", "look.json"
ANSWERS = "answers.safetensors"
MISSING = "duplicates and leaks do not show in a single row: `tsqlora audit` finds them among all rows"
DECIDES = ("weights", "temperature", "judge")
"""Fields of a rule that decide a look's scores."""


@dataclass(frozen=True, slots=True, eq=False)
class SavedLook:
    """The result of a look: what a training under any engine needs of it."""

    path: Path
    scores: Scores
    head: Mapping[str, Tensor]
    """The fitted head, by the names that its parameters have in the base model; empty if the model's own stays."""
    about: Mapping[str, Any]
    """What the look was made of, and its summary."""
    verdict: Verdict | None = None
    """The judge of labels, for `of`."""
    answers: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The judges of answers (`auditing/texts/unfit.py`); empty where none were judged."""

    @classmethod
    def load(cls, path: str | Path) -> "SavedLook":
        """Read a folder.  Raises DataError naming the file that is missing or damaged."""
        path = Path(path)
        if not (path / ABOUT).is_file():
            raise DataError(f"{path} holds no look ({ABOUT} is missing); `tsqlora look` writes one")
        try:
            about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
            files = {
                name: load_file(path / name)
                for name in (HEAD, JUDGE, ANSWERS)
                if name == HEAD or (path / name).is_file()
            }
            head, verdict = files[HEAD], None
            answers = {name: tensor.numpy() for name, tensor in files.get(ANSWERS, {}).items()}
            if JUDGE in files:
                made: dict[str, Any] = {name: tensor.numpy() for name, tensor in files[JUDGE].items()}
                made |= {name: made[name].item() for name in ("temperature", "scale", "evident")}
                k = made["judged"].shape
                made |= {
                    "otherwise": np.broadcast_to(made["otherwise"], k),
                    "doubt": made.get("doubt", np.full(k, DOUBT)),
                }
                verdict = Verdict(**made)
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(f"{path} is damaged ({error}); take the look again") from None
        return cls(path, Scores.load(path / SCORES), head, about, verdict, answers)

    def draw(self, fraction: float = 0.5, seed: int = 0) -> np.ndarray:
        """Draw this share of the rows, without those that are left out: their positions, ascending."""
        return sample(self.scores, fraction, seed)

    def findings(self) -> list[Finding]:
        """List the faults for which rows are left out, with these rows; none without evidence of a fault."""
        faults = [reason for reason in self.scores.dropped if reason not in ("held out", "trusted row")]
        rows = [self.scores.row_ids[self.scores.left_out_as(reason)].tolist() for reason in faults]
        cure = "correct or remove these rows"
        return [Finding(name, "warning", tuple(some), WHY[name], cure) for name, some in zip(faults, rows, strict=True)]

    def of(self, model: nn.Module, batch: Batch, *, hashes: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Return columns of scores for the rows of a collated batch, each row scored by itself.

        For classes these are `loss` (with the fitted head), `predicted`, `predicted_probability`, `label_probability`,
        `reason`, and `wrong_probability` if the look has a judge. The model is the one that took the look, with its own
        head; it is left unchanged. A row of the look, by its hash, gets the columns of the look, which come from fits
        without it. If a row's label is not a class of the look, the columns that need it are nan.

        For texts they are `loss` (a token of the answers), `reason`, and `wrong_probability`, the highest over the
        faults that the look can find; nan for a row without an answer that is judged.

        Raises UnsupportedError for another task without a row of logits for each sample, and for a model that is
        sharded.
        """
        n = len(batch["labels"])
        names, compute = RowNames(hashes=hashes, lengths=[0] * n), Compute(max(n, 1))
        if self.answers:
            read = ("input_ids", "labels", "attention_mask", "position_ids")
            columns = {name: batch[name].numpy(force=True) for name in read if name in batch}
            rows = [{name: values[j] for name, values in columns.items()} for j in range(n)]
            return answer_columns(model, self.answers, self.scores, rows, None, rows=names, compute=compute)

        def some(rows: Sequence[int]) -> dict[str, Tensor]:
            return {name: values[list(rows)] for name, values in batch.items()}

        labels = batch["labels"].numpy(force=True)
        return columns_of_rows(model, self, range(n), some, labels, task=task_of(model), rows=names, compute=compute)

    @property
    def summary(self) -> dict[str, Any]:
        """The look in a run's record."""
        return dict(self.about["look"])

    @property
    def rule(self) -> ScoringRule:
        """The rule that the look was taken with; no look follows it."""
        return ScoringRule(**self.about["rule"], look_again=False)

    @property
    def taken_by(self) -> str:
        """The model that took the look, with its bits and devices."""
        bits, devices = self.about["bits"], self.about.get("spread", 1)
        also = [f" in {bits} bits"] * bool(bits) + [f" on {devices} devices"] * (devices > 1)
        return f"{self.about['model'] or 'the model'}{''.join(also)}"

    def require_rule(self, rule: ScoringRule) -> None:
        """Raise SettingsError for a rule that would have other scores."""
        for name, value in asdict_of(rule).items():
            if (was := self.about["rule"][name]) != value:
                raise SettingsError(
                    f"the look in {self.path} has {name} {was}, and the run has {value}; take the look with the run's "
                    "settings, or leave them out"
                )

    def require_rows(self, dataset: Dataset, trusted: Dataset | None, names: RowNames | None) -> None:
        """Raise DataError for other rows, or the same ones in another order, and for other trusted rows."""
        about, cure = self.about, "take the look at the rows that you train on"
        if len(dataset) != about["rows"]:
            raise DataError(f"the look in {self.path} has {about['rows']} rows, and there are {len(dataset)}; {cure}")
        few = 0 if trusted is None else len(trusted)
        if few != about["trusted_rows"]:
            raise DataError(f"the look in {self.path} has {about['trusted_rows']} trusted rows, not {few}; {cure}")
        hashes = None if names is None else names.hashes
        if hashes is not None and self.scores.hashes is not None:  # whatever the tokenizer
            same = tuple(hashes) == self.scores.hashes
        else:
            same = about["rows_hash"] in (None, hash_of_some(dataset))
            same &= not few or trusted is None or hash_of(trusted) == about["trusted_hash"]
        if not same:
            raise DataError(f"the rows differ from those of the look in {self.path}, or are in another order; {cure}")

    def write_head(self, model: nn.Module) -> str | None:
        """Write the head into a model that is not sharded yet, in every process; explain why if it is left out.

        Under deepspeed.zero.Init the first process writes into the gathered parameters. Raises UnsupportedError naming
        a parameter where the head would be lost.
        """
        distributed.refuse_sharded_loading(model)
        return distributed.together(lambda: self._write(distributed.unwrapped(model)))

    @torch.no_grad()
    def _write(self, model: nn.Module) -> str | None:
        if not self.head:
            return None
        named = {plain_name(name): (name, parameter) for name, parameter in model.named_parameters()}
        own, judge = _name(model), self.about["model"]
        if own and judge and Path(own).name != Path(judge).name:
            return f"the head of the look is left out: {judge} took the look, and {own} is trained"
        shapes = {name: tuple(whole_shape(named[name][1])) for name in self.head if name in named}
        fitted = {name: tuple(value.shape) for name, value in self.head.items()}
        if shapes != fitted:
            return f"the head of the look is left out: it has {fitted}, and the model has {shapes or 'none'}"
        targets = {name: named[name][1] for name in self.head}
        for name, parameter in targets.items():
            if not parameter.requires_grad:
                raise SettingsError(
                    f"the look has a head for {name}, which the model does not train; give the LoraConfig "
                    f"modules_to_save=[{name.rpartition('.')[0]!r}]"
                )
            if distributed.is_sharded(parameter) or parameter.is_meta:
                raise UnsupportedError(
                    f"{named[name][0]} is {distributed.parts_of(parameter)}, so a head that is written now is lost; "
                    "give QualityCallback(data, look=...) to Trainer(callbacks=[...]), or before training call "
                    "callback.write_head(trainer.model)"
                )
        with gathered(targets.values()) as writes:
            for name, parameter in targets.items() if writes else ():
                parameter.copy_(self.head[name])
        return None


def apply(
    model: nn.Module, look: SavedLook | str | Path, batch: Batch, *, hashes: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Return the columns of `SavedLook.of`, by a look or the folder of one."""
    return (look if isinstance(look, SavedLook) else SavedLook.load(look)).of(model, batch, hashes=hashes)


def asdict_of(rule: ScoringRule) -> dict[str, Any]:
    """Return the fields of a rule that decide a look's scores."""
    values = {name: getattr(rule, name) for name in DECIDES}
    return {**values, "weights": None if rule.weights is None else dict(rule.weights)}


def save_look(
    path: Path,
    model: nn.Module,
    request: LookRequest,
    scores: Scores,
    look: Look | None,
    answers: Mapping[str, np.ndarray],
) -> SavedLook:
    """Write the folder in the first process; the others wait for it."""
    trusted, rule = request.trusted, request.rule
    bits = {bits for module in model.modules() if (bits := linear_bits(module))}
    about = {
        "tsqlora": version("tsqlora"),
        "model": _name(model),
        "bits": min(bits) if bits else None,
        "spread": devices_of(model),
        "task": request.task.name,
        "rows": len(request.dataset),
        "rows_hash": hash_of_some(request.dataset),
        "trusted_rows": request.trusted_rows,
        "trusted_hash": None if trusted is None else hash_of(trusted),
        "rule": asdict_of(rule),
        "look": scores.summary | {"epoch": 0, "step": 0},
        "cost": {} if look is None else {"look": asdict(look.cost)},
    }
    verdict = None if look is None else look.verdict
    saved = SavedLook(path, scores, {} if look is None else look.head, about, verdict, answers)

    def write() -> None:
        with parents_of(path), replacing(path) as folder:
            folder.mkdir()
            scores.save(folder / SCORES)
            write_tensors(folder / HEAD, saved.head)
            made = {} if verdict is None else {name: np.asarray(value) for name, value in asdict(verdict).items()}
            for name, arrays in ((JUDGE, made), (ANSWERS, answers)):
                if arrays:
                    write_tensors(folder / name, {key: torch.from_numpy(np.atleast_1d(x)) for key, x in arrays.items()})
            write_json(folder / ABOUT, about)

    distributed.once(write)
    return saved


def columns_of_rows(
    model: nn.Module,
    look: SavedLook,
    dataset: Dataset,
    collate: Collate,
    labels: np.ndarray,
    *,
    task: Task,
    rows: RowNames,
    compute: Compute,
) -> dict[str, np.ndarray]:
    """Return the columns of `SavedLook.of` for the rows of a data set with these labels, and the labels."""
    distributed.require_whole(model)
    answers = answers_of(task)
    if answers is None:
        raise UnsupportedError(
            f"a look applies only to rows with one label each, and the task is {task.name}; score all rows together: "
            "tsqlora score CONFIG"
        )
    judges, single = look.verdict is not None, task.reading.judges()
    last = look.scores.predictions["logits"].shape[1] - 1 if single else 0

    def usable(some: list[Any]) -> Batch:
        batch = collate(some)
        return {**batch, "labels": batch["labels"].clamp(0, last)} if single else batch

    forward, head = forward_pass(
        distributed.unwrapped(model), dataset, usable, task=task, compute=compute, rows=rows, mean=judges
    )
    logits, clamped = _logits(look, forward, head), forward.labels
    unseen = clamped != labels if single else np.zeros(len(clamped), np.bool_)
    columns = {"labels": np.where(unseen, UNSEEN, clamped) if single else clamped}
    columns["loss"] = task.loss(torch.from_numpy(logits), torch.from_numpy(clamped)).numpy()
    if look.verdict is not None:
        logits, wrong = look.verdict.of(judged_features(forward), clamped)
        columns |= {"wrong_probability": wrong} if look.verdict.evident else {}
    columns |= predictions(logits.astype(np.float32), clamped, answers)
    # A row that the look has seen gets the columns of the look, from fits without it.
    places = {name: j for j, name in enumerate(look.scores.hashes or ())}
    both = [(j, places[name]) for j, name in enumerate(rows.hashes or ()) if name in places]
    here, there = np.array(both, dtype=np.int64).reshape(-1, 2).T
    own: Mapping[str, np.ndarray] = {"loss": look.scores.terms["loss"], **look.scores.predictions}
    for name in columns.keys() & own.keys():
        columns[name][here] = own[name][there]
    for name in columns.keys() & {"loss", "label_probability", "wrong_probability"} if unseen.any() else ():
        columns[name][unseen] = np.nan
    doubt = 1.0 if look.verdict is None else look.verdict.doubt[clamped]
    wrong = columns.get("wrong_probability", np.zeros(len(clamped))) > doubt
    columns["reason"] = np.select([unseen, wrong], ["unseen class", "confident negative"], "kept")
    return columns


def _logits(look: SavedLook, forward: Forward, head: Head | None) -> np.ndarray:
    """Logits with the head of the look; the model's own where the look kept it."""

    def taken(values: np.ndarray | None) -> Tensor:
        assert values is not None, "the pass takes what the head reads"
        return torch.from_numpy(values).float()

    def outputs(layer: str, inputs: Tensor) -> Tensor:
        return linear(inputs, look.head[f"{layer}.weight"], look.head.get(f"{layer}.bias"))

    if not look.head:
        return taken(forward.logits).numpy()
    assert head is not None
    last, features = plain_name(head.name), taken(forward.features)
    for dense in {name.rpartition(".")[0] for name in look.head} - {last}:
        features = ACTIVATIONS[head.activation](outputs(dense, taken(forward.dense)))
    return outputs(last, features).numpy()


def scores_of_rows(columns: Mapping[str, np.ndarray], look: SavedLook, rows: RowNames, *, task: Task) -> Scores:
    """Return scores of the rows: even draws without those that the judge calls wrong.

    Raises SettingsError for a rule with weights, which standardise terms over all rows.
    """
    if look.rule.weights is not None:
        raise SettingsError(
            f"the look in {look.path} draws by Q, which compares all rows with each other; take one without "
            "quality.preset, or score all rows together: tsqlora score CONFIG"
        )
    reasons, loss = columns["reason"], columns["loss"].astype(np.float64)
    scores = from_terms(
        {"loss": np.nan_to_num(loss)},
        labels=columns["labels"],
        stratified=task.reading.judges(),
        weights=look.rule.q,
        temperature=1.0,
        even=True,
        record={
            **rows.about,
            "noise": look.summary["noise"],
            "out_of_sample": True,
            "answers": look.scores.record.answers,
            "look_folder": str(look.path),
            "missing": MISSING,
        },
        hashes=rows.hashes,
        ids=rows.ids,
        predictions={name: columns[name] for name in PREDICTIONS if name in columns},
    )
    for reason in sorted({*reasons.tolist()} - {"kept"}):
        scores = scores.drop(reasons == reason, reason, part=True)
    return replace(scores, terms={"loss": loss})


def require_free(path: Path) -> None:
    """Raise SettingsError if the folder of a look would replace something."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SettingsError(f"--out {path} is not empty; name another directory")


def devices_of(model: nn.Module) -> int:
    """Return the number of devices that a `device_map` has spread the model over; 1 without one."""
    maps = (getattr(module, "hf_device_map", None) for module in model.modules())
    return max((len({*where.values()}) for where in maps if where), default=1)


def _name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
