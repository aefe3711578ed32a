"""What a user sees fits a terminal of 80 columns, and says what happened."""

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from tsqlora.auditing.page import layer_places
from tsqlora.auditing.reasons import WHY
from tsqlora.auditing.texts.look import PHASES
from tsqlora.cli import console
from tsqlora.cli.display import (
    show_audit,
    show_explained,
    show_numbers,
    show_plan,
    show_ranks,
    show_record,
    show_row,
    show_scores,
)
from tsqlora.cli.progress_bars import Display

KINDS = ("attention.self.query", "attention.self.value", "attention.output.dense", "intermediate.dense")


def shown(show: Any, value: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(console, value)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("blocks", [2, 12, 32])
def test_every_rank_and_whole_name_is_shown_within_80_columns(blocks: int) -> None:
    ranks = {f"bert.encoder.layer.{b}.{kind}": 100 + b for b in range(blocks) for kind in KINDS} | {"pooler.dense": 7}
    text = shown(show_ranks, ranks)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for kind in KINDS:
        rows = [line.split() for line in text.splitlines() if line.startswith(kind)]
        assert [int(cell) for row in rows for cell in row[1:]] == [100 + b for b in range(blocks)]
    assert "pooler.dense 7" in text


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("bert.encoder.layer.3.attention.self.query", "3", "attention.self.query"),
        ("bert.pooler.dense", "", "pooler.dense"),
        ("model.layers.11.mlp.experts.2.up_proj", "11", "mlp.experts.2.up_proj"),
        ("score", "", "score"),
    ],
)
def test_a_name_splits_into_block_and_kind(name: str, block: str, kind: str) -> None:
    assert layer_places([name]) == {name: (block, kind)}


@pytest.mark.parametrize(
    ("parts", "lead"),
    [
        (("encoder.encoder.layer", "decoder.bert.encoder.layer"), ""),
        (("encoder.block", "decoder.block"), ""),
        (("model.encoder.layers", "model.decoder.layers"), "model."),
    ],
)
def test_an_encoders_layer_and_a_decoders_are_not_taken_for_one_another(parts: tuple[str, str], lead: str) -> None:
    ranks = {f"{part}.{block}.query": 10 * j + block for j, part in enumerate(parts, 1) for block in range(3)}
    ranks |= {f"{lead}{part}.pooler.dense": 50 + j for j, part in enumerate(("encoder", "decoder"))}
    text = shown(show_ranks, ranks)
    printed = {" ".join(line.split()) for line in text.splitlines()}
    assert {"encoder query 10 11 12", "decoder query 20 21 22"} <= printed
    assert {"encoder pooler.dense 50", "decoder pooler.dense 51"} <= printed


@given(st.sets(st.lists(st.sampled_from(["a", "b", "0", "1", "encoder"]), min_size=1, max_size=5).map(".".join)))
def test_no_two_layers_have_one_place(names: set[str]) -> None:
    places = layer_places(names)
    assert places.keys() == names
    assert len(set(places.values())) == len(names)


def test_notes_metrics_and_costs_of_a_run_are_shown() -> None:
    record = {
        "run": "a-run",
        "cost": {"warm-up": {"seconds": 1.25, "forward": 1200, "backward": 1200, "tokens": 0}},
        "ranks": {"layer.0.query": 3},
        "metrics": {"validation": {"accuracy": 0.875}},
        "notes": ["rows were drawn at random: [because]"],
    }
    text = shown(show_record, record)
    for part in ("1,200", "accuracy 0.8750", "note: rows were drawn at random: [because]", "a-run/adapter"):
        assert part in text


