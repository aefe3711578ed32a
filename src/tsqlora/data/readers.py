"""Text files and Parquet, read strictly: encoding and delimiter, then each row with its line."""

import codecs
import csv
import io
import json
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora.errors import DataError
from tsqlora.files import reading

DELIMITERS = ",;\t|"
"""Candidates for the delimiter of a CSV file; the first wins a tie."""

FALLBACK = "cp1252"
"""The encoding of a file that is not UTF-8: Windows in Western Europe.  charset-normalizer, which guesses, took
French in cp1252 for iso8859-10, and German for cp1250."""

TABLES = (".csv", ".tsv")
"""Formats without types: every cell is text."""
SHEETS = ".xlsx"

_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_UNMARKED = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le"}
"""Encodings whose encoder begins every line with a mark, which would shift all offsets; and the same without it."""
_CURE = "save the file as UTF-8 text, not compressed; train and audit also take --set data.encoding=…"
_SNIFFED_LINES, _SNIFFED_BYTES = 1000, 4096


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
        mark: length of its byte order mark in bytes.
        delimiter: None if the file has no columns.
        guessed: whether nothing proves the encoding.
        unused: the encoding of the hints, if the file is UTF-8 all the same.
        quoting: that of the hints; None if quotes enclose fields, as far as one can tell, else what `quoting_of` sees.
        skipped: lines before the header, such as Excel's "sep=;".
        sheet: of a spreadsheet; None if it has one alone.
    """

    encoding: str = "utf-8"
    mark: int = 0
    delimiter: str | None = None
    guessed: bool = False
    unused: str | None = None
    quoting: str | None = None
    skipped: int = 0
    sheet: str | None = None

    def __str__(self) -> str:
        between = "" if self.delimiter is None else f"{self.delimiter!r} between columns, "
        return f"{between}{self.encoding}"

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

    def lines(self, path: Path, *, newline: str) -> Iterator[tuple[str, int]]:
        """Each line with its line end, and the offset in bytes of its end.

        `newline` is "\\n" if lines end at line feeds alone, "" if they end at any of \\n, \\r and \\r\\n.
        Skips a byte order mark. Raises DataError if the file cannot be read, naming the line that does not decode.
        """
        try:
            with _opened(path) as binary:
                at = binary.seek(self.mark)
                with io.TextIOWrapper(binary, encoding=self.encoding, newline=newline) as file:
                    for line in file:
                        at += len(line.encode(self.encoding))
                        yield line, at
        except UnicodeError as error:
            raise DataError(_undecoded(path, self, error)) from error


PLAIN = Dialect()
"""UTF-8 without columns; also for binary files."""


def sniff(path: Path, hints: Hints) -> Dialect:
    """Detect a text file's dialect; hints win over content, and a byte order mark over an encoding.

    Without mark and hint a file is UTF-8 if it decodes, else FALLBACK. A file whose lines beyond ASCII mostly decode
    as UTF-8 stays UTF-8: it is broken. With an encoding as hint a file that can only be UTF-8 stays UTF-8, since one
    hint counts for all files of a run. Raises DataError if the file cannot be read.
    """
    if path.suffix.lower() == SHEETS:
        return Dialect(sheet=hints.sheet)
    with _opened(path) as file:
        start = file.read(_SNIFFED_BYTES)
    mark, hint = next((mark for mark in _MARKS if start.startswith(mark)), b""), hints.encoding
    # Text with one byte a letter has no zero byte: an archive is read as UTF-8, and refused there.
    open_question = not mark and b"\0" not in start
    decoding = list[bool]()
    if open_question:
        with _opened(path) as file:  # in UTF-8 no letter has the byte of a line feed
            decoding = [_broken_at(line, "utf-8") is None for line in file if not line.isascii()]
    guessed = open_question and hint is None and not all(decoding) and sum(decoding) <= len(decoding) / 2
    unused = None
    if open_question and hint is not None and codecs.lookup(hint).name not in ("utf-8", "utf-8-sig"):
        # Text in ASCII is in most encodings; a whole file beyond it hardly decodes as UTF-8 by chance.
        unused = hint if all(decoding) and (decoding or "\n".encode(hint) != b"\n") else None
    encoding = _MARKS.get(mark) or ("utf-8" if unused else hint) or (FALLBACK if guessed else "utf-8")
    encoding = _UNMARKED.get(codecs.lookup(encoding).name, encoding)
    dialect = Dialect(encoding, len(mark), guessed=guessed, unused=unused)
    if path.suffix.lower() not in TABLES:
        return dialect
    dialect = replace(dialect, quoting=hints.quoting)
    first = next((line for line, _ in _lines_if_decoded(path, dialect)), "")
    if named := SEPARATOR.fullmatch(first):
        size = len(first.encode(encoding))
        return replace(dialect, delimiter=named[1], mark=dialect.mark + size, skipped=1)
    return replace(dialect, delimiter=_delimiter(path, dialect, hints))


SEPARATOR = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)
"""Excel's own first line."""


