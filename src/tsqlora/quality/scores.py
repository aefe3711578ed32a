"""Scores: what is known of every sample, as one immutable value that is a Parquet file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora.errors import DataError, SettingsError, TsqLoraError, nearest
from tsqlora.files import replacing
from tsqlora.quality.sampling import effective_sample_size, probabilities, require_temperature
from tsqlora.quality.score_record import ScoreRecord
from tsqlora.quality.terms import quality, standardise

_METADATA = b"tsqlora"
_ROW_GROUP = 1 << 15
"""Rows that are encoded, in memory, at a time."""
_OWN = ("id", "hash", "label", "quality", "probability", "reason")

REASONS = ("kept", "duplicate", "outlier", "confident negative", "gated", "trusted row")
"""Why a row is drawn from or dropped; `Scores.reasons` holds places in this table."""

PREDICTIONS = ("predicted", "predicted_probability", "label_probability", "logits")
"""What is predicted for a row, by a fit that has not seen it where the record says `out_of_sample`, else by the model:
class or number; for classes its probability, the label's, and k logits."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Terms, quality and probability of every row, in the data set's order.

    A dropped row keeps its terms and quality; its probability is 0, and it is never drawn.
    """

    terms: Mapping[str, np.ndarray]
    labels: np.ndarray
    """Class ids or numbers; of generated text how many tokens the target has."""
    quality: np.ndarray
    probability: np.ndarray
    stratified: bool
    record: ScoreRecord
    hashes: tuple[str, ...] | None = None
    ids: np.ndarray | None = None
    """The place of each row in the file that was read; None where that is its place here."""
    reasons: np.ndarray | None = None
    """Places in REASONS; None where every row is kept."""
    predictions: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Those of PREDICTIONS that are known."""

    def __len__(self) -> int:
        return len(self.quality)

    @property
    def temperature(self) -> float:
        return float(self.record.temperature)

    @property
    def even(self) -> bool:
        """Whether kept rows are drawn equally often, whatever their quality; else by softmax(Q/τ)."""
        return self.record.draw == "even"

    @property
    def strata(self) -> np.ndarray | None:
        """The label of each row where a draw is stratified by it."""
        return self.labels.astype(np.int64) if self.stratified else None

    @property
    def kept(self) -> np.ndarray:
        """Whether each row may be drawn."""
        return np.ones(len(self), dtype=np.bool_) if self.reasons is None else self.reasons == 0

    def left_out_as(self, reason: str) -> np.ndarray:
        """Whether each row is left out for this reason."""
        return np.zeros(len(self), dtype=np.bool_) if self.reasons is None else self.reasons == REASONS.index(reason)

    def drop(self, rows: np.ndarray, reason: str) -> "Scores":
        """The same without these rows (a mask); what was dropped before keeps its reason.

        Raises SettingsError for a reason that is not in REASONS, TsqLoraError where no row is left.
        """
        if reason not in REASONS[1:]:
            raise SettingsError(f"unknown reason '{reason}'; {nearest(reason, REASONS[1:])}")
        reasons = np.zeros(len(self), dtype=np.int8) if self.reasons is None else self.reasons.copy()
        reasons[rows & (reasons == 0)] = REASONS.index(reason)
        if not (reasons == 0).any():
            raise TsqLoraError(f"all {len(self)} rows are dropped, the last as '{reason}'; drop fewer kinds of rows")
        p = _probabilities(self.quality, reasons == 0, even=self.even, temperature=self.temperature)
        dropped = {name: int((reasons == code).sum()) for code, name in enumerate(REASONS) if code}
        record = replace(self.record, effective_sample_size=effective_sample_size(p), dropped=dropped)
        return replace(self, reasons=reasons, probability=p, record=record)

    def drawn_evenly(self) -> "Scores":
        """The same, of whose kept rows each is drawn as often, whatever its quality."""
        p = _probabilities(self.quality, self.kept, even=True, temperature=self.temperature)
        record = replace(self.record, draw="even", effective_sample_size=effective_sample_size(p))
        return replace(self, probability=p, record=record)

    def save(self, path: str | Path) -> None:
        """One row a sample: id, hash, label, terms, predictions, quality, probability, reason."""
        columns: dict[str, Any] = {"id": np.arange(len(self)) if self.ids is None else self.ids}
        if self.hashes is not None:
            columns["hash"] = list(self.hashes)
        columns |= {
            "label": self.labels,
            **self.terms,
            **{name: _column(values) for name, values in self.predictions.items()},
            "quality": self.quality,
            "probability": self.probability,
            "reason": pa.DictionaryArray.from_arrays(_codes(self), pa.array(REASONS)),
        }
        about = {"stratified": self.stratified, **self.record.to_dict()}
        metadata = {_METADATA: json.dumps(about, allow_nan=False, default=_plain).encode()}
        with replacing(Path(path)) as unfinished:
            pq.write_table(pa.table(columns).replace_schema_metadata(metadata), unfinished, row_group_size=_ROW_GROUP)

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Reads what `save` wrote.  Raises DataError naming the file and what is wrong with it."""
        try:
            table = pq.read_table(path)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; `tsqlora score` writes one") from None
        except pa.ArrowException as error:
            raise DataError(f"{path}: not a Parquet file ({error})") from None
        metadata = (table.schema.metadata or {}).get(_METADATA)
        missing = {"label", "quality", "probability"} - set(table.column_names)
        if metadata is None or missing:
            raise DataError(f"{path}: not a file of scores; `tsqlora score` writes one")
        record = _record_of(metadata, path)
        columns = {name: _numbers(table[name]) for name in table.column_names if name not in ("hash", "reason")}
        return cls(
            terms={name: values for name, values in columns.items() if name not in (*_OWN, *PREDICTIONS)},
            labels=columns["label"],
            quality=columns["quality"],
            probability=columns["probability"],
            stratified=bool(record.pop("stratified")),
            record=ScoreRecord.of(record),
            hashes=tuple(table["hash"].to_pylist()) if "hash" in table.column_names else None,
            ids=columns.get("id"),
            reasons=_reasons(table, path) if "reason" in table.column_names else None,
            predictions={name: columns[name] for name in PREDICTIONS if name in columns},
        )


def _record_of(metadata: bytes, path: str | Path) -> dict[str, Any]:
    """The scores' record, with all that drawing reads.  Raises DataError naming the file."""
    try:
        record = json.loads(metadata)
    except ValueError as error:
        raise DataError(f"{path}: its record is damaged ({error}); score again") from None
    needed = {"stratified", "temperature", "effective_sample_size"}
    if not isinstance(record, dict) or (missing := sorted(needed - record.keys())):
        what = "is no mapping" if not isinstance(record, dict) else f"lacks {', '.join(missing)}"
        raise DataError(f"{path}: its record {what}; score again")
    return record


