"""Which columns hold the text, its pair and the label."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tsqlora.errors import DataError, nearest

USUAL_TEXT = (
    "text",
    "sentence",
    "sentence1",
    "premise",
    "question",
    "question1",
    "content",
    "review",
    "document",
)

# A pair is taken only beside its usual partner: a lone "answer" may be anything.
# "sentence" with "question" is QNLI, where either alone says nothing about the label.
USUAL_PAIR = {
    "text": "text_pair",
    "sentence": "question",
    "sentence1": "sentence2",
    "premise": "hypothesis",
    "question": "answer",
    "question1": "question2",
}

USUAL_LABEL = ("label", "labels", "target", "class", "category", "score")


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns that are used; None where there is none."""

    text: str
    text_pair: str | None
    label: str | None


def find_columns(
    names: Sequence[str],
    *,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    source: str,
) -> Columns:
    """The columns as named, else the first of the usual names that is there.

    A pair is looked for only where `text` was not named: naming the text alone means one text.
    Raises DataError for a named column that is missing or named twice, and where no text is found.

    >>> find_columns(["premise", "hypothesis"], text=None, text_pair=None, label=None, source="a.csv")
    Columns(text='premise', text_pair='hypothesis', label=None)
    >>> find_columns(["Id", "Text", "Label"], text=None, text_pair=None, label=None, source="b.csv")
    Columns(text='Text', text_pair=None, label='Label')
    """
    named = {"data.text": text, "data.text_pair": text_pair, "data.label": label}
    check_named(named, names, source)
    found_text = text or _find_text(_without(names, text_pair, label), source)
    if text is None and text_pair is None:
        text_pair = _first((USUAL_PAIR.get(found_text.lower(), ""),), _without(names, label))
    label = label or _first(USUAL_LABEL, _without(names, found_text, text_pair))
    return Columns(found_text, text_pair, label)


def check_named(settings: Mapping[str, str | None], names: Sequence[str], source: str) -> None:
    """Raises DataError for a setting that names a column which is missing, or which another names too."""
    named = {key: name for key, name in settings.items() if name is not None}
    for key, name in named.items():
        if name not in names:
            raise DataError(f"{source} has no column '{name}', which {key} names; {nearest(name, names)}")
        others = [other for other in named if other != key and named[other] == name]
        if others:
            raise DataError(f"{key} and {others[0]} both name column '{name}' of {source}; name two")


def _find_text(names: Sequence[str], source: str) -> str:
    found = _first(USUAL_TEXT, names)
    if found is None:
        raise DataError(f"no text column in {source}; set data.text to one of its columns: {', '.join(names)}")
    return found


def _first(usual: Sequence[str], names: Collection[str]) -> str | None:
    """The first usual name that is there; "Text" is as good as "text" where there is no "text"."""
    spelled = {name.lower(): name for name in reversed([*names])} | {name: name for name in names}
    return next((spelled[name] for name in usual if name in spelled), None)


def _without(names: Sequence[str], *taken: str | None) -> list[str]:
    return [name for name in names if name not in taken]
