"""The review page of an audit: one file that loads nothing, and exports the reviewed table."""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2.utils import htmlsafe_json_dumps

from tsqlora.data.media import thumbnail
from tsqlora.reports.page import POLICY, Table, environment

ON_PAGE = 2_000
"""Rows that a browser can show without delay; suspects.csv has all."""


def audit_page(folder: Path, about: Mapping[str, Any], rows: Sequence[Any]) -> str:
    """Render the page.

    `about` is the content of audit.json. `rows` are dataclasses of row, text, label, suggested_label,
    wrong_probability, kind, candidates and near. Every text is escaped. Where the text is the path of an image, a small
    copy of it is in the page.
    """
    shown = [asdict(row) for row in rows if row.kind == "check"]
    suspects = [asdict(row) for row in rows if row.kind != "check"][: max(ON_PAGE - len(shown), 0)]
    if about.get("columns", {}).get("media") == "image":
        for row in suspects + shown:
            row["picture"] = f"data:image/png;base64,{b64encode(thumbnail(row['text'])).decode()}"
    data = {
        "rows": suspects + shown,
        "classes": about["classes"],
        "answer": about["answer"],
        # A browser stores the choices by this key; another label column of the file has choices apart.
        "key": json.dumps([about["sha256"] or about["source"], about.get("columns", {}).get("label")]),
    }
    wrong = ["of them wrong"] if about["evident"] else []
    pairs = [
        [p["label"], p["suggested"], f"{p['rows']:,}", *[f"{p['wrong']:.1f}" for _ in wrong]] for p in about["pairs"]
    ]
    return (
        environment()
        .get_template("audit.html")
        .render(
            policy=POLICY,
            about=about,
            name=Path(about["source"]).name,
            left_out=len(rows) - len(data["rows"]),
            pairs=Table("Confused classes", ["label", "looks like", "rows", *wrong], pairs, [1]),
            command=f"tsqlora audit --apply reviewed.csv --out {quote(str(folder))}",
            data=htmlsafe_json_dumps(data, dumps=json.dumps),
        )
    )
