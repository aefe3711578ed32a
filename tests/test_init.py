"""The public names, in one list, each importable."""

import subprocess
import sys

import tsqlora


def test_every_public_name_is_there() -> None:
    for name in tsqlora.__all__:
        assert getattr(tsqlora, name).__name__ == name


def test_the_public_list_and_the_lazy_table_agree() -> None:
    assert sorted(tsqlora.__all__) == sorted(name for names in tsqlora._HOMES.values() for name in names)


def test_a_submodule_of_the_same_name_does_not_hide_a_function() -> None:
    code = "import tsqlora.layer_sensitivity, tsqlora as t; assert callable(t.sensitivity), t.sensitivity"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, tsqlora.cli.commands; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
