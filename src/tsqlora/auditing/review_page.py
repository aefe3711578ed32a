"""The review pages of an audit: each is one file that loads nothing, and exports the reviewed table."""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2.utils import htmlsafe_json_dumps

from tsqlora.auditing.page import POLICY, Table, environment
from tsqlora.auditing.texts.ledger import Line
from tsqlora.auditing.texts.look import Losses
from tsqlora.auditing.texts.prepared import Trained
from tsqlora.auditing.texts.vocabulary import Vocabulary
from tsqlora.rows.batches import IGNORED
from tsqlora.rows.chat import ANSWER, Chat
from tsqlora.rows.media import thumbnail

LABELS_ON_PAGE, OF_A_FINDING = 2_000, 200
"""Rows that a browser can show without delay; suspects.csv and findings.json have all."""
MOST_TOKENS = 1_500
"""Tokens of a row that the page shows."""
PROMPT, TRAINED, UNEXPECTED, STOP, LOST = "p", "t", "u", "s", "l"
UNEXPECTED_LOSS = 5.0
"""−log p in nats of a token that the model does not expect at all."""


def _render(template: str, folder: Path, about: Mapping[str, Any], data: Any, **values: Any) -> str:
    """The page, whose script gets `data`; a browser stores the choices by its key."""
    name, command = Path(about["source"]).name, f"tsqlora apply reviewed.csv --out {quote(str(folder))}"
    data = htmlsafe_json_dumps(data, dumps=json.dumps)
    page = environment().get_template(template)
    return page.render(policy=POLICY, about=about, name=name, command=command, data=data, **values)


def audit_page(folder: Path, about: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Render the page.

    `about` is the content of audit.json, and `rows` are the audit's listing. Every text is escaped. Where the text is
    the path of an image, a small copy of it is in the page.
    """
    checks = [row for row in rows if row["kind"] == "check"]
    shown = [row for row in rows if row["kind"] != "check"][: max(LABELS_ON_PAGE - len(checks), 0)] + checks
    if about.get("columns", {}).get("media") == "image":
        pictures = (b64encode(thumbnail(row["text"])).decode() for row in shown)
        shown = [row | {"picture": f"data:image/png;base64,{one}"} for row, one in zip(shown, pictures, strict=True)]
    data = {
        "rows": shown,
        "classes": about["classes"],
        "answer": about["answer"],
        # Another label column of the file has choices apart.
        "key": json.dumps([about["sha256"] or about["source"], about.get("columns", {}).get("label")]),
    }
    wrong = ["of them wrong"] if about["evident"] else []
    pairs = [
        [p["label"], p["suggested"], f"{p['rows']:,}", *[f"{p['wrong']:.1f}" for _ in wrong]] for p in about["pairs"]
    ]
    table = Table("Confused classes", ["label", "looks like", "rows", *wrong], pairs, [1])
    return _render("audit.html", folder, about, data, left_out=len(rows) - len(shown), pairs=table)


def text_page(
    folder: Path,
    about: Mapping[str, Any],
    rows: Sequence[Chat],
    lines: Sequence[Line],
    tokens: Mapping[int, Sequence[Trained]],
    vocabulary: Vocabulary,
    losses: Losses,
) -> str:
    """Render the page.  `about` is what the audit returns; `tokens` has the sequences of the rows that it shows."""
    listed = [{"name": one["name"], "places": one["places"][:OF_A_FINDING]} for one in about["findings"]]
    shown = sorted({place for finding in listed for place in finding["places"]})
    data = {
        "findings": listed,
        "rows": {place: _row(rows[place], lines[place], tokens.get(place, ()), vocabulary, losses) for place in shown},
        "key": json.dumps([about["sha256"] or about["source"], about["rows"]]),
    }
    values = {"reviewable": about["sha256"] is not None, "on_page": OF_A_FINDING, "unexpected": bool(losses)}
    return _render("text.html", folder, about, data, **values)


def _row(row: Chat, line: Line, sequences: Sequence[Trained], vocabulary: Vocabulary, losses: Losses) -> dict[str, Any]:
    """A row for the page's script: its tokens, and the kind of each as a letter."""
    parts = [_tokens(one, vocabulary, losses.get((row.row, one.side), {})) for one in sequences]
    if not parts:  # its texts, the answer as lost
        texts = [f"{message.role}: {message.content[:1000]}\n" for message in row.whole]
        parts = [("", texts, "".join(LOST if message.role == ANSWER else PROMPT for message in row.whole))]
    return {
        "fate": line.fate,
        "detail": line.detail,
        "trained": line.trained_tokens,
        "lost": line.lost_tokens or 0,
        "parts": [{"side": side, "tokens": texts, "kinds": kinds} for side, texts, kinds in parts],
        "answer": row.answer[:300],
    }


def _tokens(one: Trained, vocabulary: Vocabulary, losses: Mapping[int, float]) -> tuple[str, list[str], str]:
    """Side, texts and kinds; tokens that share a character are one."""
    texts, kinds, held = list[str](), list[str](), b""
    both = zip(one.ids[:MOST_TOKENS].tolist(), one.targets[:MOST_TOKENS].tolist(), strict=True)
    for place, (token, target) in enumerate(both):
        held += vocabulary.tokens[token] if 0 <= token < len(vocabulary.tokens) else b""
        try:
            text = held.decode()
        except UnicodeDecodeError:
            if len(held) < 8:
                continue
            text = held.decode(errors="replace")
        held = b""
        texts.append(text)
        trained = UNEXPECTED if losses.get(place, 0) > UNEXPECTED_LOSS else TRAINED
        kinds.append(PROMPT if target == IGNORED else STOP if target in vocabulary.stops else trained)
    return one.side, texts, "".join(kinds)
