"""How scores came to be: what is written beside them, and read by drawing, reports and records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

JSON = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRecord:
    """How scores came to be.  A value that is None was not measured, or does not apply."""

    temperature: float
    effective_sample_size: float
    draw: Literal["even", "softmax"] = "softmax"
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of the terms in Q."""
    standardised_by_quartiles: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The classes of a term, where a few rows hold most of the spread."""
    without_spread: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The classes of a term, where all rows have one value."""
    dropped: Mapping[str, int] | None = None
    """Rows by reason."""

    seed: int | None = None
    scope: str | None = None
    """Whose gradients were taken."""
    eta: float | None = None
    """The step size of `loss_reduction`."""
    offsets: Sequence[float] | None = None
    """The calibration of the logits."""
    reference: Sequence[int] | None = None
    """Rows of the data set in the reference."""
    reference_rows: int | None = None
    reference_norm: float | None = None
    autocast: str | None = None

    look: int | None = None
    """Which look of the run, from 1."""
    epoch: int | None = None
    step: int | None = None
    head_start: JSON | None = None
    not_ready: str | None = None
    """Why the model is at chance, so that its gradients say nothing."""
    frozen: bool = False
    """Whether the features that predictions are made of have not learned the rows' labels."""
    out_of_sample: bool = False
    """Whether predictions are by a fit that has not seen the row."""
    trusted_rows: int | None = None
    noise: JSON | None = None
    """Wrong labels: how many, and whether they are evident."""
    gate: JSON | None = None
    guard: JSON | None = None
    """Whether Q's draw was compared with a random one, and what came of it."""

    data: str | None = None
    """The file or hub id of the rows."""
    columns: Mapping[str, str | None] | None = None
    classes: Sequence[Any] | None = None
    """The names of the labels' numbers."""
    format: str | None = None
    """How prompts and targets are made of the rows."""
    hints: JSON = field(default_factory=dict)
    """How the file is written: delimiter, encoding."""
    held_out: int = 0
    """Rows that were held out for validation, and not scored."""

    about: JSON = field(default_factory=dict)
    """What else the caller, or another version, had to say."""

    @classmethod
    def of(cls, values: JSON) -> "ScoreRecord":
        """The record of these values by their names.  Raises TypeError where one that drawing reads is missing."""
        names = {field.name for field in fields(cls)} - {"about"}
        about = {name: value for name, value in values.items() if name not in names}
        return cls(**{name: value for name, value in values.items() if name in names}, about=about)

    def to_dict(self) -> dict[str, Any]:
        """The values by their names, those of `about` among them, without what is None."""
        known = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "about"}
        return {**self.about, **{name: value for name, value in known.items() if value is not None}}
