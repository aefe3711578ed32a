"""`python -m tsqlora`."""

from tsqlora.cli import main

main()
