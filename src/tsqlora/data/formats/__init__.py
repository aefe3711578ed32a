"""Row formats for models that write: which one a file has, and how its rows are read."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tsqlora.data.columns import Columns, check_named
from tsqlora.data.formats.chats import read_messages, read_sharegpt
from tsqlora.data.formats.example import Chat, Example, Manner
from tsqlora.data.formats.texts import read_alpaca, read_document, read_prompt, read_text
from tsqlora.data.rows import Rows
from tsqlora.errors import DataError, SettingsError, nearest


@dataclass(frozen=True, slots=True)
class Kind:
    """A row format: how a row is read, and the names that its columns usually have.

    Args:
        read: row i of some rows, by these columns, for a model of this manner.
        usual: pairs of prompt and target; the target is None where one column holds both.
        further: names of a second part of the prompt, of which one may be there.
        setting: which setting names the column, where one holds both.
    """

    read: Callable[[Rows, int, Columns, Manner], Example | Chat]
    usual: tuple[tuple[str, str | None], ...]
    further: tuple[str, ...] = ()
    setting: str = "data.prompt"

    @property
    def whole(self) -> bool:
        """Whether one column holds prompt and target."""
        return self.setting != "data.prompt"


# In the order in which they are looked for: a file of chats may have their text in one piece beside them.
FORMATS: dict[str, Kind] = {
    "messages": Kind(read_messages, (("messages", None),), setting="data.messages"),
    "sharegpt": Kind(read_sharegpt, (("conversations", None), ("conversation", None)), setting="data.messages"),
    "alpaca": Kind(read_alpaca, (("instruction", "output"), ("instruction", "response")), further=("input", "context")),
    "prompt": Kind(
        read_prompt,
        (
            ("prompt", "completion"),
            ("prompt", "response"),
            ("prompt", "target"),
            ("question", "answer"),
            ("input", "output"),
            ("input", "target"),
        ),
    ),
    "document": Kind(
        read_document,
        (
            ("document", "summary"),
            ("article", "highlights"),
            ("article", "summary"),
            ("article", "abstract"),
            ("dialogue", "summary"),
            ("text", "summary"),
            ("text", "target"),
            ("source", "target"),
        ),
    ),
    "text": Kind(read_text, (("text", None), ("content", None)), setting="data.text"),
}


@dataclass(frozen=True, slots=True)
class Format:
    """The format of a file: its name in FORMATS, and its columns.

    `columns.text` is the prompt's (or what holds all), `text_pair` that of its second part,
    `label` the target's: so rows have the names by which `row_hash` finds them.
    """

    name: str
    columns: Columns

    def read(self, rows: Rows, i: int, manner: Manner) -> Example | Chat:
        """What row i says."""
        return FORMATS[self.name].read(rows, i, self.columns, manner)


def find_format(
    names: Sequence[str],
    *,
    source: str,
    format: str | None = None,
    prompt: str | None = None,
    target: str | None = None,
    messages: str | None = None,
    text: str | None = None,
) -> Format:
    """The format whose usual columns are there, the first of FORMATS; columns that are named win.

    Raises DataError for a named column that is missing and where no format is found, SettingsError
    for settings that contradict each other.

    >>> find_format(["document", "summary"], source="a.jsonl")
    Format(name='document', columns=Columns(text='document', text_pair=None, label='summary'))
    """
    named = {"data.prompt": prompt, "data.target": target, "data.messages": messages, "data.text": text}
    check_named(named, names, source)
    _check_together(format, {key for key, name in named.items() if name is not None})
    if whole := messages or text:
        return Format(
            format or _of_whole(whole, "data.messages" if messages else "data.text"), Columns(whole, None, None)
        )
    kinds = FORMATS if format is None else {format: FORMATS[format]}
    # A named column next to a usual one is as good as two usual ones, where those are not there.
    for both in (True, False):
        for name, kind in kinds.items():
            for pair in kind.usual:
                if _fits(pair, prompt, target, names, both=both):
                    return Format(name, _columns(kind, prompt or pair[0], target or pair[1], names))
    if prompt is None or target is None:
        beside = f" beside '{prompt or target}'" if prompt or target else ""
        wanted = "no known row format" if format is None else f"none of the usual columns of data.format {format}"
        raise DataError(
            f"{source} has {wanted}{beside}; name data.prompt and data.target, data.messages, or data.text; "
            f"columns: {', '.join(names)}"
        )
    name = format or "prompt"
    return Format(name, _columns(FORMATS[name], prompt, target, names))


def _fits(
    usual: tuple[str, str | None], prompt: str | None, target: str | None, names: Collection[str], *, both: bool
) -> bool:
    """Whether both columns are as usual, be they named or there; else whether one is, and the other was named."""
    first, second = usual
    if second is None:
        return both and not (prompt or target) and first in names
    if both:
        return (prompt or first) == first and (target or second) == second and {first, second} <= {*names}
    return (prompt is None) != (target is None) and (first if prompt is None else second) in names


def _columns(kind: Kind, prompt: str, target: str | None, names: Collection[str]) -> Columns:
    further = next((name for name in kind.further if name in names and name not in (prompt, target)), None)
    return Columns(prompt, further, target)


def _of_whole(column: str, setting: str) -> str:
    """The format of a column that holds all; its usual names tell messages from sharegpt."""
    fitting = [name for name, kind in FORMATS.items() if kind.setting == setting]
    return next((name for name in fitting if (column, None) in FORMATS[name].usual), fitting[0])


def _check_together(format: str | None, named: Collection[str]) -> None:
    if format is not None and format not in FORMATS:
        raise SettingsError(f"unknown data.format '{format}'; {nearest(format, FORMATS)}")
    whole = sorted({"data.messages", "data.text"} & set(named))
    if whole and len(named) > 1:
        raise SettingsError(f"{' and '.join(sorted(named))} are set, and {whole[0]} alone holds prompt and target")
    if format is None or not named:
        return
    wanted = {FORMATS[format].setting} if FORMATS[format].whole else {"data.prompt", "data.target"}
    if wrong := sorted(set(named) - wanted):
        raise SettingsError(f"{wrong[0]} does not go with data.format {format}; set {' and '.join(sorted(wanted))}")
