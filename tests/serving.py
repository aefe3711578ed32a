"""The server of a run's page, for as long as a test needs it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsqlora.reports.watch import Watched, make_server


@contextmanager
def serving(run: Path) -> Iterator[int]:
    """The port of a server of the run."""
    with make_server(Watched(run), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
