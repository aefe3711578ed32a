"""The worst findings of rows before they are trained on, from some of them."""

from dataclasses import replace
from typing import Any

import numpy as np

from tsqlora.data.table import Table
from tsqlora.errors import DataError
from tsqlora.text.conversations import Conversation, conversation
from tsqlora.text.findings import ERROR, NOTE, findings_of
from tsqlora.text.ledger import line_of
from tsqlora.text.prepared import Collate, Trained, sequences_of
from tsqlora.text.vocabulary import Vocabulary

ROWS = 500
"""Rows to look at, evenly spaced."""
SHOWN = 3


def worst_findings(
    samples: Any,
    vocabulary: Vocabulary,
    *,
    table: Table | None = None,
    collate: Collate | None = None,
) -> list[str]:
    """Say the worst errors and warnings of prepared samples, whose rows are those of `table`, if they are known.

    Raises DataError for an error in all rows of a table.
    """
    places = np.unique(np.linspace(0, len(samples) - 1, ROWS).astype(int)).tolist()
    rows = {j: Conversation(j, ()) for j in places}
    if table is not None and table.format is not None:
        ids = dict(zip(table.samples.ids[places].tolist(), places, strict=True))
        chosen = replace(table, ids=np.sort(table.samples.ids[places]))
        rows = {ids[row.id]: conversation(row.cells, table.format, row.id) for row in chosen}
    lines = [
        line_of(rows[j], [Trained(one.ids, one.targets, j)], vocabulary, cut=True)  # by the settings, if it is
        for j in places
        for one in sequences_of([samples[j]], collate)
    ]
    worst = findings_of(lines, errors={"untrained_tokens"} if vocabulary.untrained else ())
    worst = [finding for finding in worst if finding.severity != NOTE][:SHOWN]
    shown = list[str]()
    for finding in worst:
        few = ", ".join(map(str, finding.places[:3])) + (", …" if len(finding.places) > 3 else "")
        of = "all" if len(lines) == len(samples) else f"the {len(lines):,} sampled"
        shown.append(
            f"{finding.severity} {finding.name}: {finding.cause} ({finding.share:.0%} of {of} rows: {few}); "
            "see `tsqlora audit`"
        )
        if table is not None and finding.severity == ERROR and len(finding.places) == len(lines):
            cure = f"; for instance {finding.cure['TRL']}" if finding.cure else ""
            raise DataError(
                f"{finding.name} in {of} rows of {table.name}: {finding.cause}{cure}; `tsqlora audit` shows them"
            )
    return shown
