"""Render a template to one HTML file that loads nothing from elsewhere."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from tsqlora.errors import SettingsError

if TYPE_CHECKING:  # names of layers are printed without it
    from jinja2 import Environment

# The page may load nothing, whatever text it contains.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


class Table(NamedTuple):
    """Rows under a caption; all cells are numbers except in the first column and the columns in `texts`."""

    caption: str
    head: Sequence[str]
    rows: Iterable[Sequence[Any]]
    texts: Sequence[int] = ()


def plotly_script() -> str:
    """The source of plotly.js.  Raises SettingsError if plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise SettingsError("a report needs plotly; install it with: pip install plotly") from None
    return get_plotlyjs()


def render(template: str, *, script: str, figures: Iterable[Any] = (), **values: Any) -> str:
    """Render a template with figures (`figures.Drawn`) and other values; `script` is plotly.js."""
    from markupsafe import Markup

    drawn = {figure.id: figure for figure in figures}
    data = {
        "figures": {name: figure.figure.to_plotly_json() for name, figure in drawn.items()},
        "frames": values.pop("frames", []),
        "dark": values.pop("dark", {}),
    }
    page = environment().get_template(template)
    return page.render(**values, figures=drawn, data=data, policy=POLICY, plotly=Markup(script))


@cache
def environment() -> "Environment":
    """Jinja that escapes every text and raises for undefined names."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    jinja = Environment(
        loader=PackageLoader("tsqlora.auditing"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.policies["json.dumps_function"] = _json
    jinja.policies["json.dumps_kwargs"] = {}
    jinja.filters |= {"spec": format, "words": words, "duration": duration, "sentence": sentence}
    jinja.globals["value_of"] = value_of
    return jinja


def _json(value: Any) -> str:
    """JSON with null for NaN and infinity."""
    from plotly.io.json import to_json_plotly

    return str(to_json_plotly(value, engine="json"))


def words(name: str) -> str:
    """A name as a phrase."""
    return name.replace("_", " ")


def layer_places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Each layer's block number ("" outside of blocks) and kind; no two layers share a place.

    Where an encoder's and a decoder's layers would, kinds begin with the part of the name that tells them apart.

    >>> layer_places(["bert.encoder.layer.3.attention.self.query"])
    {'bert.encoder.layer.3.attention.self.query': ('3', 'attention.self.query')}
    >>> list(layer_places(["encoder.block.0.o", "decoder.block.0.o"]).values())
    [('0', 'encoder o'), ('0', 'decoder o')]
    """
    split = dict[str, tuple[list[str], str, str]]()  # what comes before the block's number, the number, the kind behind
    for name in names:
        parts = name.split(".")
        at = next((j for j, part in enumerate(parts) if part.isdigit()), None)
        before, block, kind = (parts[:-2], "", parts[-2:]) if at is None else (parts[:at], parts[at], parts[at + 1 :])
        split[name] = before, block, ".".join(kind)
    if len({(block, kind) for _, block, kind in split.values()}) == len(split):
        return {name: (block, kind) for name, (_, block, kind) in split.items()}
    leads = [lead for lead, _, _ in split.values()]
    shared = next((j for j, parts in enumerate(zip(*leads, strict=False)) if len({*parts}) > 1), min(map(len, leads)))
    places = {
        name: (block, " ".join([*lead[shared : shared + 1], kind])) for name, (lead, block, kind) in split.items()
    }
    if len({*places.values()}) == len(places):
        return places
    return {name: (block, name) for name, (_, block, _) in split.items()}


def value_of(metric: str, value: float) -> str:
    """Format a metric: a share of rows in percent.

    >>> value_of("accuracy", 0.8125), value_of("matthews", 0.8125)
    ('81.2%', '0.812')
    """
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.3f}"


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
