"""Progress reports of long functions, for a terminal or a test."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable  # for beartype, which checks annotations while tests run
class Progress(Protocol):
    """Receives how many steps or rows of a phase are done, and during training a note, such as its loss."""

    def __call__(self, phase: str, done: int, total: int, note: str = "", /) -> None: ...


def bars(rows: int) -> Progress:
    """A bar for each pass over these rows, with the time that is left, unless transformers' bars are off."""
    from transformers.utils.logging import tqdm  # seconds to import

    shown, before = dict[str, Any](), dict[str, int]()

    def show(phase: str, done: int, total: int, note: str = "", /) -> None:
        if phase not in shown:
            shown[phase], before[phase] = tqdm(total=total, desc=f"{phase} at {rows} rows", leave=False), 0
        shown[phase].update(done - before[phase])
        before[phase] = done
        if done >= total:
            shown.pop(phase).close()

    return show
