"""The commit of the code that made a result."""

import subprocess
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@cache
def commit() -> str | None:
    """The commit of the imported code when first called: `preload` calls it, hours before the last cell ends."""
    return commit_of(PACKAGE)


def commit_of(package: Path) -> str | None:
    """The commit of a source checkout, with "-dirty" where the package differs from it; None for an installed one."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=True).stdout

    try:
        # A virtual environment may lie in another project's checkout, which does not track this file.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD").strip() + ("-dirty" if git("status", "--porcelain", ".").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
