from trainkit import Run
from trainkit.plugin import hookimpl, plugin


@plugin
class AlertFile:
    """Write alerts to a file in the run directory.

    Args:
        name: of the file.
    """

    name: str = "alert.txt"

    @hookimpl
    def alert(self, run: Run, message: str) -> None:
        """Write it."""
        run.dir.write(self.name, message + "\n")
