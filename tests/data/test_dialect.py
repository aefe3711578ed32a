"""How a text file is written is found by its content, and what is set wins."""

import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tables import cells_of
from tsqlora.data.readers import DELIMITERS, SNIFF, Hints, sniff
from tsqlora.data.sources import open_table
from tsqlora.errors import DataError

TABLE = 'text;label\nPreis 3,50 Euro, günstig;gut\n"a, b; it\'s";schlecht\n'
ROWS = [{"text": "Preis 3,50 Euro, günstig", "label": "gut"}, {"text": "a, b; it's", "label": "schlecht"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", DELIMITERS)
def test_rows_are_the_same_however_a_table_is_written(delimiter: str, encoding: str, tmp_path: Path) -> None:
    lines = ["text,label", *(f'"{row["text"]}","{row["label"]}"' for row in ROWS)]
    path = tmp_path / "t.csv"
    path.write_bytes(
        "\n".join(
            line.replace(",", delimiter, 1) if i == 0 else f'"{delimiter}"'.join(line.split('","'))
            for i, line in enumerate(lines)
        ).encode(encoding)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert list(cells_of(path)) == ROWS
    assert [str(path) in str(w.message) for w in caught] == [True] * (encoding == "cp1252")


@given(st.lists(st.text("ab,;|'\t", max_size=9), min_size=1, max_size=9))
def test_a_table_with_commas_in_its_header_alone_stays_one_with_commas(texts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        path.write_text("text,label\n" + "".join(f'"{text}",1\n' for text in texts))
        assert sniff(path, SNIFF).delimiter == ","


def test_the_first_line_with_two_candidates_is_read_as_most_records_are(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text, as written;label\na;0\nb, c;1\n")
    assert sniff(path, SNIFF).delimiter == ";"


def test_what_is_set_wins_and_a_byte_order_mark_over_it(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("a,b^label\nжук^1\n".encode("cp1251"))
    assert cells_of(path, hints=Hints("^", "cp1251")) == ({"a,b": "жук", "label": "1"},)
    path.write_text("text\njaß\n", encoding="utf-8-sig")
    assert cells_of(path, hints=Hints(encoding="cp1252")) == ({"text": "jaß"},)


@pytest.mark.filterwarnings("ignore:.*trusted.jsonl is UTF-8")
@pytest.mark.parametrize("encoding", ["cp1250", "cp932", "utf-16", "utf-16-le"])
def test_one_encoding_for_all_files_leaves_those_in_utf8_as_they_are(encoding: str, tmp_path: Path) -> None:
    hints, path = Hints(encoding=encoding), tmp_path / "trusted.jsonl"
    path.write_text('{"text": "größer, źle, 語"}\n', encoding="utf-8")
    with pytest.warns(UserWarning, match=encoding):
        assert cells_of(path, hints=hints) == ({"text": "größer, źle, 語"},)
    path.write_text('{"text": "ascii"}\n', encoding="ascii")
    assert cells_of(path, hints=hints) == ({"text": "ascii"},)
    assert sniff(path, Hints(encoding="cp1250")).encoding == "cp1250", "which a corrected copy may need"
    text = "語" if encoding == "cp932" else "größer"
    path.write_text(f'{{"text": "{text}"}}\n', encoding=encoding)
    assert cells_of(path, hints=hints) == ({"text": text},)


@pytest.mark.parametrize(
    ("content", "hints", "message"),
    [
        (b"\xef\xbb\xbftext\nabc\ncaf\xe9\n", SNIFF, "t.csv:3: byte 0xe9 is not UTF-8"),
        ("text\nschön\ngroß\n".encode() + b"caf\xe9\n", SNIFF, "t.csv:4: byte 0xe9 is not UTF-8"),
        (b"text\ncaf\xe9\n\x81\n", SNIFF, "t.csv:3: byte 0x81 is neither UTF-8 nor CP1252"),
        (b"text\n\xe9\n", Hints(encoding="ascii"), "t.csv:2: byte 0xe9 is not ASCII"),
        ("text\n".encode("utf-16") + b"\x00", SNIFF, "t.csv is not UTF-16-LE"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_decoded_is_named_with_its_line(
    content: bytes, hints: Hints, message: str, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.encoding") as caught:
        open_table(tmp_path / "t.csv", hints=hints)
    assert message in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_json_lines_may_be_written_otherwise_too(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes('{"text": "größer"}\n'.encode("cp1252"))
    assert cells_of(tmp_path / "t.jsonl") == ({"text": "größer"},)


@pytest.mark.parametrize("word", ["größer", "źle", "£5", "naïve — café"])
def test_one_line_in_utf8_is_read_as_such_whatever_the_hint_and_a_warning_says_so(word: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"text,label\nit is {word},a\nfree,b\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="UTF-8"):
        assert cells_of(path, hints=Hints(encoding="cp1250"))[0] == {"text": f"it is {word}", "label": "a"}


@pytest.mark.parametrize("encoding", ["cp1250", "cp1252", "utf-16-le"])
def test_a_file_that_is_not_utf8_keeps_the_encoding_of_the_hint(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,label\nit is größer,a\n", encoding=encoding)
    assert cells_of(path, hints=Hints(encoding=encoding)) == ({"text": "it is größer", "label": "a"},)


@pytest.mark.filterwarnings("ignore:.*was read as cp1252")
def test_what_cannot_be_read_names_a_cure_that_every_command_has(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"text\n\x81\n")
    with pytest.raises(DataError, match=r"save .* as UTF-8.*train and audit.*data\.encoding"):
        open_table(tmp_path / "t.csv")
