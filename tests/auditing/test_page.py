"""The page: whole, small, the same each time, loading nothing, and no text of the data is code in it."""

import html
import json
import re
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from made_runs import LAYERS, make_run, rank_events, scores_of
from runs import make_rows
from seen import Seen
from tsqlora.auditing.page import environment
from tsqlora.errors import SettingsError
from tsqlora.training.report.figures import DARK, FRAMES, Grid, curves, rank_frames, rank_map, thinned
from tsqlora.training.report.run_page import DOUBTED, Samples, run_page
from tsqlora.training.report.write import write_report

ROWS = make_rows(60, labels=("no", "yes"))
HOSTILE = "</script><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> & <!-- \"q\""


def made(run: Path) -> Seen:
    return Seen(run_page(run, "/* plotly */"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The page of a run that has everything."""
    return made(make_run(tmp_path_factory.mktemp("page"), rows=ROWS))


def test_a_page_has_its_parts_in_order_and_a_place_for_each_figure(seen: Seen) -> None:
    assert len(seen.ids()) == len(set(seen.ids()))
    parts = "summary before happened confusions curves ranks sensitivity distributions samples cost settings"
    assert seen.sections() == parts.split()
    drawn = seen.page_data()["figures"]
    assert set(drawn) <= set(seen.ids())
    assert {"loss", "metric", "ranks-map", "sensitivity-first", "sensitivity-last"} < set(drawn)
    assert sum(name.startswith("histogram") for name in drawn) == 4, "two terms, Q and p"
    for name in drawn:
        place = next(attributes for _, attributes in seen.tags if attributes.get("id") == name)
        assert (place["role"], bool(place["aria-label"])) == ("img", True)
    page = " ".join(seen.texts["main"])
    for text in (
        "87.5%",
        "12,345",
        "50 of 100 rows",
        "noyes218%",
        "3 rows were left out: near-duplicate of another row",
    ):
        assert text in page
    for question in ("wrong with my rows", "was trained", "Is it better", "Can I serve it"):
        assert f"{question}?" in page
    assert "About 20% of the labels seem wrong." in page
    assert "tsqlora train run/config.yaml" in page


def test_tables_and_controls_are_usable_without_sight_or_mouse(seen: Seen) -> None:
    ids = seen.ids()
    assert ("html", {"lang": "en"}) in seen.tags
    assert seen.texts.keys() >= {"h1", "h2", "nav", "main", "caption", "dl"}
    assert len(seen.texts["h1"]) == 1
    labelled = {attributes["for"] for tag, attributes in seen.tags if tag == "label"}
    for tag, attributes in seen.tags:
        if tag in ("input", "select"):
            assert attributes["id"] in labelled
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if tag == "a":
            assert str(attributes["href"]).removeprefix("#") in ids
        if tag == "section":
            assert attributes["aria-labelledby"] in ids
    assert len(seen.texts["table"]) == len(seen.texts["caption"])


def test_hostile_texts_stay_texts_wherever_they_come_from(tmp_path: Path, seen: Seen) -> None:
    rows = [{"text": HOSTILE, "label": "no"}, {"text": HOSTILE + "long " * 100 + HOSTILE, "label": "no"}, *ROWS]
    layers = {f"a.0.{HOSTILE}": 4, **dict.fromkeys(LAYERS, 4)}
    run = make_run(
        tmp_path,
        rows=rows,
        notes=[HOSTILE],
        plan={"rows": {"train": 62}, "rows_an_epoch": 30, "epochs": 4, "steps": 40, "ranks": layers},
        rank_events=[
            replace(e, ranks=layers | dict(e.ranks), sensitivity=layers | dict(e.sensitivity)) for e in rank_events(2)
        ],
        ranks=layers,
        task=HOSTILE,
        data={"hash": HOSTILE},
        versions={HOSTILE: HOSTILE},
        metrics={"test": {HOSTILE: 1.0}},
        history=[{"step": 1, "epoch": 1.0, "loss": 1.0, f"eval_{HOSTILE}": 1.0}],
    )
    (run / "config.yaml").write_text(f"model:\n  path: {json.dumps(HOSTILE)}\n")
    hostile = made(run)
    assert {tag for tag, _ in hostile.tags} <= {tag for tag, _ in seen.tags}
    assert sum(tag == "script" for tag, _ in hostile.tags) == 3
    assert HOSTILE in hostile.texts["li"][-1]
    assert HOSTILE in hostile.texts["p"][-2]
    assert sum(text.startswith(HOSTILE) for text in hostile.texts["th"]) > 2
    # Plotly reads tags: they must reach it as entities, in names of axes as in legends.
    for figure in hostile.page_data()["figures"].values():
        assert HOSTILE not in json.dumps(figure, ensure_ascii=False).replace('\\"', '"')
    assert html.escape(HOSTILE, quote=False) in hostile.page_data()["figures"]["ranks-map"]["data"][0]["y"]


SIGNS = st.sampled_from(
    ["<b>", "</script>", "<script>", "&lt;", "&amp;", '"', "'", "<!--", "]]>", "{{ 1 }}", "long " * 50]
)
TEXTS = st.lists(SIGNS | st.text(st.characters(exclude_categories=["Cs", "Cc"])), min_size=1).map("".join)


@given(text=TEXTS)
def test_any_text_is_shown_as_it_is_and_ends_no_element(text: str) -> None:
    row = {"id": 1, "text": text, "label": text, "prediction": text, "doubt": True, "numbers": [1.0, 0.1, 2.0]}
    row |= {"marks": ["highest Q", DOUBTED], "why": text}
    samples = Samples([row], ["highest Q"], "label", ("loss",), 1, {"kept": 1}, DOUBTED, None)
    seen = Seen(environment().get_template("samples.html").render(samples=samples))
    assert text in seen.texts["th"][-1]
    assert seen.texts["td"][1] == text
    assert not {"script", "img", "b"} & {tag for tag, _ in seen.tags}


def test_nothing_is_loaded_and_the_policy_forbids_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=[{"text": HOSTILE, "label": "no"}, *ROWS])
    seen = Seen(write_report(run).read_text(encoding="utf-8"))
    for tag, attributes in seen.tags:
        assert not attributes.keys() & {"src", "srcset", "action", "data", "poster"}, tag
        assert tag not in ("link", "iframe", "object", "base")
        assert str(attributes.get("href", "#")).startswith("#")
    policy = next(f["content"] for t, f in seen.tags if f.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")
    styles = files("tsqlora.auditing").joinpath("templates/page.css").read_text()
    assert "url(" not in styles
    assert "@import" not in styles


def test_both_themes_have_every_colour(seen: Seen) -> None:
    styles = files("tsqlora.auditing").joinpath("templates/page.css").read_text()
    light, system, chosen = (
        set(re.findall(r"(--[a-z-]+):", styles[styles.index(start) :].split("}")[0]))
        for start in (":root {", ':root:not([data-theme="light"])', ':root[data-theme="dark"]')
    )
    assert light == system == chosen
    assert "prefers-color-scheme: dark" in styles
    text = json.dumps(seen.page_data()["figures"])
    assert set(re.findall(r"#[0-9a-f]{6}", text)) <= set(DARK)


def test_the_same_run_gives_the_same_bytes_also_as_a_copy(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=ROWS)
    first = write_report(run).read_bytes()
    assert write_report(run, tmp_path / "elsewhere.html").read_bytes() == first
    (run / "report.html").unlink()
    (tmp_path / "other").mkdir()
    assert write_report(run.rename(tmp_path / "other" / "run")).read_bytes() == first


def test_a_million_scores_give_a_small_page(tmp_path: Path) -> None:
    many, few = 1_000_000, [{"text": "word " * 1000, "label": "no"}, *ROWS]
    run = make_run(tmp_path, rows=few)
    scores = scores_of(tmp_path / "train.jsonl", few)
    rng = np.random.default_rng(0)
    places = rng.integers(0, len(few), size=many)
    repeated = replace(
        scores,
        terms={name: rng.normal(size=many) for name in ("loss", "convergence", "gradient_norm")},
        labels=scores.labels[places],
        quality=rng.normal(size=many),
        probability=np.full(many, 1 / many),
        hashes=None if scores.hashes is None else tuple(scores.hashes[j] for j in places),
        predictions={name: values[places] for name, values in scores.predictions.items()},
        reasons=None,
    )
    repeated.save(run / "scores.parquet")
    assert write_report(run).stat().st_size < 6_000_000


@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize(
    "less",
    [
        {"events": 0},
        {"history": []},
        {"history": [{"step": 1, "epoch": 1.0, "loss": float("nan")}]},
        {"metrics": {}},
        {"quality": {}},
        {"ranks": {}, "events": 0},
        {"notes": [], "versions": {}, "parameters": {}},
        {"metrics": {"validation": {"pearson": float("nan"), "loss": 2.0}}, "task": "regression"},
    ],
)
def test_a_page_is_made_of_what_there_is(less: dict[str, Any], rows: list | None, tmp_path: Path) -> None:
    seen = made(make_run(tmp_path, rows=rows, **less))
    assert ("ranks" in seen.sections()) == (less.get("events") != 0)
    assert set(seen.page_data()["figures"]) <= set(seen.ids())
    if rows is None:
        assert "Rows were not scored" in " ".join(seen.texts["p"]) + " ".join(seen.texts["li"])


def test_scores_of_a_regression_have_numbers_for_labels(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=ROWS, task="regression", labels=None, confusions=[])
    scores = scores_of(tmp_path / "train.jsonl", ROWS)
    record = replace(scores.record, classes=None)
    type(scores)(
        terms=scores.terms,
        labels=np.linspace(0, 5, 60),
        quality=scores.quality,
        probability=scores.probability,
        stratified=False,
        record=record,
        predictions={"predicted": np.linspace(0, 4, 60)},
    ).save(run / "scores.parquet")
    seen = made(run)
    assert "0.08475" in seen.texts["td"]
    assert "Some texts are missing" in " ".join(seen.texts["p"])


def test_without_plotly_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plotly.offline", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SettingsError, match="pip install plotly"):
        write_report(make_run(tmp_path))


def test_what_has_not_happened_yet_is_said_to_come(tmp_path: Path) -> None:
    run = make_run(tmp_path, events=0, history=[], status="running", quality={"enabled": True, "used": False})
    (run / "config.yaml").write_text("ranks:\n  policy: tsqlora\n")
    page = " ".join(made(run).texts["li"])
    for text in ("Nothing is logged yet", "Rows are not scored yet", "Ranks have not moved yet"):
        assert text in page


def test_the_rank_map_has_a_state_for_the_start_and_each_adjustment() -> None:
    first, events = dict.fromkeys(LAYERS, 4), rank_events(3)
    frames = rank_frames(first, events)
    assert [frame["step"] for frame in frames] == [0, 10, 20, 30]
    grid = Grid(LAYERS)
    assert grid.blocks == ["0", "1", "other"]
    for frame, ranks in zip(frames, [first, *(event.ranks for event in events)], strict=True):
        shown = [rank for row in frame["z"] for rank in row if rank is not None]
        assert sorted(shown) == sorted(ranks.values())
    assert [list(row) for row in rank_map(first, events).figure.data[0].z] == frames[-1]["z"]
    assert len(rank_frames(first, rank_events(1000))) == FRAMES


def test_the_looks_are_told_before_the_first_step(seen: Seen) -> None:
    page = " ".join(seen.texts["main"])
    for text in (
        "Look 1 at all rows, before step 1",
        "A head fitted on 60 rows replaced the model's own: its loss on rows it has not seen is 0.31, that of the "
        "old head 0.72.",
        "About 20% of the labels seem wrong, between 17% and 24%",
        "55 of 60 rows were kept.",
        "Look 2 at all rows, before step 21",
        "55 of 60 rows were kept.",
        "Every row was scored before the first step and after 20 steps",
    ):
        assert text in page
    for text in ("warm-up", "put off"):
        assert text not in page


def test_a_run_of_version_0_1_has_a_page(tmp_path: Path) -> None:
    copytree(Path(__file__).parents[1] / "fixtures" / "v0.1" / "run", tmp_path / "run")
    seen = made(tmp_path / "run")
    assert not {"before", "confusions"} & {*seen.sections()}
    assert "Every row was scored after 8 steps" in " ".join(seen.texts["li"])


def test_looks_and_adjustments_are_marked_in_the_curve() -> None:
    (drawn,) = curves([{"step": 10, "loss": 1.0}], looks=[0, 20], events=rank_events(3))
    assert [(shape.type, shape.x1) for shape in drawn.figure.layout.shapes] == [("line", 0), ("line", 20)]
    assert [note.text for note in drawn.figure.layout.annotations] == ["look", "look"]
    assert drawn.figure.data[-1].x == (10, 20, 30)


@given(st.lists(st.integers(), unique=True), st.integers(2, 20))
def test_thinning_keeps_order_and_both_ends(values: list[int], most: int) -> None:
    thin = thinned(values, most)
    assert len(thin) == min(len(values), most)
    assert thin == [value for value in values if value in thin]
    if values:
        assert (thin[0], thin[-1]) == (values[0], values[-1])
