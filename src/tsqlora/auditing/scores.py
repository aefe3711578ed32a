"""Scores: terms, quality and probability of every row, as an immutable value and a Parquet file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora.errors import DataError, SettingsError, TsqLoraError, nearest
from tsqlora.files import plain_value, reading, replacing
from tsqlora.model.terms import quality, standardise
from tsqlora.sampling import effective_sample_size, probabilities

_METADATA = b"tsqlora"
_ROW_GROUP = 1 << 15
_NOT_TERMS = ("id", "hash", "label", "quality", "probability", "reason")
JSON = Mapping[str, Any]

WHY = {
    "kept": "kept, may be drawn",
    "duplicate": "near-duplicate of another row",
    "outlier": "gradient far larger than is usual in its class",
    "confident negative": "likely wrong label",
    "trusted row": "same input as a trusted row, which is trained on instead",
    "swapped pair": "the rejected answer is the better one, by how most pairs differ",
    "foreign answer": "the answer belongs to another prompt",
    "cut answer": "the answer stops in the middle",
    "unfit answer": "the answer looks like those with a planted fault",
    "unseen class": "its label is no class of the look",
    "held out": "held out until the question whether the pool contradicts the trusted rows",
}
"""Why a row is kept (the first) or dropped, each in plain words."""
REASONS = tuple(WHY)
"""`Scores.reasons` holds indices into this table."""
PREDICTIONS = ("predicted", "predicted_probability", "label_probability", "logits", "wrong_probability")
"""Predicted class, labels (k of 0 and 1) or number; for classes its probability and the label's; for classes and labels
k logits; where wrong classes are evident, the probability that the label is wrong. They come from a fit without the row
where the record has `out_of_sample`, else from the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRecord:
    """How scores were made.  None means not measured or not applicable."""

    temperature: float
    effective_sample_size: float
    draw: Literal["even", "softmax"] = "softmax"
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of the terms in Q."""

    seed: int | None = None
    eta: float | None = None
    """Step size of `loss_reduction`."""
    offsets: Sequence[float] | None = None
    """Calibration of the logits."""
    reference: Sequence[int] | None = None
    """Rows of the data set in the reference."""
    reference_rows: int | None = None
    reference_norm: float | None = None
    autocast: str | None = None

    look: int | None = None
    """Number of the look in the run, from 1."""
    epoch: int | None = None
    step: int | None = None
    head_start: JSON | None = None
    not_ready: str | None = None
    """Why the model is at chance, so that its gradients carry no information."""
    out_of_sample: bool = False
    """Whether predictions come from fits without the row."""
    trusted_rows: int | None = None
    noise: JSON | None = None
    """Wrong labels: their rate, and whether they are evident."""
    gate: JSON | None = None
    answers: JSON | None = None
    """Of texts: which faults can be found in their answers, how many are, and which are evident."""

    data: str | None = None
    """File or hub id of the rows."""
    columns: Mapping[str, Any] | None = None
    classes: Sequence[Any] | None = None
    """Class names by number."""
    format: str | None = None
    """How prompts and targets are made from the rows."""
    hints: JSON = field(default_factory=dict)
    """Delimiter and encoding of the file."""
    held_out: int = 0
    """Rows held out for validation and not scored."""

    about: JSON = field(default_factory=dict)
    """Other values, from the caller or another version."""

    @classmethod
    def of(cls, values: JSON) -> "ScoreRecord":
        """Build the record from values by name.  Raises TypeError without temperature or effective_sample_size."""
        names = {field.name for field in fields(cls)} - {"about"}
        about = {name: value for name, value in values.items() if name not in names}
        return cls(**{name: value for name, value in values.items() if name in names}, about=about)

    def to_dict(self) -> dict[str, Any]:
        """Return the values by name, including those in `about`, without None."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "about"}
        return {**self.about, **{name: value for name, value in own.items() if value is not None}}


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Terms, quality and probability of every row, in the data set's order.

    A dropped row keeps its terms and quality; its probability is 0 and it is never drawn.
    """

    terms: Mapping[str, np.ndarray]
    labels: np.ndarray
    """Class ids, n × k of 0 and 1, or numbers; for text and tags the number of tokens with a target."""
    quality: np.ndarray
    probability: np.ndarray
    stratified: bool
    record: ScoreRecord
    hashes: tuple[str, ...] | None = None
    ids: np.ndarray | None = None
    """Row numbers in the file; None where they equal the positions here."""
    reasons: np.ndarray | None = None
    """Indices into REASONS; None where every row is kept."""
    predictions: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Columns of PREDICTIONS, where available."""

    def __len__(self) -> int:
        return len(self.quality)

    @property
    def temperature(self) -> float:
        return float(self.record.temperature)

    @property
    def even(self) -> bool:
        """Whether kept rows are drawn equally often; else by softmax(Q/τ)."""
        return self.record.draw == "even"

    @property
    def caution(self) -> str | None:
        """Why a draw by Q may do harm: wrong labels are evident, and they have large losses and gradients."""
        if self.even or not (self.record.noise or {}).get("evident"):
            return None
        return (
            "some labels are evidently wrong, and a draw by Q may prefer those that were not left out; compare with "
            "even draws: remove quality.preset"
        )

    @property
    def strata(self) -> np.ndarray | None:
        """The label of each row where draws are stratified by label."""
        return self.labels.astype(np.int64) if self.stratified else None

    @property
    def row_ids(self) -> np.ndarray:
        """The number of each row in its file."""
        return np.arange(len(self)) if self.ids is None else self.ids

    @property
    def reason_codes(self) -> np.ndarray:
        """The index into REASONS of each row."""
        return np.zeros(len(self), dtype=np.int8) if self.reasons is None else self.reasons

    @property
    def kept(self) -> np.ndarray:
        """Whether each row may be drawn."""
        return self.reason_codes == 0

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped rows by reason."""
        return {REASONS[code]: n for code, n in enumerate(np.bincount(self.reason_codes).tolist()) if code and n}

    @property
    def summary(self) -> dict[str, Any]:
        """The look in the record of a run, and in its folder."""
        names = ("epoch", "step", "head_start", "noise", "gate", "not_ready")
        counts = {"rows": len(self), "kept": int(self.kept.sum())}
        counts |= {"held_out": n} if (n := self.dropped.get("held out")) else {}
        return {name: getattr(self.record, name) for name in names} | counts

    def left_out_as(self, reason: str) -> np.ndarray:
        """Whether each row is dropped for this reason."""
        return self.reason_codes == REASONS.index(reason)

    def drop(self, rows: np.ndarray, reason: str, *, part: bool = False) -> "Scores":
        """Return the scores with these rows (a mask) dropped; rows that were dropped before keep their reason.

        Raises SettingsError for a reason that is not in REASONS, TsqLoraError where no row is left, unless they are a
        part of more.
        """
        if reason not in REASONS[1:]:
            raise SettingsError(f"unknown reason '{reason}'; {nearest(reason, REASONS[1:])}")
        reasons = self.reason_codes.copy()
        reasons[rows & (reasons == 0)] = REASONS.index(reason)
        if not (reasons == 0).any():
            if part:
                return replace(self, reasons=reasons, probability=np.zeros(len(self)))
            raise TsqLoraError(f"all {len(self)} rows are dropped, the last as '{reason}'; drop fewer kinds of rows")
        return replace(self, reasons=reasons)._with_probabilities()

    def judged_as(self, first: "Scores") -> "Scores":
        """Return these terms and this Q, with the predictions, the verdicts and the dropped rows of earlier scores."""
        renewed = replace(self, predictions=first.predictions, reasons=first.reasons)
        return renewed.noted(noise=first.record.noise, gate=first.record.gate)._with_probabilities()

    def noted(self, **values: Any) -> "Scores":
        """Return the scores with these values in the record."""
        return replace(self, record=replace(self.record, **values))

    def _with_probabilities(self) -> "Scores":
        logits = np.where(self.kept, 0.0 if self.even else self.quality, -np.inf)
        p = probabilities(logits, temperature=self.temperature)
        record = replace(self.record, effective_sample_size=effective_sample_size(p))
        return replace(self, probability=p, record=record)

    def save(self, path: str | Path) -> None:
        """Write one row per sample: id, hash, label, terms, predictions, quality, probability, reason."""
        columns: dict[str, Any] = {"id": self.row_ids}
        if self.hashes is not None:
            columns["hash"] = list(self.hashes)
        columns |= {
            "label": _column(self.labels),
            **{name: _column(values) for name, values in {**self.terms, **self.predictions}.items()},
            "quality": self.quality,
            "probability": self.probability,
            "reason": pa.DictionaryArray.from_arrays(self.reason_codes, pa.array(REASONS)),
        }
        record = {"stratified": self.stratified, **self.record.to_dict()}
        metadata = {_METADATA: json.dumps(record, allow_nan=False, default=plain_value).encode()}
        with replacing(Path(path)) as unfinished:
            pq.write_table(pa.table(columns).replace_schema_metadata(metadata), unfinished, row_group_size=_ROW_GROUP)

    @classmethod
    def load(cls, path: str | Path, *, columns: Sequence[str] = ()) -> "Scores":
        """Read a file that `save` wrote; of `columns`, if any, these and label, quality and probability alone.

        Raises DataError naming the file and the problem.
        """
        reading(path)
        some = [*columns, "label", "quality", "probability"] if columns else None
        try:
            table = pq.read_table(path, columns=some)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; `tsqlora score` writes one") from None
        except pa.ArrowException as error:
            raise DataError(f"{path}: not a Parquet file ({error})") from None
        metadata = (table.schema.metadata or {}).get(_METADATA)
        if metadata is None or {"label", "quality", "probability"} - set(table.column_names):
            raise DataError(f"{path}: not a file of scores; `tsqlora score` writes one")
        try:
            record = json.loads(metadata)
            stratified, record = bool(record.pop("stratified")), ScoreRecord.of(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: the record of the scores is damaged ({error}); score again") from None
        values = {name: _numbers(table[name]) for name in table.column_names if name not in ("hash", "reason")}
        return cls(
            terms={name: column for name, column in values.items() if name not in (*_NOT_TERMS, *PREDICTIONS)},
            labels=values["label"],
            quality=values["quality"],
            probability=values["probability"],
            stratified=stratified,
            record=record,
            hashes=tuple(table["hash"].to_pylist()) if "hash" in table.column_names else None,
            ids=values.get("id"),
            reasons=reasons_of(table, path) if "reason" in table.column_names else None,
            predictions={name: values[name] for name in PREDICTIONS if name in values},
        )


def _column(values: np.ndarray) -> Any:
    """Return a matrix as a Parquet column of lists, numbers with null for nan."""
    if values.ndim == 1:
        return pa.array(values, from_pandas=True)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Invert `_column`."""
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy()
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), column.type.list_size)


