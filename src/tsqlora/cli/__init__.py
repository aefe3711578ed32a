"""The command line."""


def main() -> None:
    """Run `tsqlora`; the commands are imported here, so that importing the package stays cheap."""
    from tsqlora.cli.commands import main as run

    run()
