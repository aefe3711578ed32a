"""Parts -> one HTML file: figures, texts and plotly together, and a policy that forbids every request."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from tsqlora.errors import SettingsError
from tsqlora.report import figures, html

Part = tuple[list[str], dict[str, figures.Figure]]
"""What stands in a part of a page, and the figures that it has room for."""

# No part of the page may load anything, whatever a text in it says.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_SERVED = _POLICY.replace("script-src", "script-src 'self'") + "; connect-src 'self'"
"""Of a page that asks the server that it came from how the run goes on."""
PLOTLY_PATH = "/plotly.js"


def plotly_script() -> str:
    """plotly.js, which the page brings along.  Raises SettingsError where the extra is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise SettingsError("a report needs plotly; install it with: pip install 'tsqlora[report]'") from None
    return get_plotlyjs()


def assemble(
    parts: Sequence[tuple[str, str, Part]],
    *,
    title: str,
    name: str,
    about: str,
    source: str,
    script: str | None,
    frames: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as one text, of parts with their ids and titles.

    `script` is plotly.js; with None the page is one that `watch.py` serves: it loads plotly from there, and looks
    every few seconds for a newer one.
    """
    served = script is None
    drawn = {key: figure for _, _, (_, found) in parts for key, figure in found.items()}
    return _packaged("page.html").format(
        policy=_SERVED if served else _POLICY,
        title=escape(title),
        name=escape(name),
        about=escape(about),
        source=escape(source),
        live='<output id="watched" aria-live="polite"></output>' if served else "",
        css=_packaged("page.css"),
        links="".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in parts),
        sections="\n".join(html.section(key, heading, *texts) for key, heading, (texts, _) in parts),
        data=html.data("page-data", {"figures": drawn, "frames": list(frames), "dark": figures.DARK}),
        plotly=f'<script src="{PLOTLY_PATH}"></script>' if served else f"<script>{script}</script>",
        js=_packaged("page.js") + (_packaged("watch.js") if served else ""),
    )


def _packaged(name: str) -> str:
    return (files("tsqlora.report") / name).read_text(encoding="utf-8")
