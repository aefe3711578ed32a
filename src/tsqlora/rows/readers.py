"""Text files, spreadsheets and Parquet, read strictly: encoding and delimiter, then each row with its line."""

import codecs
import csv
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora.errors import DataError, first_line
from tsqlora.files import reading

DELIMITERS = ",;\t|"
"""Candidates for the delimiter of a CSV file; the first wins a tie."""

FALLBACK = "cp1252"
"""The encoding of a file that is not UTF-8: Windows in Western Europe.  charset-normalizer, which guesses, took
French in cp1252 for iso8859-10, and German for cp1250."""

TABLES = (".csv", ".tsv")
"""Formats without types: every cell is text."""
SHEETS = ".xlsx"

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_CURE = "save the file as UTF-8 text, not compressed; train and audit also take --set data.encoding=…"
_SNIFFED_LINES = 1000


@dataclass(frozen=True, slots=True)
class Hints:
    """Settings about text files; None means detect."""

    delimiter: str | None = None
    encoding: str | None = None
    quoting: str | None = None
    """"quoted" if quotes enclose fields, "literal" if they belong to the text."""
    sheet: str | None = None


SNIFF = Hints()


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a text file is written.

    Args:
        delimiter: None if the file has no columns.
        guessed: whether nothing proves the encoding.
        unused: the encoding of the hints, if the file is UTF-8 all the same.
        quoting: that of the hints; None if quotes enclose fields, as far as one can tell, else what `quoting_of` sees.
        skipped: lines before the header, such as Excel's "sep=;".
        sheet: of a spreadsheet; None if it has one alone.
    """

    encoding: str = "utf-8"
    delimiter: str | None = None
    guessed: bool = False
    unused: str | None = None
    quoting: str | None = None
    skipped: int = 0
    sheet: str | None = None

    def __str__(self) -> str:
        between = "" if self.delimiter is None else f"{self.delimiter!r} between columns, "
        return f"{between}{self.encoding.removesuffix('-sig')}"

    def note(self, name: str) -> str | None:
        """A warning if the encoding is a guess, or not that of the hints."""
        if self.unused is not None:
            return (
                f"{name} is UTF-8 and was read as such; data.encoding {self.unused} applies to other files; if its "
                "letters look wrong, save it as UTF-8 again"
            )
        if not self.guessed:
            return None
        return f"{name} is not UTF-8 and was read as {self.encoding}; if its letters look wrong, {_CURE}"

    def lines(self, path: Path, *, newline: str) -> Iterator[str]:
        """Each line with its line end, without those that are skipped.

        `newline` is "\\n" if lines end at line feeds alone, "" if they end at any of \\n, \\r and \\r\\n.
        Raises DataError if the file cannot be read, naming the line that does not decode.
        """
        try:
            with opened(path) as binary, io.TextIOWrapper(binary, encoding=self.encoding, newline=newline) as file:
                yield from islice(file, self.skipped, None)
        except UnicodeError as error:
            encoding = self.encoding.removesuffix("-sig").upper()
            what = f"is neither UTF-8 nor {encoding}" if self.guessed else f"is not {encoding}"
            if "UTF-16" not in encoding:  # its line feeds have two bytes
                with opened(path) as file:
                    for number, line in enumerate(file, start=1):
                        if (at := _broken_at(line, self.encoding)) is not None:
                            raise DataError(f"{path}:{number}: byte 0x{line[at]:02x} {what}; {_CURE}") from error
            raise DataError(f"{path} {what} ({error}); {_CURE}") from error


PLAIN = Dialect()
"""UTF-8 without columns; also for binary files."""


def sniff(path: Path, hints: Hints) -> Dialect:
    """Detect a text file's dialect; hints win over content, and a byte order mark over an encoding.

    Without mark and hint a file is UTF-8 if it decodes, else FALLBACK. A file whose lines beyond ASCII mostly decode
    as UTF-8 stays UTF-8: it is broken. With an encoding as hint a file that can only be UTF-8 stays UTF-8, since one
    hint counts for all files of a run. Raises DataError if the file cannot be read.
    """
    suffix, hint = suffix_of(path), hints.encoding
    if suffix == SHEETS:
        return Dialect(sheet=hints.sheet)
    with opened(path) as file:
        start = file.peek()
        marked = next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), None)
        # Text with one byte a letter has no zero byte: an archive is read as UTF-8, and refused there.
        is_open = not marked and b"\0" not in start
        # In UTF-8 no letter has the byte of a line feed.
        decode = [_broken_at(line, "utf-8") is None for line in file if not line.isascii()] if is_open else []
    guessed = hint is None and bool(decode) and sum(decode) <= len(decode) / 2
    unused = None
    if is_open and hint is not None and codecs.lookup(hint).name not in ("utf-8", "utf-8-sig"):
        # Text in ASCII is in most encodings; a whole file beyond it hardly decodes as UTF-8 by chance.
        unused = hint if all(decode) and (decode or "\n".encode(hint) != b"\n") else None
    encoding = marked or ("utf-8" if unused else hint) or (FALLBACK if guessed else "utf-8")
    if not marked and codecs.lookup(encoding).name == "utf-16":  # whose decoder wants a mark
        encoding = "utf-16-le"
    dialect = Dialect(encoding, guessed=guessed, unused=unused)
    if suffix not in TABLES:
        return dialect
    lines = list[str]()
    with suppress(DataError):  # of a line that does not decode: reading the rows raises it, with its number
        for line in islice(dialect.lines(path, newline=""), _SNIFFED_LINES):
            lines.append(line)
    if lines and (named := re.fullmatch(r'"?sep=(.)"?\r?\n', lines[0], re.IGNORECASE)):  # Excel's own first line
        return replace(dialect, delimiter=named[1], skipped=1, quoting=hints.quoting)
    delimiter = "\t" if suffix == ".tsv" else hints.delimiter or _delimiter(lines)
    return replace(dialect, delimiter=delimiter, quoting=hints.quoting)


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """A file's content, unpacked.  Raises DataError, also while it is read."""
    reading(path)
    packed = COMPRESSED.get(path.suffix.lower())
    try:
        stream: Any = None if packed is None else pa.input_stream(str(path), compression=packed)
        with open(path, "rb") if stream is None else io.BufferedReader(stream) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        if packed is None:
            raise DataError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
        raise DataError(f"cannot unpack {path} ({first_line(error)})") from error