def _column(values: np.ndarray) -> Any:
    """Numbers as Parquet takes them: of a matrix a list a row."""
    return values if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """What `_column` was made of."""
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy()
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), column.type.list_size)


def _codes(scores: Scores) -> np.ndarray:
    return np.zeros(len(scores), dtype=np.int8) if scores.reasons is None else scores.reasons


def _reasons(table: pa.Table, path: str | Path) -> np.ndarray:
    """Places in REASONS, whatever table the file's own writer numbered them by."""
    written = table["reason"].combine_chunks().dictionary_encode()
    names = written.dictionary.to_pylist()
    if unknown := set(names) - set(REASONS):
        raise DataError(f"{path}: the reason '{unknown.pop()}' is none of {', '.join(REASONS)}; score anew")
    return np.array([REASONS.index(name) for name in names], dtype=np.int8)[written.indices.to_numpy()]


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
    """Standardise, add up, and make probabilities of measured terms (METHOD eq. 4 and 5).

    Standardised within the class where `stratified`.  Raises SettingsError for a weight that is
    not finite or whose term was not measured, TsqLoraError naming the first row with a value that is not finite.
    """
    require_temperature(temperature)
    for name, weight in weights.items():
        if not np.isfinite(weight):
            raise SettingsError(f"the weight of '{name}' is {weight}; it must be a finite number")
    require_names(len(labels), hashes=hashes, ids=ids)
    if unknown := [name for name, weight in weights.items() if weight and name not in terms]:
        raise SettingsError(f"'{unknown[0]}' has a weight and was not measured; {nearest(unknown[0], terms)}")
    for name, values in terms.items():
        _require_finite(name, values, ids)
    groups = labels.astype(np.int64) if stratified else np.zeros(len(labels), dtype=np.int64)
    standardised = {name: standardise(terms[name], groups) for name, weight in weights.items() if weight}
    total = np.zeros(len(labels))
    if standardised:
        total = quality({name: s.values for name, s in standardised.items()}, weights)
    p = _probabilities(total, np.ones(len(labels), dtype=np.bool_), even=even, temperature=temperature)
    return Scores(
        terms=terms,
        labels=labels,
        quality=total,
        probability=p,
        stratified=stratified,
        record=ScoreRecord.of(
            {
                **record,
                "draw": "even" if even else "softmax",
                "weights": dict(weights),
                "temperature": temperature,
                "effective_sample_size": effective_sample_size(p),
                "standardised_by_quartiles": {n: list(s.by_range) for n, s in standardised.items() if s.by_range},
                "without_spread": {n: list(s.flat) for n, s in standardised.items() if s.flat},
            }
        ),
        hashes=None if hashes is None else tuple(hashes),
        ids=ids,
        predictions=dict(predictions or {}),
    )


def _probabilities(quality: np.ndarray, kept: np.ndarray, *, even: bool, temperature: float) -> np.ndarray:
    """Of one draw; 0 for rows that are not kept."""
    return probabilities(np.where(kept, 0.0 if even else quality, -np.inf), temperature=temperature)


def require_names(rows: int, *, hashes: Sequence[str] | None, ids: np.ndarray | None) -> None:
    """Raises SettingsError for hashes or ids of another number of rows."""
    if hashes is not None and len(hashes) != rows:
        raise SettingsError(f"there are {len(hashes)} hashes for {rows} rows")
    if ids is not None and len(ids) != rows:
        raise SettingsError(f"there are {len(ids)} ids for {rows} rows")


def _require_finite(name: str, values: np.ndarray, ids: np.ndarray | None) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        row = bad[0] if ids is None else ids[bad[0]]
        raise TsqLoraError(
            f"{name} of row {row} is {values[bad[0]]} ({len(bad)} rows in all are not finite); "
            "score in float32, or lower training.learning_rate"
        )


def _plain(value: Any) -> Any:
    """numpy's scalars and arrays as JSON has them."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} of the scores' record is no JSON value")
