"""The command line."""


def main() -> None:
    """Run `tsqlora`; it imports the commands here, so that importing the package stays cheap."""
    from tsqlora.cli.commands import main as run

    run()