def test_a_plan_shows_rows_steps_parameters_and_passes() -> None:
    plan = {
        "rows": {"train": 1000, "validation": 50},
        "classes": {"[b]": 700, "no": 300},
        "rows_an_epoch": 500,
        "epochs": 4,
        "steps": 128,
        "trainable": 2048,
        "budget": 2000,
        "ranks": {"a": 7, "b": 8},
        "bf16": True,
        "passes": {"scoring": {"forward": 3024, "backward": 1512}},
        "without_effect": ["ranks.interval has no effect: ranks.policy is fixed"],
        "files": {"a[b].csv": "';' between columns, cp1252"},
        "columns": {"text": "[body]", "text_pair": None, "label": "mood"},
        "max_length": 128,
        "notes": ["3 of 50 validation rows [..] are training rows, too"],
    }
    text = shown(show_plan, plan)
    assert "columns     [body], mood; at most 128 tokens" in text
    assert "file        a[b].csv: ';' between columns, cp1252" in text
    assert "note        3 of 50 validation rows [..] are training rows" in text
    assert "settings    ranks.interval has no effect" in text
    assert "2: [b] (700), no (300)" in text
    parts = ("1,000 train, 50 validation", "4 epochs, 128 steps", "2,048", "2 layers at 7 and 8", "bfloat16", "3,024")
    for part in parts:
        assert part in text


def explained(text: str, label: str) -> dict[str, Any]:
    sample = {
        "id": 123456,
        "text": text,
        "label": label,
        "predicted": "other",
        "predicted_probability": 0.93,
        "label_probability": 0.02,
        "quality": -1.5,
        "reason": "duplicate",
        "why": WHY["duplicate"],
        "terms": {"gradient_norm": 1.25, "loss_reduction": 0.5, "convergence": -0.75, "loss": 3.5},
    }
    lists = {name: [{**sample, "id": 123456 + j}] for j, name in enumerate(("highest", "lowest", "suspicious"))}
    wrong = {"likely_wrong": [], "likely_wrong_rows": 4, "likely_wrong_left_out": 3}
    return {**lists, **wrong, "kind": "class", "even": False, "evident": True}


@pytest.mark.parametrize("width", [30, 40, 80, 200])
@pytest.mark.parametrize(
    "text", ["a [bold]plain[/bold] [/] text [link=x]", "\x1b[31mred\x1b[0m\n\r\ttwo   lines", "文字 " * 200, "w" * 500]
)
def test_samples_fit_any_terminal_and_show_texts_as_they_stand(text: str, width: int) -> None:
    out = shown(show_explained, explained(text, "[red]label"), width)
    assert max(cell_len(line) for line in out.splitlines()) <= width
    assert "\x1b" not in out
    assert "likely wrong labels" in out
    assert out.replace("\n", "").replace(" ", "").count("12345") == 3 or width < 80
    if width == 200:
        for part in (
            "[red]label",
            "other 93%",
            "-1.50",
            "left out: near-duplicate",
            "convergence -0.75",
            "4 in all, 3 left out",
            text.replace("\x1b", " ").split()[0][:9],
        ):
            assert part in out


def test_a_row_on_two_lists_is_shown_once_and_wrong_labels_come_first() -> None:
    lists = explained("a text", "no")
    out = shown(show_explained, lists | {"likely_wrong": [*lists["suspicious"], *lists["lowest"]]})
    assert out.count("a text") == 3
    assert out.count("see above: 123458") == out.count("see above: 123457") == 1
    assert (
        out.index("likely wrong labels") < out.index("most suspicious") < out.index("lowest q") < out.index("highest q")
    )


def test_without_evidence_no_label_is_called_wrong_and_none_has_a_probability() -> None:
    lists = explained("a text", "no") | {"evident": False}
    assert "likely wrong" not in (out := shown(show_explained, lists))
    assert "no evidence of wrong labels; those that the model contradicts with confidence: 4" in out
    sample = {**lists["highest"][0], "no_text": None, "wrong_probability": None, "judged": True}
    assert "no evidence of wrong labels among these rows, so no probability" in shown(
        show_row, {**sample, "out_of_sample": True, "kind": "class"}
    )


