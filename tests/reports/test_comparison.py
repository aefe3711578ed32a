"""The page of a comparison: every number that its JSON has, from the JSON alone, and no text of it is code."""

import html
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest

from made_runs import make_comparison
from seen import Seen
from tsqlora.errors import DataError, SettingsError
from tsqlora.reports.comparison import Mean, gather_comparison, is_comparison
from tsqlora.reports.comparison_page import comparison_page, difference_plot
from tsqlora.reports.metrics import value_of
from tsqlora.reports.write import write_report
from tsqlora.training.record import RunRecord

HOSTILE = "</script><script>alert('x')</script><b>&"


def made(out: Path) -> Seen:
    return Seen(comparison_page(gather_comparison(out), "/* plotly */"))


def records(out: Path) -> Iterator[tuple[Path, RunRecord]]:
    for path in out.glob("*/run.json"):
        yield path.parent, RunRecord.load(path.parent)


def test_a_page_has_its_parts_in_order_and_a_place_for_each_figure(tmp_path: Path) -> None:
    seen = made(make_comparison(tmp_path))
    assert seen.sections() == ["summary", "found", "differences", "costs", "metrics", "settings"]
    assert len(seen.ids()) == len(set(seen.ids()))
    drawn = seen.page_data()["figures"]
    assert list(drawn) == ["difference-plot", "by-seconds", "by-passes"]
    for name in drawn:
        place = next(attributes for _, attributes in seen.tags if attributes.get("id") == name)
        assert place["aria-label"]
    assert len(seen.texts["table"]) == len(seen.texts["caption"])


def test_numbers_are_those_of_the_table_and_of_its_cells(tmp_path: Path) -> None:
    out = make_comparison(tmp_path)
    table = json.loads((out / "comparison.json").read_text())["table"]
    comparison = gather_comparison(out)
    rows = made(out).texts["tr"]
    for method, row in zip(comparison.methods, table, strict=True):
        assert (method.name, method.verdict) == (row["name"], row["verdict"])
        assert method.metrics["accuracy"] == Mean(**row["metrics"]["accuracy"])
        shown = next(text for text in rows if text.startswith(row["name"]))
        assert value_of("accuracy", *method.metrics["accuracy"][:2]) in shown
        assert row["verdict"] in shown
    assert comparison.methods[0].passes == 2 * 300
    assert comparison.methods[2].phases == dict.fromkeys(("building", "look", "training"), 2.5)
    items = made(out).texts["li"]
    assert items[0].startswith("Better than lora+all: lora+random (+2.")
    tiles = made(out).texts["dd"]
    assert tiles[0].startswith("75.5%tsqlora+quality")
    assert tiles[1].startswith("2of 2 methods other than lora+all")


def test_points_of_the_paired_plot_are_the_seeds(tmp_path: Path) -> None:
    comparison = gather_comparison(make_comparison(tmp_path))
    rings, *marks = difference_plot(comparison).figure.data
    assert len(rings.x) == 2 * 3
    assert [mark.name for mark in marks if mark.x] == ["better"]
    assert sum(rings.x[:3]) / 3 == pytest.approx(marks[0].x[0])
    table = made(tmp_path / "comparison").texts["table"][1]
    assert "lora+all70.0%70.8%71.6%" in table


def test_learning_rates_that_were_tried_are_shown_and_only_the_chosen_one_counts(tmp_path: Path) -> None:
    out = make_comparison(tmp_path, rates=(0.001, 0.01))
    comparison = gather_comparison(out)
    assert [(tried.rate, tried.chosen) for tried in comparison.sweep][:2] == [(0.001, True), (0.01, False)]
    assert all(len(method.trained) == 3 for method in comparison.methods)
    seen = made(out)
    assert "rates" in seen.sections()
    assert "✓ 69.9%" in seen.texts["td"]
    assert "69.0%" in seen.texts["td"]


def test_rates_that_were_given_are_no_choice_and_rows_that_chose_are_named(tmp_path: Path) -> None:
    out = make_comparison(tmp_path, rates=(0.001, 0.01))
    table = json.loads((out / "comparison.json").read_text())
    (out / "comparison.json").write_text(json.dumps(table | {"sweep": []}))
    assert "rates" not in made(out).sections()
    (out / "comparison.json").write_text(json.dumps(table | {"sweep": [0.001, 0.01]}))
    warning = "There are no test rows:"
    assert not any(warning in text for text in made(out).texts["p"])
    for run, record in records(out):
        del record.metrics["test"]
        record.save(run)
    assert any(warning in text for text in made(out).texts["p"])


def test_the_command_that_repeats_it_is_whole_and_quoted(tmp_path: Path) -> None:
    out = make_comparison(tmp_path).rename(tmp_path / "my comparison")
    table = json.loads((out / "comparison.json").read_text())
    (out / "comparison.json").write_text(json.dumps(table | {"rates": {"lora+all": 0.001}, "sweep": []}))
    command = made(out).texts["pre"][0]
    assert shlex.split(command) == [
        *("tsqlora", "compare", "my comparison/config.yaml", "--methods", "lora+all,lora+random,tsqlora+quality"),
        *("--seeds", "0,1,2", "--equal", "steps", "--metric", "accuracy", "--lr", "lora+all=0.001"),
        *("--out", "my comparison-again"),
    ]
    (out / "comparison.json").write_text(json.dumps(table | {"rates": {}, "sweep": [0.001, 1e-05]}))
    assert "--lr-sweep 0.001,1e-05 --out" in made(out).texts["pre"][0]


