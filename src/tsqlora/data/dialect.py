"""How a text file is written: its encoding, and of a CSV file its delimiter."""

import codecs
import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from tsqlora.errors import DataError

DELIMITERS = ",;\t|"
"""What may stand between the columns of a CSV file; of equally likely ones the first."""

FALLBACK = "cp1252"
"""The encoding of a file that is not UTF-8: of Windows in Western Europe.  charset-normalizer, which guesses, took
French in cp1252 for iso8859-10, and German for cp1250."""

TABLES = (".csv", ".tsv")
"""Formats whose cells are text between delimiters, whatever they stand for."""

_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_LINES, _LOOKED_AT = 1000, 4096
"""Lines by which a delimiter is chosen, and bytes that must hold no zero byte."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What is known of how files are written; what is None is found by their content."""

    delimiter: str | None = None
    encoding: str | None = None


SNIFF = Hints()
"""Everything is found by the content."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a text file is written.

    `mark` is the length of its byte order mark in bytes, `delimiter` is None where there are no columns, `guessed` is
    true where nothing proves the encoding.
    """

    encoding: str = "utf-8"
    mark: int = 0
    delimiter: str | None = None
    guessed: bool = False

    def __str__(self) -> str:
        between = "" if self.delimiter is None else f"{self.delimiter!r} between columns, "
        return f"{between}{self.encoding}"

    def note(self, name: str) -> str | None:
        """What to say of a file of this name whose encoding is only likely."""
        if not self.guessed:
            return None
        return f"{name} is not UTF-8 and was read as {self.encoding}; set data.encoding if its letters look wrong"

    def lines(self, path: Path, *, newline: str) -> Iterator[tuple[str, int]]:
        """Each line with its line end, and how many bytes of the file end with it.

        `newline` is "\\n" where lines end at line feeds alone, "" where they end at any of \\n, \\r and \\r\\n.
        A byte order mark is counted and left out.  Raises DataError where the file cannot be read, and names the line
        that is not of the encoding.
        """
        try:
            with _opened(path) as binary:
                at = binary.seek(self.mark)
                with io.TextIOWrapper(binary, encoding=self.encoding, newline=newline) as file:
                    for line in file:
                        at += len(line.encode(self.encoding))
                        yield line, at
        except UnicodeError as error:
            raise DataError(_where_not_decoded(path, self, error)) from error


PLAIN = Dialect()
"""UTF-8 without columns, and what is no text file."""


def sniff(path: Path, hints: Hints) -> Dialect:
    """The dialect of a text file; hints win over what its content says, and a byte order mark over an encoding.

    Without a mark and an encoding a file is UTF-8 if it can be, else FALLBACK.  A file that is UTF-8 in most of its
    lines with letters beyond ASCII stays UTF-8: it is broken.  Raises DataError where the file cannot be read.
    """
    with _opened(path) as file:
        start = file.read(_LOOKED_AT)
    mark = next((mark for mark in _MARKS if start.startswith(mark)), b"")
    # A zero byte is in no text of one byte a letter: an archive is read as UTF-8, and refused there.
    guessed = not mark and hints.encoding is None and b"\0" not in start and not _is_utf8(path)
    found = _MARKS.get(mark) or hints.encoding or (FALLBACK if guessed else "utf-8")
    dialect = Dialect(found, len(mark), guessed=guessed)
    if path.suffix.lower() not in TABLES:
        return dialect
    return replace(dialect, delimiter=_delimiter(path, dialect, hints))


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _opened(path) as file:
        try:
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
            return True
        except UnicodeDecodeError:
            file.seek(0)
            beyond_ascii = [_decodes(line, "utf-8") for line in file if not line.isascii()]
            return sum(beyond_ascii) > len(beyond_ascii) / 2


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeError:
        return False
    return True


def _delimiter(path: Path, dialect: Dialect, hints: Hints) -> str:
    """A tab in a TSV file; else the hint, or the one of DELIMITERS by which most records agree with the first line.

    Not csv.Sniffer: it fails where a text has an apostrophe, and does not ask what the first line says.
    """
    if path.suffix.lower() == ".tsv":
        return "\t"
    if hints.delimiter is not None:
        return hints.delimiter
    try:
        start = [line for line, _ in islice(dialect.lines(path, newline=""), _LINES)]
    except DataError:  # whoever reads the rows names the line
        return ","
    header = next((line for line in start if line.strip()), "")
    candidates = [delimiter for delimiter in DELIMITERS if delimiter in header]
    return max(candidates, key=lambda one: _agreeing(start, one), default=",")


def _agreeing(lines: list[str], delimiter: str) -> int:
    """How many records have as many fields as the first one."""
    try:
        counts = [len(fields) for fields in csv.reader(lines, delimiter=delimiter) if fields]
    except csv.Error:
        return 0
    return sum(count == counts[0] for count in counts)


def _where_not_decoded(path: Path, dialect: Dialect, error: UnicodeError) -> str:
    encoding = dialect.encoding.upper()
    what = f"is neither UTF-8 nor {encoding}" if dialect.guessed else f"is not {encoding}"
    cure = "save the file as UTF-8 text, and not compressed, or set data.encoding"
    if "UTF-16" not in encoding:  # of which a line feed is two bytes
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if not _decodes(line, encoding):
                    return f"{path}:{number}: {_first_undecoded(line, encoding)} {what}; {cure}"
    return f"{path} {what} ({error}); {cure}"


def _first_undecoded(line: bytes, encoding: str) -> str:
    try:
        line.decode(encoding)
    except UnicodeDecodeError as broken:
        return f"byte 0x{line[broken.start]:02x}"
    except UnicodeError:
        pass
    return "a byte"
