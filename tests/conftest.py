"""Before any test: no network, shapes checked while tests run, one thread, few random cases.

Test folders mirror src/tsqlora.  What tests share stands beside this file: models (tiny models, rows, batches),
oracles and scoring (slow twins, and comparisons with them), slotted (wrapped models), stock (a Trainer), loops,
runs (checkpoints, settings and the command line), made_runs (run directories without a training),
loras and kinds (adapters as files), byte_tokenizers, hostile and watch (strangers' files), browser and seen
(pages), slow (which tests `make test` leaves out).
"""

import os

# Tiny arrays are fastest on one thread, and two workers of xdist with two threads each wait for one another; numpy and
# torch read this when they are imported, and so do the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, get_type_hints

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch

# Hugging Face's libraries read these when they are imported, so nothing above may import them.
for offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[offline] = "1"

# The hook rewrites modules as they are imported, so nothing above may import tsqlora either.
LOOK = ("draw", "head_start", "labels", "look", "reasons", "saved_look", "scores")
CHECKED = (*(f"auditing.{name}" for name in LOOK), "model", "paper", "sampling", "tasks")
SOURCE = Path(__file__).parents[1] / "src" / "tsqlora"
FILES = [SOURCE / name.replace(".", "/") for name in CHECKED]
assert all(file.is_dir() or file.with_suffix(".py").is_file() for file in FILES), "a module was renamed"
# The tower: an int is a float, as type checkers have it.
BEARTYPE = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"


def checked(*, typechecker: Any, jaxtyped: Any = jaxtyping.jaxtyped) -> Callable[[Any], Any]:
    """jaxtyped where a shape is named; elsewhere the type checker alone, since jaxtyped makes each call much slower."""

    def decorated(work: Any) -> Any:
        if not isinstance(work, FunctionType) or "jaxtyping" in repr(work.__annotations__):
            return jaxtyped(work, typechecker=typechecker)
        try:
            get_type_hints(work)
        except NameError:  # imported for type checkers alone
            return work
        return typechecker(work)

    return decorated


jaxtyping.jaxtyped = checked
jaxtyping.install_import_hook([f"tsqlora.{name}" for name in CHECKED], BEARTYPE)

pytest_plugins = ["slow"]

# Tiny models are fastest on one thread, and their sums then come in one order.
torch.set_num_threads(1)

hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Start every test with the same draws, also of LoRA matrices, whatever ran before it in its process."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real models and data beside the checkout; tests that need them are skipped without."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"needs {path}, which is not there")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the test file's own, with a checkpoint, 80 rows and settings: model, train.jsonl and c.yaml."""
    from runs import set_up

    return set_up(tmp_path_factory.mktemp("place"))


@pytest.fixture
def tsqlora(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of `tsqlora(*arguments)`, a command run in this process."""
    from runs import run_cli

    return lambda *arguments: run_cli(capsys, *arguments)