@pytest.mark.parametrize("kind", ["text", "pair"])
def test_samples_of_text_have_no_class(kind: str) -> None:
    sample = {**explained("a\n→ b", "")["highest"][0], "label": 7, "no_text": None, "wrong_probability": None}
    sample["judged"] = False
    for name in ("predicted", "predicted_probability", "label_probability"):
        del sample[name]
    lists = {name: [sample] for name in ("highest", "lowest", "suspicious", "likely_wrong")}
    counts = {"likely_wrong_rows": 1, "likely_wrong_left_out": 1}
    out = shown(show_explained, {**lists, **counts, "kind": kind, "even": True, "evident": False})
    assert "rows were drawn evenly" in out
    assert "quality" not in out
    out += shown(show_row, {**sample, "out_of_sample": True, "kind": kind})
    assert "target tokens 7" in out
    assert ("swapped pairs: 1 in all, 1 left out" in out) == (kind == "pair")
    for word in ("label", "class", "model"):
        assert word not in out


def test_numbers_are_a_line_each_and_brackets_are_no_markup() -> None:
    lines = shown(show_numbers, {"accuracy": 0.5, "out": "[bold]x"}).splitlines()
    assert [line.split() for line in lines] == [["accuracy", "0.5000"], ["out", "[bold]x"]]


NOTE = "loss 0.5123, lr 0.00075"


def lines_of(console: Console) -> list[str]:
    return [line for line in console.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]


def test_without_a_terminal_each_phase_is_one_line() -> None:
    console = Console(file=io.StringIO(), width=80)
    with Display(console) as display:
        for done in range(1, 4):
            display.progress("training", done, 3, NOTE)
        display.progress("scoring", 1, 9)
    assert lines_of(console) == ["training: 3 steps", "scoring: 9 rows"]


def test_without_a_terminal_a_long_phase_has_a_line_now_and_then_without_control_codes() -> None:
    clock = iter(range(0, 10_000, 10))
    console = Console(file=io.StringIO(), width=40)
    with Display(console, every=30.0, clock=lambda: float(next(clock))) as display:
        for done in range(1, 11):
            display.progress("training", done, 1000, NOTE)
    first, *later = lines_of(console)
    assert first == "training: 1,000 steps"
    places = [int(line.split()[1].partition("/")[0]) for line in later]
    assert places == sorted(set(places))
    assert 1 < len(places) < 9, "not one for each step"
    assert all(line.endswith(f" left, {NOTE}") for line in later)
    assert "\x1b" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert "\r" not in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", ["dumb", "xterm"])
