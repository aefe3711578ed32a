"""A directory -> report.html: of a run, or of a comparison, whichever it holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

from tsqlora.data.write import require_place
from tsqlora.errors import SettingsError
from tsqlora.files import write_text
from tsqlora.reports.comparison import gather_comparison, is_comparison
from tsqlora.reports.page import plotly_script

REPORT_FILE = "report.html"


@dataclass(frozen=True, slots=True)
class Report:
    """A report that was written; a notebook shows the page itself."""

    path: Path

    def _repr_html_(self) -> str:
        page = escape(self.path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" title="report" style="width: 100%; height: 40em; border: 0"></iframe>'


def report(directory: str | Path, *, texts: Sequence[str] | None = None, control: str | Path | None = None) -> Report:
    """Write report.html into the directory of a training, a run or a comparison, and show it in a notebook.

        tsq.report("out", texts=dataset["text"])

    The directory is the `output_dir` of a Trainer with QualityCallback or RankCallback, a run of `tsqlora train`, or
    what `tsqlora compare` made.

    Args:
        texts: of the rows that were scored, in their order, for the page; a run of `tsqlora train` finds them itself.
        control: the directory of another run, with whose metric this one's is compared.

    Raises SettingsError where plotly is not installed, DataError where the directory has no record of a training.
    """
    return Report(write_report(Path(directory), control=None if control is None else Path(control), texts=texts))


def write_report(
    directory: Path, out: Path | None = None, *, control: Path | None = None, texts: Sequence[str] | None = None
) -> Path:
    """Writes the report of a run's or a comparison's directory, by default into it; where it lies.

    `control` is another run, with whose metric that of a run is shown; `texts` as in `report`.

    Raises SettingsError where plotly is missing, the file cannot be written, or a comparison has a control, DataError
    where the directory cannot be read.
    """
    script = plotly_script()
    # These need plotly; the line above says so in better words than an ImportError.
    from tsqlora.reports.comparison_page import comparison_page
    from tsqlora.reports.gather import control_of, gather, read_scores
    from tsqlora.reports.run_page import run_page

    place = directory / REPORT_FILE if out is None else out
    if is_comparison(directory):
        if control is not None:
            raise SettingsError(f"{directory} is a comparison, and control is for the report of a run; leave it out")
        page = comparison_page(gather_comparison(directory), script)
    else:
        other = None if control is None else control_of(control)
        page = run_page(gather(directory, control=other, read=partial(read_scores, texts=texts)), script)
    require_place(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, page)
    return place