def test_versions_and_precisions_that_differ_among_cells_are_all_named(tmp_path: Path) -> None:
    out = make_comparison(tmp_path)
    assert "Precision: bfloat16" in made(out).texts["p"]
    for run, record in records(out):
        lora = record.compared["method"] == "lora"
        record.compared["bf16"], record.versions = lora, {"python": "3.11" if lora else "3.12"}
        record.save(run)
    assert "Precision: bfloat16, float32" in made(out).texts["p"]
    assert "3.11, 3.12" in made(out).texts["td"]


def test_too_few_seeds_are_said_to_be_too_few(tmp_path: Path) -> None:
    seen = made(make_comparison(tmp_path, seeds=(0,)))
    assert seen.texts["li"][0].startswith("Too few seeds to tell from lora+all: lora+random (+2.")
    assert seen.page_data()["figures"]["difference-plot"]["data"][-1]["x"]


def test_what_failed_is_named_and_a_page_is_made_of_what_there_is(tmp_path: Path) -> None:
    seen = made(make_comparison(tmp_path, fails=[("lora+random", 1)]))
    assert "lora+random failed with seed 1: the loss is not finite at step 7." in seen.texts["li"]
    assert "failed" in seen.texts["td"]
    reference = [("lora+all", seed) for seed in range(3)]
    seen = made(make_comparison(tmp_path / "2", fails=reference))
    assert "only one method has results" in " ".join(seen.texts["p"])
    every = [(name, seed) for name in ("lora+all", "lora+random", "tsqlora+quality") for seed in range(3)]
    assert made(make_comparison(tmp_path / "3", fails=every)).sections() == ["found", "settings"]
    assert made(make_comparison(tmp_path / "4", ["lora+all"])).page_data()["figures"].keys() >= {"by-seconds"}


def test_seeds_that_drew_at_random_are_told_with_their_reason(tmp_path: Path) -> None:
    seen = made(make_comparison(tmp_path, at_random=[("tsqlora+quality", 1), ("tsqlora+quality", 2)]))
    assert "tsqlora+quality drew rows at random with seed 1: the model is at chance." in seen.texts["li"]
    assert "tsqlora+quality (2 of 3 seeds drew at random)" in seen.texts["th"]
    assert not any("at random with seed" in text for text in made(make_comparison(tmp_path / "2")).texts["li"])


def test_of_a_loss_the_lowest_is_the_best(tmp_path: Path) -> None:
    for metric, best in (("loss", "Lowest mean"), ("accuracy", "Highest mean"), ("matthews", "Highest mean")):
        seen = made(make_comparison(tmp_path / metric, metric=metric))
        assert best in seen.texts["dt"]
        assert seen.texts["li"][0].startswith("Better than lora+all:")  # however it is measured
        assert ("points" in seen.texts["li"][0]) == (metric == "accuracy")


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    out = make_comparison(tmp_path)
    for path in out.glob("*/*"):
        text = path.read_text()
        for word in ("lora", "abc123", "3.11", "matthews", "some/model", "seem wrong", "look"):
            text = text.replace(word, json.dumps(word + HOSTILE)[1:-1])
        path.write_text(text)
    seen, plain = made(out), made(make_comparison(tmp_path / "2"))
    assert {tag for tag, _ in seen.tags} <= {tag for tag, _ in plain.tags}
    assert sum(tag == "script" for tag, _ in seen.tags) == 3
    assert html.escape(HOSTILE, quote=False) in seen.page_data()["figures"]["by-seconds"]["data"][0]["name"]
    for figure in seen.page_data()["figures"].values():
        assert HOSTILE not in json.dumps(figure)


def test_a_directory_is_known_by_its_contents_and_a_copy_gives_the_same_bytes(tmp_path: Path) -> None:
    out = make_comparison(tmp_path)
    first = write_report(out)
    assert first == out / "report.html"
    assert is_comparison(out)
    assert not is_comparison(tmp_path)
    text = first.read_bytes()
    first.unlink()
    (tmp_path / "other").mkdir()
    with pytest.raises(SettingsError, match="control"):
        write_report(out, control=tmp_path / "run")
    assert write_report(out.rename(tmp_path / "other" / "comparison")).read_bytes() == text


@pytest.mark.parametrize("broken", ["{}", "no JSON", None])
def test_what_is_no_finished_comparison_is_refused(broken: str | None, tmp_path: Path) -> None:
    out = make_comparison(tmp_path)
    (out / "comparison.json").unlink()
    if broken is not None:
        (out / "comparison.json").write_text(broken)
    with pytest.raises(DataError, match=r"comparison\.json"):
        gather_comparison(out)


def test_a_comparison_that_was_copied_without_a_method_is_refused(tmp_path: Path) -> None:
    out = make_comparison(tmp_path)
    for path in out.glob("lora+random*"):
        rmtree(path)
    with pytest.raises(DataError, match=r"lora\+random"):
        gather_comparison(out)