def test_a_dumb_terminal_gets_lines_and_no_control_codes(terminal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", terminal)
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Display(console) as display:
        display.progress("training", 1, 3, NOTE)
    assert ("\x1b" in console.file.getvalue()) == (terminal == "xterm")  # type: ignore[attr-defined]


def terminal_lines(shown: Callable[[Display], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The terminal's lines after these calls of the display."""
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with Display(console) as display:
        shown(display)
        lines = console.render_lines(display.bars.get_renderable(), console.options)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def test_bars_fit_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(display: Display) -> None:
        for phase in ("evaluation", *PHASES.values()):
            display.progress(phase, 1, 123456)
            display.progress(phase, 123456, 123456)

    text = terminal_lines(shown, monkeypatch)
    assert all("123456/123456" in line and "…" not in line for line in text[: len(PHASES) + 1])
    assert not any(text[len(PHASES) + 1 :])


def test_while_training_a_terminal_says_how_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = terminal_lines(lambda display: display.progress("training", 5, 10, NOTE), monkeypatch)
    assert "5/10" in text
    assert NOTE in text


def test_bars_of_what_is_over_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(display: Display) -> None:
        for number in range(50):
            display.progress("training", 1, 1, NOTE)
            display.say(f"{number} is done")
        display.progress("warm-up", 1, 1)

    text = terminal_lines(shown, monkeypatch)
    assert len([line for line in text if line]) == 1
    assert text[0].startswith("warm-up")


def test_scores_are_shown_with_what_to_do_next() -> None:
    scored = {"scores": "s.parquet", "rows": 90, "held_out": 10, "draw": "even", "dropped": {"duplicate": 3}}
    text = shown(show_scores, {**scored, "noise": {"evident": True, "rate": 0.2, "low": 0.1, "high": 0.3}})
    assert all(part in text for part in ("evenly", "3 (near-duplicate", "20.0%", "tsqlora select s.parquet"))
    unbounded = {"evident": True, "rate": 0.2, "low": 0.0, "high": 1.0}
    assert "about 20.0% are wrong\n" in shown(show_scores, {**scored, "noise": unbounded})
    softmax = {"draw": "softmax", "temperature": 2.0, "effective_sample_size": 41.2, "noise": None}
    assert "sample size 41" in shown(show_scores, {**scored, **softmax})


AUDIT = {"rows": 9, "classes": ["a", "b"], "model_name": "m", "summary": "S.", "first": [], "duplicates": 0}
AUDIT |= {
    "notes": [],
    "checks": 0,
    "listed": 1,
    "suspects": "s.csv",
    "page": "p.html",
    "out": "my out",
    "columns": {"text": "body", "label": "team"},
}
AUDIT |= {"evident": False, "columns": {"text": "body", "label": "team"}}


@pytest.mark.parametrize(("evident", "chance"), [(True, 0.87), (False, None)])
def test_suspects_have_a_probability_where_wrong_labels_are_evident(evident: bool, chance: float | None) -> None:
    row = {
        "row": 4,
        "label": "a",
        "suggested_label": "b",
        "wrong_probability": chance,
        "text": "some text",
        "token": None,
    }
    text = shown(show_audit, AUDIT | {"first": [row], "evident": evident})
    assert "some text" in text
    assert ("87%" in text) == ("wrong" in text) == evident


def test_a_command_to_copy_has_quotes_around_a_path_with_a_space() -> None:
    record = {"cost": {}, "ranks": {}, "metrics": {}, "notes": [], "run": "my run"}
    scored = {"scores": "my s.parquet", "rows": 9, "held_out": 1, "draw": "even", "dropped": {}, "noise": None}
    for show, result, commands in (
        (show_record, record, ["tsqlora report 'my run'"]),
        (show_audit, AUDIT, ["tsqlora apply reviewed.csv --out 'my out'"]),
        (show_scores, scored, ["tsqlora explain 'my s.parquet'", "tsqlora select 'my s.parquet' --fraction"]),
    ):
        text = shown(show, result)
        assert all(command in text for command in commands), text


def test_square_brackets_of_names_and_texts_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.terminal().print("[/tmp/foo] [bold]")
    with console.progress() as display:
        display.say("[/tmp/foo] [bold]")
        display.progress("[/tmp/foo] [bold]", 1, 2)
    console.note("[/tmp/foo] [bold]", "[bold red]error:[/] ")
    out, err = capsys.readouterr()
    assert out.count("[/tmp/foo] [bold]") == 1
    assert err.count("[/tmp/foo] [bold]") == 3
    assert "error: [/tmp/foo]" in err


def test_ranks_that_are_all_alike_are_one_line() -> None:
    ranks = {f"layer.{j}.query": 8 for j in range(24)}
    assert shown(show_ranks, ranks).split() == ["ranks", "8", "in", "each", "of", "24", "layers"]
    assert "rank in block" in shown(show_ranks, ranks | {"layer.3.query": 9})
    assert shown(show_ranks, {}) == ""


def test_numbers_that_json_lacks_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"loss": float("nan"), "rows": [{"p": float("-inf")}, {"p": 0.5}], "NaN": "NaN"}
    console.show(result, as_json=True, how="show_numbers")
    strict = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert strict == {"loss": None, "rows": [{"p": None}, {"p": 0.5}], "NaN": "NaN"}
