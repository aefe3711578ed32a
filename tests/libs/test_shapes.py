"""Annotations of shapes, where jaxtyping is not installed."""

import subprocess
import sys

EVERY_MODULE = """
import importlib, pkgutil, sys
sys.modules["jaxtyping"] = None
import tsqlora
for module in pkgutil.walk_packages(tsqlora.__path__, "tsqlora."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def test_every_module_is_imported_without_jaxtyping() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", EVERY_MODULE], check=True)