def _broken_at(line: bytes, encoding: str) -> int | None:
    """The offset of the first byte that does not decode."""
    try:
        line.decode(encoding)
    except UnicodeError as error:
        return getattr(error, "start", 0)
    return None


def _delimiter(lines: Sequence[str]) -> str:
    """The candidate with which most records match the header.

    Not csv.Sniffer: an apostrophe in a text misleads it, and it ignores the header.
    """

    def agreeing(delimiter: str) -> int:
        """How many records have as many fields as the first one."""
        try:
            counts = [len(fields) for fields in csv.reader(lines, delimiter=delimiter) if fields]
        except csv.Error:
            return 0
        return sum(count == counts[0] for count in counts)

    header = next((line for line in lines if line.strip()), "")
    return max((delimiter for delimiter in DELIMITERS if delimiter in header), key=agreeing, default=",")


Records = Iterator[tuple[int | str, dict[str, Any]]]
"""Line or row numbers, or names of files, with rows."""


def read_json(path: Path, dialect: Dialect) -> Records:
    """Each line's number and object, without blank lines; or the elements of one array, which is read whole.

    A .json file may hold one array, or one object in which one key holds it. Raises DataError with file and line.
    """

    def lines() -> Iterator[tuple[int, str]]:
        # Not str.splitlines: it also splits at U+2028 and others that JSON allows inside a string.
        return ((n, one) for n, one in enumerate(dialect.lines(path, newline="\n"), start=1) if one.strip())

    def document() -> Any:
        return _parse("".join(dialect.lines(path, newline="\n")), path, 1)

    array = None
    if suffix_of(path) == ".json":
        first, *more = [line.strip() for _, line in islice(lines(), 2)] or [""]
        if first.startswith("["):
            array = document()
        elif first.startswith("{") and not (more and first.endswith("}")):
            with suppress(DataError):  # reading its lines names the broken one
                lists = [value for value in document().values() if isinstance(value, list) and value]
                objects = len(lists) == 1 and all(isinstance(one, dict) for one in lists[0])
                if objects and not any({"role", "from"} & {*one} for one in lists[0]):  # which are messages
                    array = lists[0]
    values = ((n, _parse(line.rstrip(), path, n)) for n, line in lines()) if array is None else enumerate(array, 1)
    for number, value in values:
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise DataError(
                f'{path}:{number}: a {kind} where a row must be an object like {{"text": "...", "label": 1}}'
            )
        yield number, value


def _parse(text: str, path: Path, line: int) -> Any:
    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"an object has the key {twice!r} twice")
        return row

    try:
        return json.loads(text, object_pairs_hook=each_once)
    except (ValueError, RecursionError) as exc:
        line += exc.lineno - 1 if isinstance(exc, json.JSONDecodeError) else 0
        raise DataError(f"{path}:{line}: not JSON ({exc}); write one object a line, or an array of them") from exc