def _lines_if_decoded(path: Path, dialect: Dialect) -> Iterator[tuple[str, int]]:
    """The lines until one does not decode: reading the rows raises it, with its number."""
    try:
        yield from dialect.lines(path, newline="")
    except DataError:
        return


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    reading(path)
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _broken_at(line: bytes, encoding: str) -> int | None:
    """The offset of the first byte that does not decode."""
    try:
        line.decode(encoding)
    except UnicodeError as error:
        return getattr(error, "start", 0)
    return None


def _delimiter(path: Path, dialect: Dialect, hints: Hints) -> str:
    """A tab in a TSV file; else the hint, or the candidate with which most records match the header.

    Not csv.Sniffer: an apostrophe in a text misleads it, and it ignores the header.
    """
    if path.suffix.lower() == ".tsv":
        return "\t"
    if hints.delimiter is not None:
        return hints.delimiter
    start = [line for line, _ in islice(_lines_if_decoded(path, dialect), _SNIFFED_LINES)]

    def agreeing(delimiter: str) -> int:
        """How many records have as many fields as the first one."""
        try:
            counts = [len(fields) for fields in csv.reader(start, delimiter=delimiter) if fields]
        except csv.Error:
            return 0
        return sum(count == counts[0] for count in counts)

    header = next((line for line in start if line.strip()), "")
    candidates = [delimiter for delimiter in DELIMITERS if delimiter in header]
    return max(candidates, key=agreeing, default=",")


def _undecoded(path: Path, dialect: Dialect, error: UnicodeError) -> str:
    encoding = dialect.encoding.upper()
    what = f"is neither UTF-8 nor {encoding}" if dialect.guessed else f"is not {encoding}"
    if "UTF-16" not in encoding:  # its line feeds have two bytes
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if (at := _broken_at(line, encoding)) is not None:
                    return f"{path}:{number}: byte 0x{line[at]:02x} {what}; {_CURE}"
    return f"{path} {what} ({error}); {_CURE}"


Records = Iterator[tuple[int | str, dict[str, Any]]]
"""Line or row numbers, or names of files, with rows."""


def read_json(path: Path, dialect: Dialect) -> Records:
    """Each line's number and object, without blank lines; or the elements of one array, which is read whole.

    Raises DataError with file and line.
    """
    if is_array(path, dialect):
        values = enumerate(rows_in(_document(path, dialect)), start=1)
    else:
        values = ((number, _parse(line.rstrip(), path, number)) for number, line, _, _ in json_lines(path, dialect))
    for number, value in values:
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise DataError(
                f'{path}:{number}: a {kind} where a row must be an object like {{"text": "...", "label": 1}}'
            )
        yield number, value


def is_array(path: Path, dialect: Dialect) -> bool:
    """Whether a .json file holds one array instead of lines, or one object in which one key holds the array."""
    if path.suffix.lower() != ".json":
        return False
    first, *more = [line.strip() for _, line, _, _ in islice(json_lines(path, dialect), 2)] or [""]
    if not first.startswith("{") or (more and first.endswith("}")):
        return first.startswith("[")
    try:
        return len(rows_in(_document(path, dialect))) > 0
    except DataError:
        return False  # reading its lines names the broken one


def _document(path: Path, dialect: Dialect) -> Any:
    return _parse("".join(line for line, _ in dialect.lines(path, newline="\n")), path, 1)


def rows_in(document: Any) -> list[Any]:
    """The rows of a JSON document: its elements, or those in its one list of objects that are no messages.

    >>> rows_in({"version": 2, "data": [{"text": "a"}]}), rows_in({"messages": [{"role": "user", "content": "Hi"}]})
    ([{'text': 'a'}], [])
    """
    if isinstance(document, list):
        return document
    lists = [value for value in document.values() if isinstance(value, list) and value]
    are_rows = len(lists) == 1 and all(isinstance(row, dict) and not {"role", "from"} & {*row} for row in lists[0])
    return lists[0] if are_rows else []


