"""What the processes of cells begin with: the libraries, imported once, and without their talk."""

from tsqlora.compat.quieten import quieten

quieten()
import tsqlora.compare.preflight  # noqa: E402, F401
from tsqlora.compare.run import commit  # noqa: E402

commit()
