from collections.abc import Iterator

import pytest

from browser import Page, browser


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """A tab of a headless browser."""
    with browser() as page:
        yield page