def json_lines(path: Path, dialect: Dialect) -> Iterator[tuple[int, str, int, int]]:
    """Each line that is not blank: its number, its text, and its start and end in bytes."""
    # Not str.splitlines: it also splits at U+2028 and others that JSON allows inside a string.
    for number, (line, end) in enumerate(dialect.lines(path, newline="\n"), start=1):
        if line.strip():
            yield number, line, end - len(line.encode(dialect.encoding)), end


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as exc:
        if isinstance(exc, json.JSONDecodeError):
            line += exc.lineno - 1
        raise DataError(f"{path}:{line}: not JSON ({exc}); write one object a line, or an array of them") from exc


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return row


@contextmanager
def parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file.  Raises DataError for other files, also while it is read."""
    reading(path)
    try:
        # Not pq.read_table: a parent directory named like "label=1" would add a column.
        with pq.ParquetFile(path) as file:
            _refuse_duplicates(file.schema_arrow.names, f"{path}")
            yield file
    except DataError:
        raise
    except Exception as exc:  # not Parquet, text that is not UTF-8, an impossible date, an unknown time zone …
        reason = next(iter(str(exc).splitlines()), type(exc).__name__)
        raise DataError(f"{path} cannot be read as Parquet ({reason}); export it again") from exc


def read_delimited(path: Path, dialect: Dialect) -> Records:
    """Each record of a CSV or TSV file, or of a sheet, with the number of its first line; cells are text.

    Several columns may have no name if they are empty, as where a spreadsheet ends each line with ";;".
    In a file of one column a warning names a blank line between rows, which may be an empty cell.
    Raises DataError with file and line for broken quotes and for a wrong number of fields.
    """
    rows = sheet_records(path, dialect) if path.suffix.lower() == SHEETS else records(path, dialect)
    first, header, _, before = next(rows, (1, [], 0, 0))
    _refuse_duplicates([name for name in header if name], f"{path}:{first}")
    unnamed = [place for place, name in enumerate(header) if not name]
    blank = 0
    for number, fields, start, end in rows:
        blank = blank or (number - 1 if start > before else 0)
        before = end
        if len(fields) != len(header):
            raise BrokenQuotesError(
                f"{path}:{number}: {len(fields)} fields, but the header has {len(header)} ({', '.join(header)}); "
                'put a field that holds the separator in "..."',
                broken=any('"' in field for field in fields),
            )
        if len(unnamed) > 1 and any(fields[place] for place in unnamed):
            raise DataError(f"{path}:{number}: a value in one of {len(unnamed)} columns without a name; name them")
        yield number, dict(zip(header, fields, strict=True))
    if blank and len(header) == 1:
        warnings.warn(f'{path}:{blank}: a blank line is no row; write "" if it is an empty cell', stacklevel=2)


def records(path: Path, dialect: Dialect) -> Iterator[tuple[int, list[str], int, int]]:
    """Each record that is not blank, header first: its first line, its fields, and its start and end in bytes.

    Raises BrokenQuotesError for quotes that enclose no field, and for those in a TSV file that join lines of which each
    could be a row, unless the dialect says what quotes are; in a CSV file a warning names the first of these.
    """
    line, start, end, width, doubled, doubted = 1 + dialect.skipped, 0, 0, None, False, False
    delimiter, separators = dialect.delimiter or ",", list[int]()
    mark = re.escape(delimiter)
    enclosed = re.compile(rf'(?<![^{mark}])"((?:[^"]|"(?![{mark}\r\n]|$))*)"(?=[{mark}\r\n]|$)')

    def lines() -> Iterator[str]:
        nonlocal end, doubled, doubted
        for text, end in dialect.lines(path, newline=""):  # noqa: B007  (read below, after each record)
            separators.append(text.count(delimiter))
            # As only a writer that encloses fields in quotes has it.
            doubled |= re.search(r'(?<!\\)""', text) is not None
            if dialect.quoting == "escaped quotes":
                text = re.sub(r'\\(?!")', r"\\\\", text)
            elif dialect.quoting in ("quoted", "loose") and len(separators) == 1 and _is_broken(text, delimiter):
                text = enclosed.sub(lambda field: '"' + re.sub('""?', '""', field[1]) + '"', text)
                if not doubted and not _is_broken(text, delimiter):
                    about = "a quote inside a field in quotes was read as part of the text; double it if it is one"
                    warnings.warn(f"{path}:{line}: {about}", stacklevel=2)
                    doubted = True
            yield text

    escape = "\\" if dialect.quoting in ESCAPED else None
    quoting = csv.QUOTE_NONE if dialect.quoting == "literal" else csv.QUOTE_MINIMAL
    reader = csv.reader(lines(), delimiter=delimiter, strict=True, quoting=quoting, escapechar=escape)
    try:
        with _fields_of_any_length():
            for fields in reader:
                if fields:
                    width = len(fields) - 1 if width is None else width
                    joined = len(separators) > 1 or len(fields) - 1 != width
                    doubtful = joined and not doubled and dialect.quoting not in ("quoted", "literal")
                    if doubtful and width and set(separators) == {width}:
                        # The separators alone would give other fields.
                        further = len(separators) - 1
                        does = f"joins {further + 1} lines that could each be a row" if further else "hides a separator"
                        doubt = f"{path}:{line}: a quote {does}; {_QUOTING}"
                        if delimiter == "\t" or not further:  # texts have commas, and hardly tabs
                            raise BrokenQuotesError(doubt)
                        if not doubted:
                            warnings.warn(doubt, stacklevel=2)
                        doubted = True
                    yield line, fields, start, end
                line, start = reader.line_num + 1 + dialect.skipped, end
                separators.clear()
                doubled = False
    except csv.Error as exc:
        cure = f'put fields in "..." and double the quotes inside; or {_QUOTING}'
        raise BrokenQuotesError(f"{path}:{line}: broken record ({exc}); {cure}", broken=True) from exc


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
    """Quotes that do not enclose fields; `broken` if the file cannot be read with them, else they are in doubt."""

    def __init__(self, message: str, *, broken: bool = False) -> None:
        super().__init__(message)
        self.broken = broken


def quoting_of(path: Path, dialect: Dialect) -> str | None:
    """What quotes are in a file that cannot be read with each of them around a field; None if nothing tells.

    "escaped" and "escaped quotes" if a backslash stands before each quote inside a field; "literal" if every line has
    the header's fields where quotes are part of the text, as in GLUE's own files, and hardly one is enclosed; "loose"
    if most lines have enclosed fields, and quotes inside are not doubled.
    """
    delimiter, widths, escapes = dialect.delimiter or ",", set[int](), ESCAPED[0]
    lines = enclosed = inside = escaped = 0
    inner = re.compile(rf'(?<=[^"{re.escape(delimiter)}])"(?=[^"{re.escape(delimiter)}\r\n])')
    for line in (line.rstrip("\r\n") for line, _ in dialect.lines(path, newline="") if line.strip()):
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


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    # The csv module's limit of 131,072 characters is shorter than some documents.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _refuse_duplicates(columns: Sequence[str], place: str) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"{place}: two columns are named '{twice[0]}'; rename one")


def sheet_records(path: Path, dialect: Dialect) -> Iterator[tuple[int, list[str], int, int]]:
    """As `records`, of a spreadsheet, without offsets: cells as it shows them, but dates as in ISO 8601.

    Raises DataError where several sheets have rows and none is named, and for a formula without a value.
    """
    from openpyxl import load_workbook

    reading(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of styles and the like, which no row has
            content = path.read_bytes()  # no file stays open where reading ends early
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
            yield number, [*texts[:last], *[""] * (width - last)], 0, 0


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


@contextmanager
def unpacked(path: Path, folder: Path | None) -> Iterator[Path]:
    """A compressed file's content as a temporary file in `folder`.  Errors and warnings name the file itself."""
    with tempfile.NamedTemporaryFile(suffix=suffix_of(path), dir=folder) as file:
        reading(path)
        try:
            with pa.input_stream(path, compression=COMPRESSED[path.suffix.lower()]) as stream:
                shutil.copyfileobj(stream, file)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot unpack {path} ({next(iter(str(error).splitlines()), '')})") from error
        file.flush()
        try:
            with warnings.catch_warnings(record=True, action="always") as caught:
                yield Path(file.name)
        except DataError as error:
            raise DataError(str(error).replace(file.name, str(path))) from error
        for one in caught:
            warnings.warn(str(one.message).replace(file.name, str(path)), one.category, stacklevel=3)
