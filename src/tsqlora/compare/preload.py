"""What the processes of cells begin with: the libraries, imported once and without their messages."""

from tsqlora.compat.quieten import quieten

quieten()
import tsqlora.compare.preflight  # noqa: E402, F401
from tsqlora.compare.origin import commit  # noqa: E402

commit()
