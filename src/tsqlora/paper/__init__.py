"""The published method, TsqLoRA (https://arxiv.org/abs/2509.18585), and what became of it here.

Theirs: a row's quality Q, from the norm of its gradient, the loss that one step on it saves, and its agreement with the
mean gradient (docs/method.md eq. 1 to 4); draws by softmax(Q/τ) (eq. 5); a layer's sensitivity (eq. 6) and ranks in
proportion to it (eq. 7). Ours: gradients of single rows that are exact and cost one backward pass; rank slots, which
let ranks move without a new optimizer; where new slots point. Neither part raised accuracy by more than noise
(docs/ranks.md, docs/results.md), so nothing of it is on by default, and nothing outside this wing needs it:
`ranks.policy: tsqlora` and `quality.preset: paper` import it.

    from tsqlora import paper

    model = paper.wrap(model, mean_rank=8)                       # LoRA with slots
    Trainer(model, args, train_dataset=rows, callbacks=[paper.RankCallback(interval=50)]).train()

    ranks = paper.allocate(paper.sensitivity(model, rows, collate), mean_rank=8)
    drawn = paper.sample(paper.score(model, rows, collate), fraction=0.5)

Names are imported on first use.
"""

import importlib
from typing import Any

_HOMES = {
    "auditing.look": ("score",),
    "paper.budget": ("Sensitivity", "allocate"),
    "paper.callback": ("RankCallback",),
    "paper.loop": ("RankLoop",),
    "paper.moves": ("RankSchedule",),
    "paper.probe": ("sensitivity",),
    "paper.slots": ("active_parameters", "active_ranks", "finalize", "wrap"),
    "auditing.draw.epochs": ("sample",),
    "model.request": ("Compute", "RowNames", "ScoringRule"),
    "auditing.scores": ("Scores",),
    "record": ("RankEvent",),
}
_INSIDE = {
    "paper.exact": ("require_exact",),
    "paper.second_pass": ("gradient_pass",),
    "paper.terms": ("PAPER_TERMS", "TERMS"),
}
"""For `published` of `model/terms.py`, where a rule has terms with gradients."""
__all__ = sorted(name for names in _HOMES.values() for name in names)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    for home, names in (_HOMES | _INSIDE).items():
        if name in names:
            value = getattr(importlib.import_module(f"tsqlora.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'tsqlora.paper' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
