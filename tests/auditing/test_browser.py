"""The page in a real browser: no error, no request, nothing overflows, and every control does what it says."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from browser import Page, axe
from made_runs import make_run
from runs import make_rows
from tsqlora.training.report.write import write_report

SHOWN = "[...document.querySelectorAll('#sample-table tbody tr')].filter(r => !r.hidden)"
AT = {"phase": "training", "time": 1_700_000_000}
LOSSES = f"{SHOWN}.map(r => Number(r.cells[6].dataset.value))"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = make_rows(300, labels=("no", "yes"))
    rows[5]["text"] = (
        "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> needle " + "long " * 100
    )
    return write_report(make_run(tmp_path_factory.mktemp("report"), rows=rows))


def until(holds: Callable[[], bool]) -> None:
    """Waits until it holds, for a minute at most."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_without_an_error_or_a_request_and_nothing_overflows(
    width: int, dark: bool, tab: Page, report: Path
) -> None:
    tab.messages.clear()
    tab.requests.clear()
    tab.open(report, width=width, dark=dark)
    assert tab.messages == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [report.as_uri()]
    assert tab.run("document.documentElement.scrollWidth") == width
    drawn = "[...document.querySelectorAll('.plot')].every(p => p.querySelector('svg.main-svg') && p.clientHeight > 50)"
    assert tab.run(drawn)
    assert tab.run("window.hacked") is None
    # Nothing sticks out of the part of the page that it is in.
    out = "[...document.querySelectorAll('section > *, figure, .tile, .controls > *, .slider > *')].filter(e => {"
    out += "const b = e.getBoundingClientRect(); return b.width && (b.left < 0 || b.right > innerWidth) }).length"
    assert tab.run(out) == 0
    boxes = "[...document.querySelectorAll('figure .scroll')].filter(b => b.scrollWidth > b.clientWidth)"
    assert set(tab.run(f"{boxes}.map(b => b.firstElementChild.id)")) <= {
        "ranks-map",
        "sensitivity-first",
        "sensitivity-last",
    }, "figures have the room that there is; only maps may scroll"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1440])
def test_axe_finds_no_serious_fault(width: int, dark: bool, tab: Page, report: Path) -> None:
    script = axe()
    tab.open(report, width=width, dark=dark)
    tab.run("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    tab.run(script + "; 0")
    found = tab.run("axe.run(document, {resultTypes: ['violations', 'incomplete']})")
    assert len(found["passes"]) > 20, "it has looked"
    faults = [
        (fault["id"], fault["impact"], node["html"][:200], node["failureSummary"])
        for fault in found["violations"]
        for node in fault["nodes"]
    ]
    assert faults == []


def test_the_theme_follows_the_system_until_it_is_chosen(tab: Page, report: Path) -> None:
    ink = "getComputedStyle(document.body).color"
    tick = "getComputedStyle(document.querySelector('#loss .xtick text')).fill"
    tab.open(report, width=1440, dark=False)
    light = tab.run(ink)
    assert tab.run(tick) == light
    tab.run("document.getElementById('theme').click()")
    dark = tab.run(ink)
    assert dark != light
    assert tab.run(tick) == dark
    assert tab.run("document.getElementById('theme').textContent") == "Light"
    tab.open(report, width=1440, dark=True)
    assert tab.run(ink) == dark


def test_the_slider_and_the_animation_show_the_ranks_of_each_adjustment(tab: Page, report: Path) -> None:
    tab.open(report, width=1440)
    cell, frame = "document.getElementById('ranks-map').data[0].z[0][0]", "document.getElementById('frame').value"
    assert tab.run(cell) == 4, "the third adjustment moved it back"
    tab.run("document.getElementById('frame').focus()")
    tab.press("ArrowLeft", 37)
    assert tab.run(cell) == 2
    assert tab.run("document.getElementById('frame').getAttribute('aria-valuetext')") == "step 20: 1 slot moved"
    assert tab.run("document.getElementById('frame-text').textContent") == "step 20: 1 slot moved"
    tab.run(f"{frame} = '3'")
    tab.run("document.getElementById('play').click()")
    assert tab.run(frame) == "0"
    until(lambda: tab.run("document.getElementById('play').textContent") == "Play")
    assert tab.run(frame) == "3"


def test_a_heading_sorts_by_number_up_and_down(tab: Page, report: Path) -> None:
    tab.open(report, width=1440)
    for direction in ("ascending", "descending"):
        tab.run("document.querySelectorAll('#sample-table thead button')[6].click()")
        values = tab.run(LOSSES)
        assert values == sorted(values, reverse=direction == "descending")
        assert tab.run("document.querySelectorAll('#sample-table thead th')[6].ariaSort") == direction
    assert tab.run("document.querySelectorAll('th[aria-sort=descending], th[aria-sort=ascending]').length") == 1


def test_search_and_lists_narrow_the_table(tab: Page, report: Path) -> None:
    tab.open(report, width=1440)

    def put(control: str, value: str) -> int:
        tab.run(f"document.getElementById('{control}').value = '{value}'")
        event = "change" if control == "list" else "input"
        tab.run(f"document.getElementById('{control}').dispatchEvent(new Event('{event}'))")
        shown = tab.run(f"{SHOWN}.length")
        assert tab.run("document.getElementById('shown').textContent") == f"{shown} shown"
        return shown

    every = tab.run(f"{SHOWN}.length")
    assert 0 < put("list", "left out") <= 3 < every
    assert put("list", "") == every
    assert put("search", "nothing-like-it") == 0
    assert 0 < put("search", "RIVER stone") < every
    assert tab.run(f"{SHOWN}.every(r => r.textContent.includes('river') && r.textContent.includes('stone'))")
