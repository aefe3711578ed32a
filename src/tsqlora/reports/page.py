"""A template and its values -> one HTML file that loads nothing from elsewhere."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tsqlora.errors import SettingsError
from tsqlora.reports import metrics

# No part of the page may load anything, whatever a text in it says.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_SERVED = POLICY.replace("script-src", "script-src 'self'") + "; connect-src 'self'"
"""For a page that asks its server whether the run has gone on."""
PLOTLY_PATH = "/plotly.js"
NO_PLOTLY = "a report needs plotly; install it with: pip install plotly"


class Table(NamedTuple):
    """Rows under a caption; cells are numbers, but for the first column and those in `texts`."""

    caption: str
    head: Sequence[str]
    rows: Iterable[Sequence[Any]]
    texts: Sequence[int] = ()


def plotly_script() -> str:
    """The source of plotly.js.  Raises SettingsError where the extra is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise SettingsError(NO_PLOTLY) from None
    return get_plotlyjs()


def render(template: str, *, script: str | None, figures: Iterable[Any] = (), **values: Any) -> str:
    """The page that a template makes of figures (`figures.Drawn`) and other values.

    `script` is plotly.js; None makes a page for `watch.py`'s server, which loads plotly from there and follows the run.
    """
    from tsqlora.reports.figures import DARK  # needs plotly, which `plotly_script` asks for in better words

    drawn = {figure.id: figure for figure in figures}
    data = {
        "figures": {name: figure.figure.to_plotly_json() for name, figure in drawn.items()},
        "frames": values.pop("frames", []),
        "dark": DARK,
    }
    served = script is None
    return (
        environment()
        .get_template(template)
        .render(
            **values,
            figures=drawn,
            data=data,
            served=served,
            policy=_SERVED if served else POLICY,
            plotly=Markup(f'<script src="{PLOTLY_PATH}"></script>' if served else f"<script>{script}</script>"),
        )
    )


@cache
def environment() -> Environment:
    """Jinja with every text escaped, and a name that a template does not get is an error."""
    made = Environment(
        loader=PackageLoader("tsqlora.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_function"] = _json
    made.policies["json.dumps_kwargs"] = {}
    made.filters |= {"spec": format, "words": metrics.words, "duration": duration, "sentence": sentence}
    made.globals |= {"value_of": metrics.value_of, "gain_of": metrics.gain_of}
    return made


def _json(value: Any) -> str:
    """JSON in which a number that is not finite is null."""
    from plotly.io.json import to_json_plotly

    return str(to_json_plotly(value, engine="json"))


def duration(seconds: float) -> str:
    """
    >>> duration(42.4), duration(1200), duration(72000)
    ('42 s', '20 min', '20 h')
    """
    if seconds < 600:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 36000 else f"{seconds / 3600:,.0f} h"


def sentence(text: str) -> str:
    """
    >>> sentence("about 20% of the labels seem wrong")
    'About 20% of the labels seem wrong.'
    """
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"
