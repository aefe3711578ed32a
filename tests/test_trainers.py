"""tsqlora can be installed beside the trainers that train on its rows: their ranges of versions overlap with ours."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TRAINERS = json.loads((ROOT / "tests" / "fixtures" / "trainers.json").read_text())
"""Requires-Dist from the METADATA of each trainer's wheel on PyPI: what it requires of packages that we require."""
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
CONFLICTS = {
    # datasets before 4.4 cannot pickle on Python 3.14, and LLaMA-Factory requires 4.0 or lower.
    ("llamafactory", "0.9.5"): {("3.14", "datasets")}
}
"""By trainer: each Python and package for which no version can suit both."""


def ranges(lines: list[str], python: str) -> dict[str, SpecifierSet]:
    environment = {"python_version": python, "sys_platform": "linux"}
    requirements = [Requirement(line) for line in lines]
    return {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }


def overlap(ours: SpecifierSet, theirs: SpecifierSet) -> bool:
    """Whether a version is in both: then the higher of the two lower bounds is, and a lower bound is a release."""
    both = ours & theirs
    return any(part.version in both for part in both)


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: f"{trainer['name']}-{trainer['version']}")
def test_a_version_of_each_package_suits_us_and_the_trainer(trainer: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["quantized"]]
    pythons = SpecifierSet(trainer["requires-python"]) & SpecifierSet(project["requires-python"])
    conflicts = set[tuple[str, str]]()
    for python in pythons.filter(PYTHONS):
        ours, theirs = ranges(lines, python), ranges(trainer["requires-dist"], python)
        conflicts |= {(python, name) for name in theirs if not overlap(ours[name], theirs[name])}
    assert conflicts == CONFLICTS.get((trainer["name"], trainer["version"]), set())


@pytest.mark.parametrize(
    ("ours", "theirs", "shared"),
    [
        (">=4.0,<6", ">=2.16.0,<=4.0.0", True),
        (">=4.1,<6", ">=2.16.0,<=4.0.0", False),
        (">=0.25.1", "==0.25.1", True),
        (">=0.29", "==0.25.1", False),
        (">=2.0", "", True),
        (">=2.0,<3", ">=3", False),
        (">=5.2,<6", "!=4.52.0,<=5.6.0,>=4.55.0", True),
    ],
)
def test_ranges_overlap_where_one_version_is_in_both(ours: str, theirs: str, shared: bool) -> None:
    assert overlap(SpecifierSet(ours), SpecifierSet(theirs)) == shared