@contextmanager
def parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file.  Raises DataError for other files, also while it is read."""
    reading(path)
    source: Any = path
    if path.suffix.lower() in COMPRESSED:
        with opened(path) as packed:
            source = io.BytesIO(packed.read())
    try:
        # Not pq.read_table: a parent directory named like "label=1" would add a column.
        with pq.ParquetFile(source) as file:
            _refuse_duplicates(file.schema_arrow.names, f"{path}")
            yield file
    except DataError:
        raise
    except Exception as exc:  # not Parquet, text that is not UTF-8, an impossible date, an unknown time zone …
        raise DataError(f"{path} cannot be read as Parquet ({first_line(exc)}); export it again") from exc


def read_delimited(path: Path, dialect: Dialect) -> Records:
    """Each record of a CSV or TSV file, or of a sheet, with the number of its first line; cells are text.

    Several columns may have no name if they are empty, as where a spreadsheet ends each line with ";;".
    In a file of one column a warning names a blank line between rows, which may be an empty cell.
    Raises DataError with file and line for broken quotes and for a wrong number of fields.
    """
    header, unnamed, gap, blank = list[str](), list[int](), 0, 0
    for number, fields in (sheet_records if suffix_of(path) == SHEETS else records)(path, dialect):
        if not fields:
            gap = number if header else 0
        elif not header:
            header = fields
            _refuse_duplicates([name for name in header if name], f"{path}:{number}")
            unnamed = [place for place, name in enumerate(header) if not name]
        elif len(fields) != len(header):
            error = BrokenQuotesError if any('"' in field for field in fields) else DataError
            raise error(
                f"{path}:{number}: {len(fields)} fields, but the header has {len(header)} ({', '.join(header)}); "
                'put a field that holds the separator in "..."'
            )
        elif len(unnamed) > 1 and any(fields[place] for place in unnamed):
            raise DataError(f"{path}:{number}: a value in one of {len(unnamed)} columns without a name; name them")
        else:
            blank = blank or gap
            yield number, dict(zip(header, fields, strict=True))
    if blank and len(header) == 1:
        warnings.warn(f'{path}:{blank}: a blank line is no row; write "" if it is an empty cell', stacklevel=2)


def records(path: Path, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    """Each record, header first: the number of its first line and its fields, none of a blank line.

    Raises BrokenQuotesError for quotes that enclose no field, and DataError for those in a TSV file that join lines of
    which each could be a row, unless the dialect says what quotes are; in a CSV file a warning names the first.
    """
    line, width, doubted, own = 1 + dialect.skipped, None, False, list[str]()
    delimiter, quoting = dialect.delimiter or ",", dialect.quoting
    mark = re.escape(delimiter)
    enclosed = re.compile(rf'(?<![^{mark}])"((?:[^"]|"(?![{mark}\r\n]|$))*)"(?=[{mark}\r\n]|$)')

    def doubt(what: str) -> None:
        nonlocal doubted
        if not doubted:
            warnings.warn(f"{path}:{line}: {what}", stacklevel=3)
        doubted = True

    def lines() -> Iterator[str]:
        for text in dialect.lines(path, newline=""):
            own.append(text)
            if quoting == "escaped quotes":
                text = re.sub(r'\\(?!")', r"\\\\", text)
            elif quoting in ("quoted", "loose") and len(own) == 1 and _is_broken(text, delimiter):
                text = enclosed.sub(lambda field: '"' + re.sub('""?', '""', field[1]) + '"', text)
                if not _is_broken(text, delimiter):
                    doubt("a quote inside a field in quotes was read as part of the text; double it if it is one")
            yield text

    how = csv.QUOTE_NONE if quoting == "literal" else csv.QUOTE_MINIMAL
    escape = "\\" if quoting in ESCAPED else None
    reader = csv.reader(lines(), delimiter=delimiter, strict=True, quoting=how, escapechar=escape)
    # The csv module's limit of 131,072 characters is shorter than some documents.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        for fields in reader:
            width = len(fields) - 1 if width is None and fields else width
            joined = fields and width and (len(own) > 1 or len(fields) - 1 != width)
            # The separators alone would give other fields.
            if joined and quoting not in ("quoted", "literal") and {text.count(delimiter) for text in own} == {width}:
                does = f"joins {len(own)} lines that could each be a row" if len(own) > 1 else "hides a separator"
                # Only a writer that encloses fields in quotes doubles one; texts have commas, and hardly tabs.
                enclosing = any(re.search(r'(?<!\\)""', text) for text in own)
                if not enclosing and (delimiter == "\t" or len(own) == 1):
                    raise DataError(f"{path}:{line}: a quote {does}; {_QUOTING}")
                if not enclosing:
                    doubt(f"a quote {does}; {_QUOTING}")
            yield line, fields
            line += len(own)
            own.clear()
    except csv.Error as exc:
        cure = f'put fields in "..." and double the quotes inside; or {_QUOTING}'
        raise BrokenQuotesError(f"{path}:{line}: broken record ({exc}); {cure}") from exc
    finally:
        csv.field_size_limit(limit)


_QUOTING = "set data.quoting to literal if quotes belong to the text, or to quoted if they enclose it"
ESCAPED = ("escaped", "escaped quotes")
"""Quoting of files with a backslash before each quote inside a field: and before each backslash, or not."""


def _is_broken(line: str, delimiter: str) -> bool:
    """Whether a quote inside a line's fields makes it no record, nor the beginning of one."""
    try:
        next(csv.reader([line], delimiter=delimiter, strict=True), None)
    except csv.Error as error:
        return "unexpected end" not in str(error)
    return False


