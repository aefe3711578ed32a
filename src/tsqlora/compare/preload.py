"""Imports that all cell processes share: the libraries, loaded once and without their messages."""

from tsqlora.compat.quieten import quieten

quieten()
from tsqlora.compare.cell import commit  # noqa: E402

commit()  # the commit of the imported code, hours before the last cell ends
