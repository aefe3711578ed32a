"""Importing does nothing, a run opens no connection and reveals no secret, the audit reports known flaws of pins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs import set_up

ROOT = Path(__file__).parents[1]
SECRET = "hf_0123456789abcdefSECRET"

IMPORTS = """
import os, pkgutil, random, signal, socket, sys, threading, importlib
import numpy, torch, transformers, peft, datasets, pyarrow, scipy.stats, sklearn.metrics  # theirs is not tested
sys.modules["jaxtyping"] = None  # users need not have it
def state():
    handlers = {n: signal.getsignal(n) for n in signal.valid_signals() if n not in (signal.SIGKILL, signal.SIGSTOP)}
    return {"environment": dict(os.environ), "folder": os.getcwd(), "files": sorted(os.listdir()), "signals": handlers,
            "threads": threading.active_count(), "random": (random.getstate(), torch.initial_seed()),
            "torch": (torch.get_num_threads(), torch.get_default_dtype()), "arguments": list(sys.argv)}
before, touched = state(), []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.mkdir", "os.remove"):
        touched.append((event, args))
    if event == "open" and args[1] and set(args[1]) & set("wax+"):
        touched.append((event, args))
sys.addaudithook(hook)
import tsqlora
# __main__ is the program: that is its effect.
programs = ("tsqlora.__main__", "tsqlora.cli.__main__")
names = [m.name for m in pkgutil.walk_packages(tsqlora.__path__, "tsqlora.") if m.name not in programs]
for name in names:
    importlib.import_module(name)
after = state()
assert after == before, [name for name in after if after[name] != before[name]]
assert not touched, touched
print(len(names))
"""

RUN = """
import os, socket, sys
attempts = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        attempts.append((event, args[-1]))
sys.addaudithook(hook)
from tsqlora.cli import commands as cli
sys.argv = ["tsqlora", *sys.argv[1:]]
try:
    cli.main()
finally:
    assert not attempts, attempts
"""


def test_importing_any_module_touches_nothing_and_needs_no_jaxtyping(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 80


def test_a_run_asks_nobody_and_writes_no_secret_down(tmp_path: Path) -> None:
    control = {"quality": {"enabled": False, "fraction": 1.0}, "training": {"epochs": 2}}
    config = set_up(tmp_path, rows=40, **control) / "c.yaml"
    # Not offline: whoever wanted to ask could.
    retained = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    secrets = dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"), SECRET)
    home = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home" / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "train", str(config), "--out", str(tmp_path / "run"), "--debug"],
        env=retained | secrets | home, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert SECRET not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("answer", "code", "output"),
    [
        ("", 0, "nothing was audited"),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', 0, "1 of 1 pinned packages have no known"),
        (
            '{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": []}]}]}',
            1,
            "a 1 has CVE-1, mended in no version yet; raise the pin",
        ),
    ],
)
def test_the_audit_fails_on_flaws_alone(answer: str, code: int, output: str, tmp_path: Path) -> None:
    (tmp_path / "pip_audit.py").write_text(f"print({answer!r})")
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "audit.py")],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code
    assert output in done.stdout


def test_every_package_that_ci_installs_is_pinned() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = settings["optional-dependencies"]
    expected = [*settings["dependencies"], *extras["demo"], *extras["dev"]]
    names = {
        entry.split(";")[0].split("[")[0].split("=")[0].split(">")[0].strip().lower().replace("_", "-")
        for entry in expected
    }
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert names - pinned == {"torch"}, json.dumps(sorted(names - pinned))
