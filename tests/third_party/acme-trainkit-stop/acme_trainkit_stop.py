"""Sessions of so many safe points."""

from typing import ClassVar

from attrs import field
from attrs.validators import ge

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["Stop"]


@plugin
class Stop:
    """Stop a session after so many safe points, to be resumed.

    Args:
        after: how many; there is one after every step and one after every epoch but the last.
    """

    observer: ClassVar = True

    after: int = field(validator=ge(1))
    _seen: int = field(init=False, default=0)

    @hookimpl
    def fit_start(self) -> None:
        """Count anew."""
        self._seen = 0

    @hookimpl
    def step_end(self, run: Run) -> None:
        """Count; in ``safe_point`` itself, plugins that save might have been called already."""
        self._count(run)

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        """Count; a run that ends here is not stopped, as it would be recorded."""
        if run.epoch + 1 < run.total_epochs:
            self._count(run)

    def _count(self, run: Run) -> None:
        self._seen += 1
        if self._seen == self.after:
            run.stop(f"{self.after} safe points", exit_code=75)