def written_elsewhere(path: Path) -> bool:
    """Return whether this is a Parquet file with a column `reason` that another program wrote."""
    reading(path)
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError):
        return False  # `Scores.load` says why
    return "reason" in schema.names and _METADATA not in (schema.metadata or {})


def reasons_of(table: pa.Table, path: str | Path) -> np.ndarray:
    """Return indices into REASONS, whatever order of reasons the file has."""
    column = table["reason"].cast(pa.string()).combine_chunks().dictionary_encode()  # only reasons that a row has
    names = column.dictionary.to_pylist()
    if unknown := set(names) - set(REASONS):
        raise DataError(f"{path}: unknown reason '{unknown.pop()}'; score again ({', '.join(REASONS)})")
    return np.array([REASONS.index(name) for name in names], dtype=np.int8)[column.indices.to_numpy()]


def from_terms(
    terms: Mapping[str, np.ndarray],
    *,
    labels: np.ndarray,
    stratified: bool,
    weights: Mapping[str, float],
    temperature: float,
    even: bool = False,
    record: Mapping[str, Any],
    hashes: Sequence[str] | None = None,
    ids: np.ndarray | None = None,
    predictions: Mapping[str, np.ndarray] | None = None,
) -> Scores:
    """Standardise measured terms, sum them to Q, and compute probabilities (docs/method.md eq. 4 and 5).

    Terms are standardised within each class where `stratified`. Weights are finite, as in ScoringRule. Raises
    SettingsError for a weight whose term was not measured, TsqLoraError naming the first row with a value that is not
    finite.
    """
    require_row_names(len(labels), hashes=hashes, ids=ids)
    used = {name: weight for name, weight in weights.items() if weight}
    for name in used:
        if name not in terms:
            raise SettingsError(f"'{name}' has a weight and was not measured; {nearest(name, terms)}")
    for name, values in terms.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            row = bad[0] if ids is None else ids[bad[0]]
            raise TsqLoraError(
                f"{name} of row {row} is {values[bad[0]]} ({len(bad)} rows are not finite); "
                "score in float32, or lower training.learning_rate"
            )
    groups = labels.astype(np.int64) if stratified else np.zeros(len(labels), dtype=np.int64)
    standardised = {name: standardise(terms[name], groups) for name in used}
    how = {
        "draw": "even" if even else "softmax",
        "weights": dict(weights),
        "temperature": temperature,
        "effective_sample_size": float(len(labels)),
    }
    return Scores(
        terms=terms,
        labels=labels,
        quality=quality(standardised, used) if used else np.zeros(len(labels)),
        probability=np.empty(0),
        stratified=stratified,
        record=ScoreRecord.of({**record, **how}),
        hashes=None if hashes is None else tuple(hashes),
        ids=ids,
        predictions=dict(predictions or {}),
    )._with_probabilities()


def require_row_names(rows: int, *, hashes: Sequence[str] | None, ids: np.ndarray | None) -> None:
    """Raise SettingsError for a wrong number of hashes or ids."""
    for name, values in (("hashes", hashes), ("ids", ids)):
        if values is not None and len(values) != rows:
            raise SettingsError(f"there are {len(values)} {name} for {rows} rows")
