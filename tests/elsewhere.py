"""A Python environment of its own that has what this one has, but for tsqlora: where our adapters must load too."""

import sysconfig
import venv
from pathlib import Path


def environment_without_us(folder: Path) -> Path:
    """Makes the environment; its interpreter.

    Packages are links to this environment's. Files of paths (.pth) are left out: an editable installation is one.
    Run it with -I, so that neither PYTHONPATH nor the working directory brings tsqlora back.
    """
    venv.create(folder, symlinks=True)
    paths = sysconfig.get_paths("venv", {"base": str(folder), "platbase": str(folder)})
    site = Path(paths["purelib"])
    for packages in {Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))}:
        for package in packages.iterdir():
            link = site / package.name
            ours = package.name.startswith(("tsqlora", "_tsqlora"))
            if not ours and package.suffix != ".pth" and not link.exists():
                link.symlink_to(package)
    return Path(paths["scripts"]) / "python"
