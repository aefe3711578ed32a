"""What may name something on the hub: never a path."""

import re
from dataclasses import dataclass

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def is_hub_id(name: str) -> bool:
    """Whether a text can be the id of a model or a data set: NAME or OWNER/NAME.

    >>> [is_hub_id(name) for name in ("gpt2", "org/model-1.0", "../x", "a/b/c", "a/..", "/etc", "https://x", "a--b")]
    [True, True, False, False, False, False, False, False]
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_revision(name: str) -> bool:
    """Whether a text can be a branch, tag or commit: it becomes part of a path in the hub's cache.

    >>> [is_revision(name) for name in ("main", "refs/pr/1", "v1.0", "../../x", "/etc/passwd", "")]
    [True, True, True, False, False, False]
    """
    return all(re.fullmatch(r"[\w.+-]+", part, re.ASCII) and part.strip(".") for part in name.split("/"))


@dataclass(frozen=True, slots=True)
class DatasetName:
    """A data set of the hub as a setting names it: ID, ID:CONFIGURATION, ID[SPLIT] or ID:CONFIGURATION[SPLIT].

    >>> DatasetName.of("nyu-mll/glue:mrpc[train[:100]]")
    DatasetName(id='nyu-mll/glue', configuration='mrpc', split='train[:100]')
    """

    id: str
    configuration: str | None
    split: str | None

    @classmethod
    def of(cls, name: str) -> "DatasetName":
        found = re.fullmatch(r"([^:\[]+)(?::([\w.+-]+))?(?:\[(.+)\])?", name)
        return cls(name, None, None) if found is None else cls(*found.groups())
