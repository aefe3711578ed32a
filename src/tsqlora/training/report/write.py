"""Write report.html for the run in a directory."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tsqlora.auditing.page import plotly_script
from tsqlora.files import write_text, writing
from tsqlora.rows.write import require_place

REPORT_FILE = "report.html"


@dataclass(frozen=True, slots=True)
class Report:
    """A written report, which a notebook shows inline."""

    path: Path

    def _repr_html_(self) -> str:
        page = escape(self.path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" title="report" style="width: 100%; height: 40em; border: 0"></iframe>'


def report(directory: str | Path, *, texts: Sequence[str] | None = None) -> Report:
    """Write report.html into the directory of a training, and show it in a notebook.

        tsq.report("out", texts=dataset["text"])

    The directory is the `output_dir` of a Trainer with QualityCallback, or a run of `tsqlora train`.

    Args:
        texts: texts of the scored rows, in their order; a run of `tsqlora train` needs none.

    Raises SettingsError if plotly is not installed, DataError if the directory has no record of a training.
    """
    return Report(write_report(Path(directory), texts=texts))


def write_report(directory: Path, out: Path | None = None, *, texts: Sequence[str] | None = None) -> Path:
    """Write the report of a run, by default into its directory, and return the path.

    `texts` as in `report`. Raises SettingsError if plotly is missing or the file cannot be written, DataError if the
    directory cannot be read.
    """
    script = plotly_script()
    # These import plotly; the line above has a better message than an ImportError.
    from tsqlora.training.report.run_page import run_page

    place = directory / REPORT_FILE if out is None else out
    with writing(place):
        page = run_page(directory, script, texts)
    require_place(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, page, private=True)
    return place
