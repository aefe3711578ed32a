"""The slow tests: `make test` leaves out those that tests/slow.txt lists, `make slow` measures and lists them.

A test is slow if one of its cases takes more than LIMIT seconds of the processor, or all of them together more than
TOTAL; child processes and its part of the fixtures that it shares with other tests of its file count.
"""

import resource
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).with_name("slow.txt")
LIMIT = 1.2
TOTAL = 2.2
QUICK = {"tests/days/test_days.py::test_days_hold_for_a_minute"}
"""Never listed: their length is chosen, and `make test` has them."""
HEAD = "# The slow tests, measured by `make slow`: a file, or a test of it with all its parameters.\n"


def listed() -> list[str]:
    """The entries of tests/slow.txt."""
    return [line for line in LIST.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def names_of(item: pytest.Item) -> tuple[str, str]:
    """The file, and the test without its parameters, as the list names them."""
    test = item.nodeid.partition("[")[0]
    return test.partition("::")[0], test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measure", action="store_true", help="list the slow ones of these tests in tests/slow.txt")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--measure"):
        config.pluginmanager.register(Measure(), "tsqlora-measure")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = set(listed())
    for item in items:
        if not slow.isdisjoint(names_of(item)):
            item.add_marker("slow")


def seconds() -> float:
    """Seconds of the processor that this process and its children have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


class Measure:
    """Times each test and each fixture that several tests of a file share; rewrites the entries of those files."""

    def __init__(self) -> None:
        self.tests = list[tuple[str, str, float, list[str]]]()
        self.fixtures = defaultdict[tuple[str, str], float](float)
        self.shared = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Generator[None, Any, Any]:
        begin, before = seconds(), self.shared
        result = yield
        if fixturedef.scope != "function":
            own = seconds() - begin - (self.shared - before)
            self.fixtures[fixturedef.baseid, fixturedef.argname] += own
            self.shared += own
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Generator[None, Any, Any]:
        begin, before = seconds(), self.shared
        result = yield
        own = seconds() - begin - (self.shared - before)
        self.tests.append((*names_of(item), own, item.fixturenames))
        return result

    def pytest_sessionfinish(self) -> None:
        uses = Counter((file, name) for file, _, _, names in self.tests for name in names)
        parts = {used: self.fixtures.get(used, 0.0) / count for used, count in uses.items()}
        slow, quick, cases = set[str](), set[str](), defaultdict[str, list[float]](list)
        for file, test, own, names in self.tests:
            cases[test].append(own + sum(parts[file, name] for name in names))
        for test, own in cases.items():
            if test not in QUICK and (max(own) > LIMIT or sum(own) > TOTAL):
                slow.add(test)
            else:
                quick.add(test.partition("::")[0])
        files = {file for file, *_ in self.tests}
        entries = {entry for entry in listed() if entry.partition("::")[0] not in files}
        entries |= files - quick | {test for test in slow if test.partition("::")[0] in quick}
        LIST.write_text(HEAD + "".join(f"{entry}\n" for entry in sorted(entries)), encoding="utf-8")
