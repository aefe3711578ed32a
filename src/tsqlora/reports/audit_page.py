"""An audit -> one page on which a person goes through its rows and exports the reviewed table; it loads nothing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2.utils import htmlsafe_json_dumps

from tsqlora.reports.page import POLICY, Table, environment

ON_PAGE = 2_000
"""Rows that a browser shows without delay; the table has all."""


def audit_page(
    folder: Path,
    about: Mapping[str, Any],
    rows: Sequence[Any],
    duplicates: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> str:
    """The page as one text.

    `about` is what audit.json says, `rows` are dataclasses of row, text, label, suggested_label, wrong_probability,
    kind and candidates. Every text in it is escaped.
    """
    shown = [asdict(row) for row in rows if row.kind == "check"]
    suspects = [asdict(row) for row in rows if row.kind != "check"][: max(ON_PAGE - len(shown), 0)]
    data = {"rows": suspects + shown, "classes": about["classes"], "key": about["sha256"] or about["source"]}
    pairs = [[p["label"], p["suggested"], f"{p['rows']:,}", f"{p['wrong']:.1f}"] for p in about["pairs"]]
    return (
        environment()
        .get_template("audit.html")
        .render(
            policy=POLICY,
            about=about,
            name=Path(about["source"]).name,
            left_out=len(rows) - len(data["rows"]),
            pairs=Table(
                "Classes that are taken for each other", ["label", "looks like", "rows", "of them wrong"], pairs, [1]
            ),
            duplicates=duplicates,
            command=f"tsqlora audit --apply reviewed.csv --out {quote(str(folder))}",
            data=htmlsafe_json_dumps(data, dumps=json.dumps),
        )
    )
