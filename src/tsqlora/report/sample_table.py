"""The table of samples: searched, sorted and narrowed by the page's script, whole without it."""

from html import escape

from tsqlora.report.html import paragraph
from tsqlora.report.samples import Sample, Samples

_FOLDED = 180
"""Characters of a text that are shown before the rest is asked for."""
_LISTS = ("most valuable", "least valuable", "most suspicious")


def sample_table(samples: Samples) -> str:
    """Controls, and a row for each sample."""
    lists = [name for name in _LISTS if any(name in row.lists for row in samples.rows)]
    says = ["model says"] if samples.label == "label" else []
    heads = ["text", "why here", samples.label, *says, "Q", "p", *(t.replace("_", " ") for t in samples.terms), "row"]
    kinds = [""] * (3 + len(says)) + [" class=number"] * (len(heads) - 3 - len(says))
    head = "".join(
        f'<th scope="col" aria-sort="none"{kind}><button type="button">{escape(name)}</button></th>'
        for name, kind in zip(heads, kinds, strict=True)
    )
    body = "".join(_row(row, samples.terms, says=bool(says)) for row in samples.rows)
    options = "".join(f'<option value="{name}">{name}</option>' for name in (*lists, "likely wrong", "left out"))
    how = f"{len(samples.rows):,} of {samples.all:,} rows: the first of each list. A heading sorts."
    missing = (
        paragraph(f"Texts are left out where they were not found: {samples.without_texts}.", kind="missing")
        if samples.without_texts
        else ""
    )
    return (
        f"{paragraph(how, kind='how')}{missing}"
        '<div class="controls"><label for="search">Search</label><input type="search" id="search" autocomplete="off">'
        f'<label for="list">Show</label><select id="list"><option value="">every list</option>{options}</select>'
        '<output id="found" aria-live="polite"></output></div>'
        '<div class="scroll tall" tabindex="0" role="region" aria-label="Samples"><table id="sample-table">'
        f"<caption>Samples</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(sample: Sample, terms: tuple[str, ...], *, says: bool) -> str:
    marks = [*sample.lists, *(["likely wrong"] if sample.likely_wrong else [])]
    if sample.reason != "kept":
        marks.append("left out")
    told = [*sample.lists, *(["likely wrong label"] if sample.likely_wrong else [])]
    if sample.reason != "kept":
        told.append(f"left out: {sample.reason}")
    said = "" if sample.predicted is None else sample.predicted
    if sample.sure is not None:
        said += f" ({sample.sure:.0%})"
    differs = ' class="differs"' if sample.likely_wrong else ""
    numbers = [sample.quality, sample.probability, *(sample.terms[name] for name in terms)]
    cells = "".join(f'<td class="number" data-value="{value!r}">{value:.3g}</td>' for value in numbers)
    return (
        f'<tr data-lists="{escape("|".join(marks))}"><th scope="row" class="text">{_text(sample.text)}</th>'
        f'<td class="why">{escape(", ".join(told))}</td>'
        f"<td>{escape(sample.label)}</td>{f'<td{differs}>{escape(said)}</td>' if says else ''}{cells}"
        f'<td class="number" data-value="{sample.id}">{sample.id}</td></tr>'
    )


def _text(text: str | None) -> str:
    """A text, whose beginning stands for it where it is long."""
    if text is None:
        return "<i>not found</i>"
    if len(text) <= _FOLDED:
        return escape(text)
    return f"<details><summary>{escape(text[:_FOLDED])}</summary>{escape(text[_FOLDED:])}</details>"
