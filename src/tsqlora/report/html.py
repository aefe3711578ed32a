"""Pieces of HTML: text that is given to them is escaped, parts that are HTML already are not."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tsqlora.report.figures import Figure


def paragraph(text: str, *, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page with its heading; `name` is where links lead to."""
    inside = "\n".join(part for part in parts if part)
    head = f'<h2 id="{name}-title">{escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">\n{head}\n{inside}\n</section>'


def bullets(texts: Sequence[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>" if texts else ""


Tile = tuple[str, str, list[str]]
"""What stands above a number, the number, and lines below it."""


def tile(title: str, value: str, more: Sequence[str]) -> str:
    """One number in large, and what there is to say of it."""
    said = "".join(f"<span>{escape(text)}</span>" for text in more)
    return f'<div class="tile"><dt>{escape(title)}</dt><dd><strong>{escape(value)}</strong>{said}</dd></div>'


def figure(name: str, title: str, told: str) -> str:
    """The place of a figure; `told` is what a screen reader says in its stead."""
    plot = f'<div class="plot" id="{name}" role="img" aria-label="{escape(told)}"></div>'
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(title)}">{plot}</div></figure>'
    )


def table(
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    numbers: Sequence[int] = (),
    narrow: bool = False,
) -> str:
    """A table with a caption and headings; the first cell of a row is its heading.

    A narrow one is as wide as it must be, others as wide as there is room.
    """
    heads = "".join(
        f'<th scope="col"{" class=number" if j in numbers else ""}>{escape(text)}</th>' for j, text in enumerate(head)
    )
    body = "".join(f"<tr>{_cells(row, numbers)}</tr>" for row in rows)
    kind = ' class="narrow"' if narrow else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table{kind}>'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cells(row: Sequence[Any], numbers: Sequence[int]) -> str:
    first, *others = (escape(str(cell)) for cell in row)
    return f'<th scope="row">{first}</th>' + "".join(
        f"<td{' class=number' if j in numbers else ''}>{cell}</td>" for j, cell in enumerate(others, start=1)
    )


def folded(title: str, *parts: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def code(text: str) -> str:
    """Text as it stands, in a box that scrolls by itself."""
    return f'<pre tabindex="0">{escape(text)}</pre>'


def data(name: str, value: Mapping[str, Figure] | Mapping[str, Any]) -> str:
    """JSON for the page's script, in which nothing can end the element that holds it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'
