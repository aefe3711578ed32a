"""The page of a text audit: findings first, and each row as its tokens, trained ones coloured."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2.utils import htmlsafe_json_dumps

from tsqlora.data.batches import IGNORED
from tsqlora.data.chat import ANSWER, Conversation
from tsqlora.reports.page import POLICY, environment
from tsqlora.text.findings import Finding
from tsqlora.text.ledger import Line
from tsqlora.text.look import Losses
from tsqlora.text.prepared import Trained
from tsqlora.text.vocabulary import Vocabulary

ON_PAGE = 200
"""Rows of a finding that the page shows; findings.json has all."""
MOST_TOKENS = 1_500
"""Tokens of a row that the page shows."""
PROMPT, TRAINED, UNEXPECTED, STOP, LOST = "p", "t", "u", "s", "l"
UNEXPECTED_LOSS = 5.0
"""−log p in nats of a token that the model does not expect at all."""


def text_page(
    folder: Path,
    about: Mapping[str, Any],
    rows: Sequence[Conversation],
    lines: Sequence[Line],
    findings: Sequence[Finding],
    tokens: Mapping[int, Sequence[Trained]],
    vocabulary: Vocabulary,
    losses: Losses,
) -> str:
    """Render the page.  `tokens` has the sequences of the rows that it shows."""
    shown = sorted({place for finding in findings for place in finding.places[:ON_PAGE]})
    data = {
        "findings": [{"name": f.name, "places": list(f.places[:ON_PAGE])} for f in findings],
        "rows": {place: _row(rows[place], lines[place], tokens.get(place, ()), vocabulary, losses) for place in shown},
        "key": json.dumps([about["sha256"] or about["source"], about["rows"]]),
    }
    return (
        environment()
        .get_template("text.html")
        .render(
            policy=POLICY,
            about=about,
            name=Path(about["source"]).name,
            findings=findings,
            on_page=ON_PAGE,
            reviewable=about["sha256"] is not None,
            command=f"tsqlora audit --apply reviewed.csv --out {quote(str(folder))}",
            unexpected=bool(losses),
            data=htmlsafe_json_dumps(data, dumps=json.dumps),
        )
    )


def _row(
    row: Conversation, line: Line, sequences: Sequence[Trained], vocabulary: Vocabulary, losses: Losses
) -> dict[str, Any]:
    """A row for the page's script: its tokens, and the kind of each as a letter."""
    parts = [_tokens(one, vocabulary, losses.get((row.row, one.side), {})) for one in sequences] or [_untrained(row)]
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


def _untrained(row: Conversation) -> tuple[str, list[str], str]:
    """A row that has no tokens: its texts, the answer as lost."""
    messages = row.messages or ()
    kinds = [LOST if message.role == ANSWER else PROMPT for message in messages]
    return "", [f"{message.role}: {message.content[:1000]}\n" for message in messages], "".join(kinds)
