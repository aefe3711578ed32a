"""The site builds without a warning, its links and images are there, and no page asks for anything elsewhere."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import tsqlora
from browser import browser

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LOADS = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}
"""What a browser fetches by itself, and where it is named."""


class Page(HTMLParser):
    """What a page loads, what it links to, and the places in it that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        arguments = {name: value or "" for name, value in attrs}
        self.ids |= {arguments["id"]} if "id" in arguments else set()
        if tag in LOADS and LOADS[tag] in arguments and arguments.get("rel") != "canonical":
            self.loads.append(arguments[LOADS[tag]])
        if tag == "a" and "href" in arguments:
            self.links.append(arguments["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zensical", reason="pip install '.[docs]'")
    copy = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", copy)
    shutil.copytree(DOCS, copy / "docs")
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=copy, capture_output=True, text=True, timeout=300
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "No issues found" in output
    assert not re.search(r"warning|griffe:|error", output, re.IGNORECASE), output
    return copy / "site"


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for path in pages:
        page = Page(path)
        assert page.loads
        for target in page.loads:
            parts = urlsplit(target)
            assert (parts.scheme, parts.netloc) == ("", ""), f"{path.name} loads {target}"
            if path.name != "404.html":
                assert (path.parent / unquote(parts.path)).is_file(), f"{path.name}: no {target}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_what_links_point_to_is_there(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path not in ("", ".") else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: no {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: no place {link}"


def test_code_blocks_are_blocks(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert "no-run" not in path.read_text(encoding="utf-8"), f"a fence of {path.name} is shown as text"
        assert "```" not in path.read_text(encoding="utf-8"), f"a fence of {path.name} is shown as text"


def test_a_browser_asks_for_nothing_from_elsewhere_and_nothing_overflows(site: Path) -> None:
    with browser() as page:
        for name, width in (("index.html", 390), ("api.html", 1440), ("cli.html", 390), ("tutorial.html", 390)):
            page.open(site / name, width=width)
            assert page.run("document.documentElement.scrollWidth") <= width, name
    elsewhere = [url for url in page.requests if not url.startswith(("file:", "data:", "blob:", "about:"))]
    assert elsewhere == []
    # Search needs the site to be served: what it looks for on a disk is not made.
    assert set(page.messages) <= {"Failed to load resource: net::ERR_FILE_NOT_FOUND"}
    assert {url.rpartition("/")[2] for url in page.requests if url.endswith(".js") and "assets" not in url} <= {
        "search.js"
    }


def test_every_page_is_in_the_menu() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [page for section in settings["nav"] for pages in section.values() for p in pages for page in p.values()]
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")), (
        "mkdocs.yml's nav"
    )


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: tsqlora\.(\w+)$", text, re.MULTILINE)
    assert sorted(named) == sorted(tsqlora.__all__)
