"""Which columns hold the text, its pair and the label."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from tsqlora.data.folders import ENDINGS
from tsqlora.errors import DataError, nearest

USUAL_TEXT = ("text", "sentence", "sentence1", "premise", "question", "question1", "content", "review", "document")

# A pair counts only beside its usual partner: a lone "answer" may be anything.
# "sentence" with "question" is QNLI, where neither alone decides the label.
USUAL_PAIR = {
    "text": "text_pair",
    "sentence": "question",
    "sentence1": "sentence2",
    "premise": "hypothesis",
    "question": "answer",
    "question1": "question2",
}

USUAL_TOKENS = ("tokens", "words")
USUAL_TAGS = ("tags", "ner_tags", "labels")
USUAL_PATHS = ("path", "file", "file_name", "filename", "file_path", "filepath")
USUAL_LABEL = ("label", "labels", "target", "class", "category", "score")


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns in use; None for one that the data lacks.

    `media` is "image" or "audio" where `text` is a column of paths; `system` holds the system prompts of texts to
    generate.
    """

    text: str
    text_pair: str | None
    label: str | None
    media: str | None = field(default=None, repr=False)
    system: str | None = field(default=None, repr=False)


def find_columns(
    names: Sequence[str],
    *,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    source: str,
    tokens: bool = False,
    media: str | None = None,
) -> Columns:
    """Choose the columns: those that settings name, else the first usual name in the file; of `tokens` with tags.

    With `media`, "image" or "audio", the text is a path.

    A pair is detected only if `text` is not set: setting the text alone means one text.
    Raises DataError for a column that is missing or serves twice, and if there is no text column.

    >>> find_columns(["premise", "hypothesis"], text=None, text_pair=None, label=None, source="a.csv")
    Columns(text='premise', text_pair='hypothesis', label=None)
    >>> find_columns(["Id", "Text", "Label"], text=None, text_pair=None, label=None, source="b.csv")
    Columns(text='Text', text_pair=None, label='Label')
    """
    text, text_pair, label = named_columns(
        {"data.text": text, "data.text_pair": text_pair, "data.label": label}, names, source
    )
    usual = (media, *USUAL_PATHS) if media else USUAL_TOKENS if tokens else USUAL_TEXT
    first_text = text or _first(usual, _without(names, text_pair, label))
    if first_text is None:
        what = f"column of {media} files" if media else "column of tokens" if tokens else "text column"
        other = next((kind for kind in ENDINGS if kind in names and kind != media), None)
        cure = f", or task.type to {other}-classification" if other else ""
        raise DataError(f"{source} has no {what}; set data.text to one of its columns: {quoted(names)}{cure}")
    if text is None and text_pair is None and not tokens and not media:
        text_pair = _first((USUAL_PAIR.get(first_text.lower(), ""),), _without(names, label))
    label = label or _first(USUAL_TAGS if tokens else USUAL_LABEL, _without(names, first_text, text_pair))
    return Columns(first_text, text_pair, label, media)


def named_columns(settings: Mapping[str, str | None], names: Sequence[str], source: str) -> list[str | None]:
    """The columns that settings name, as the file spells them.

    A column that differs in its case or in blanks around it serves, if it is the only one.
    Raises DataError for a setting that names a missing column, or the column of another setting.

    >>> named_columns({"data.text": "body", "data.label": None}, [" Body ", "label"], "a.csv")
    [' Body ', None]
    """
    used = dict[str, str]()
    for key, name in settings.items():
        if name is None:
            continue
        alike = [column for column in names if column.strip().lower() == name.strip().lower()]
        column = name if name in names or len(alike) != 1 else alike[0]
        if column not in names:
            raise DataError(f"{source} has no column '{name}', which {key} names; {nearest(name, names)}")
        other = next((other for other, taken in used.items() if taken == column), None)
        if other:
            raise DataError(f"{other} and {key} both name column '{column}' of {source}; name two columns")
        used[key] = column
    return [used.get(key) for key in settings]


def quoted(names: Collection[str]) -> str:
    """Names of columns for a message, in quotes: a name may have blanks around it, or be empty."""
    return ", ".join(f"'{name}'" for name in names if name.strip())


def _first(usual: Sequence[str], names: Collection[str]) -> str | None:
    """The first usual name among `names`; "Text" and " text " serve if there is no "text"."""
    spelled = {name.strip().lower(): name for name in reversed([*names])} | {name: name for name in names}
    return next((spelled[name] for name in usual if name in spelled), None)


def _without(names: Sequence[str], *taken: str | None) -> list[str]:
    return [name for name in names if name not in taken]
