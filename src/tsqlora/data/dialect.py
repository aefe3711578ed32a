"""Detect the encoding of a text file, and the delimiter of a CSV file."""

import codecs
import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from tsqlora.errors import DataError
from tsqlora.files import reading

DELIMITERS = ",;\t|"
"""Candidates for the delimiter of a CSV file; the first wins a tie."""

FALLBACK = "cp1252"
"""The encoding of a file that is not UTF-8: Windows in Western Europe.  charset-normalizer, which guesses, took
French in cp1252 for iso8859-10, and German for cp1250."""

TABLES = (".csv", ".tsv")
"""Formats without types: every cell is text."""

_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_UNMARKED = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le"}
"""Encodings whose encoder begins every line with a mark, which would shift all offsets; and the same without it."""
SURE_LINES = 3
"""So many lines beyond ASCII that decode as UTF-8 are in no table of another encoding by chance."""
_SNIFFED_LINES, _SNIFFED_BYTES = 1000, 4096


@dataclass(frozen=True, slots=True)
class Hints:
    """Settings about text files; None means detect."""

    delimiter: str | None = None
    encoding: str | None = None


SNIFF = Hints()


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a text file is written.

    Args:
        mark: length of its byte order mark in bytes.
        delimiter: None if the file has no columns.
        guessed: whether nothing proves the encoding.
        unused: the encoding of the hints, if the file is UTF-8 all the same.
    """

    encoding: str = "utf-8"
    mark: int = 0
    delimiter: str | None = None
    guessed: bool = False
    unused: str | None = None

    def __str__(self) -> str:
        between = "" if self.delimiter is None else f"{self.delimiter!r} between columns, "
        return f"{between}{self.encoding}"

    def note(self, name: str) -> str | None:
        """A warning if the encoding is a guess, or not that of the hints."""
        if self.unused is not None:
            return f"{name} is UTF-8 and was read as such; data.encoding {self.unused} counts for other files"
        if not self.guessed:
            return None
        return f"{name} is not UTF-8 and was read as {self.encoding}; set data.encoding if its letters look wrong"

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
    with _opened(path) as file:
        start = file.read(_SNIFFED_BYTES)
    mark = next((mark for mark in _MARKS if start.startswith(mark)), b"")
    # Text with one byte a letter has no zero byte: an archive is read as UTF-8, and refused there.
    zeros, hint = b"\0" in start, hints.encoding
    guessed = not mark and hint is None and not zeros and not _is_utf8(path)
    unused = hint if hint is not None and not mark and not zeros and _is_only_utf8(path, hint) else None
    encoding = _MARKS.get(mark) or ("utf-8" if unused else hint) or (FALLBACK if guessed else "utf-8")
    encoding = _UNMARKED.get(codecs.lookup(encoding).name, encoding)
    dialect = Dialect(encoding, len(mark), guessed=guessed, unused=unused)
    if path.suffix.lower() not in TABLES:
        return dialect
    return replace(dialect, delimiter=_delimiter(path, dialect, hints))


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    reading(path)
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _is_utf8(path: Path) -> bool:
    decoding = _decoding(path)
    return all(decoding) or sum(decoding) > len(decoding) / 2


def _is_only_utf8(path: Path, encoding: str) -> bool:
    """Whether a file without zero bytes is UTF-8 and not in another encoding; text in ASCII is in most."""
    if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
        return False
    decoding = _decoding(path)
    sure = len(decoding) >= SURE_LINES or (decoding != [] and path.suffix.lower() not in TABLES)
    return all(decoding) and (sure or "\n".encode(encoding) != b"\n")


def _decoding(path: Path) -> list[bool]:
    """Whether each line beyond ASCII decodes as UTF-8, where no letter has the byte of a line feed."""
    with _opened(path) as file:
        return [_broken_at(line, "utf-8") is None for line in file if not line.isascii()]


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
    try:
        start = [line for line, _ in islice(dialect.lines(path, newline=""), _SNIFFED_LINES)]
    except DataError:  # reading the rows raises it again, with the line
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


def _undecoded(path: Path, dialect: Dialect, error: UnicodeError) -> str:
    encoding = dialect.encoding.upper()
    what = f"is neither UTF-8 nor {encoding}" if dialect.guessed else f"is not {encoding}"
    cure = "save the file as UTF-8 text, not compressed, or set data.encoding"
    if "UTF-16" not in encoding:  # its line feeds have two bytes
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if (at := _broken_at(line, encoding)) is not None:
                    return f"{path}:{number}: byte 0x{line[at]:02x} {what}; {cure}"
    return f"{path} {what} ({error}); {cure}"
