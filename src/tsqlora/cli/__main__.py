"""`python -m tsqlora.cli`, for launchers that need a module."""

from tsqlora.cli import main

main()
