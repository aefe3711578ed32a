"""A directory -> report.html: of a run, or of a comparison, whichever it holds."""

from pathlib import Path

from tsqlora.data.write import require_place
from tsqlora.errors import SettingsError
from tsqlora.files import write_text
from tsqlora.reports.comparison import gather_comparison, is_comparison
from tsqlora.reports.page import plotly_script

REPORT_FILE = "report.html"


def write_report(directory: Path, out: Path | None = None, *, control: Path | None = None) -> Path:
    """Writes the report of a run's or a comparison's directory, by default into it; where it lies.

    `control` is another run, with whose metric that of a run is shown.

    Raises SettingsError where plotly is missing, the file cannot be written, or a comparison has a control, DataError
    where the directory cannot be read.
    """
    script = plotly_script()
    # These need plotly; the line above says so in better words than an ImportError.
    from tsqlora.reports.comparison_page import comparison_page
    from tsqlora.reports.gather import control_of, gather
    from tsqlora.reports.run_page import run_page

    place = directory / REPORT_FILE if out is None else out
    if is_comparison(directory):
        if control is not None:
            raise SettingsError(f"{directory} is a comparison, and control is for the report of a run; leave it out")
        page = comparison_page(gather_comparison(directory), script)
    else:
        page = run_page(gather(directory, control=None if control is None else control_of(control)), script)
    require_place(place)
    write_text(place, page)
    return place