class BrokenQuotesError(DataError):
    """Quotes that do not enclose fields."""


def quoting_of(path: Path, dialect: Dialect) -> str | None:
    """What quotes are in a file that cannot be read with each of them around a field; None if nothing tells.

    "escaped" and "escaped quotes" if a backslash stands before each quote inside a field; "literal" if every line has
    the header's fields where quotes are part of the text, as in GLUE's own files, and hardly one is enclosed; "loose"
    if most lines have enclosed fields, and quotes inside are not doubled.
    """
    delimiter, widths, escapes = dialect.delimiter or ",", set[int](), ESCAPED[0]
    lines = enclosed = inside = escaped = 0
    inner = re.compile(rf'(?<=[^"{re.escape(delimiter)}])"(?=[^"{re.escape(delimiter)}\r\n])')
    for line in (line.rstrip("\r\n") for line in dialect.lines(path, newline="") if line.strip()):
        fields = line.split(delimiter)
        widths.add(len(fields))
        lines += 1
        enclosed += any(len(field) > 1 and field[0] == field[-1] == '"' for field in fields)
        places = [sign.start() for sign in inner.finditer(line)]
        inside += len(places)
        escaped += sum(line[place - 1] == "\\" for place in places)
        if "\\" in re.sub(r'\\["\\]', "", line):
            escapes = ESCAPED[1]
    if inside and inside == escaped:
        return escapes
    if enclosed * 2 >= lines:
        return "loose"
    return "literal" if len(widths) == 1 and widths != {1} and enclosed * 20 <= lines else None


def _refuse_duplicates(columns: Sequence[str], place: str) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"{place}: two columns are named '{twice[0]}'; rename one")


def sheet_records(path: Path, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    """As `records`, of a spreadsheet: cells as it shows them, but dates as in ISO 8601.

    Raises DataError where several sheets have rows and none is named, and for a formula without a value.
    """
    from openpyxl import load_workbook

    with opened(path) as file:
        content = file.read()  # no file stays open where reading ends early
    try:
        with warnings.catch_warnings(action="ignore"):  # of styles and the like, which no row has
            books = (load_workbook(io.BytesIO(content), read_only=True, data_only=shown) for shown in (True, False))
            values, formulas = books
    except Exception as error:  # a damaged or hostile archive can make it raise anything
        raise DataError(f"{path} cannot be read as a spreadsheet ({error}); save it again") from error
    for sheet in (*values.worksheets, *formulas.worksheets):
        sheet.reset_dimensions()  # some programs write wrong ones
    used = [one.title for one in values.worksheets if one.sheet_state == "visible" and any(map(any, one.values))]
    name, width = dialect.sheet or (used[0] if len(used) == 1 else ""), 0
    if used and name not in {sheet.title for sheet in values.worksheets}:
        what = f"no sheet '{name}'" if name else "several sheets"
        cure = f"add --set data.sheet={quote(used[0])}, or another of {', '.join(map(repr, used))}"
        raise DataError(f"{path} has {what}; {cure}")
    both = zip(values[name].iter_rows(), formulas[name].iter_rows(), strict=True) if used else ()
    for number, (cells, written) in enumerate(both, start=1):
        texts = [*map(_cell_text, cells)]
        if bare := next((b for a, b in zip(texts, written, strict=True) if not a and b.data_type == "f"), None):
            cure = "open the file in a spreadsheet, which computes it, and save it"
            raise DataError(f"{path}:{number}: cell {bare.coordinate} has a formula without a value; {cure}")
        if last := max((place for place, text in enumerate(texts, start=1) if text), default=0):
            width = width or last
            yield number, [*texts[:last], *[""] * (width - last)]


def _cell_text(cell: Any) -> str:
    """The text of a spreadsheet's cell."""
    value = cell.value
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float):
        width = len(cell.number_format) if re.fullmatch("0+", cell.number_format) else 0
        return f"{value:0{width}.15g}"
    return str(value).removesuffix(" 00:00:00")


READERS: dict[str, Callable[[Path, Dialect], Records]] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    SHEETS: read_delimited,
}
"""Readers of rows; `parquet_file` is that of Parquet."""
SUFFIXES = (*READERS, ".parquet")
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


def suffix_of(path: Path) -> str:
    """The extension of a file of rows, in small letters; of a compressed one that of what it holds."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()
