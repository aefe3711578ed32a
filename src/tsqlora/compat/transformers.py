"""What tsqlora needs of transformers that is private or differs between versions."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from transformers import TrainerState


def set_deletion_order(checkpoints: Iterable[Path]) -> None:
    """Makes the Trainer delete these checkpoints in this order, and after them those that it writes later.

    With save_total_limit the Trainer deletes the folder with the oldest date, and trusts dates only where they span a
    second. A clock that was set back would make it delete the newest.
    """
    for second, path in enumerate(checkpoints, start=1):
        os.utime(path, (second, second))


def saved_note(state: TrainerState, key: str) -> dict[str, Any]:
    """A dict of ours in the trainer_state.json of every checkpoint that the Trainer writes from now on; change it."""
    return cast(dict[str, Any], state.stateful_callbacks).setdefault(key, {})
