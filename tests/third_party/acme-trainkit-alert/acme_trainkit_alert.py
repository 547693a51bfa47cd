from typing import ClassVar

from attrs import field

from trainkit import Run
from trainkit.hookspecs import hookspec
from trainkit.plugin import hookimpl, plugin


class AlertHooks:
    """What this plugin offers to others."""

    @hookspec("notify")
    def alert(self, run: Run, message: str) -> None:
        """Receive an alert.

        Args:
            run: the run.
            message: one line for people.
        """


@plugin
class Alert:
    """Alert other plugins when a metric first passes a value.

    Args:
        metric: its name, such as ``test_accuracy``.
        above: the value.
    """

    hookspecs: ClassVar = (AlertHooks,)

    metric: str
    above: float
    _passed: bool = field(init=False, default=False)

    @hookimpl
    def epoch_end(self, run: Run, metrics: dict[str, float]) -> None:
        """Look at the metric."""
        if self._passed or metrics[self.metric] <= self.above:
            return
        self._passed = True
        alert = run.hooks.notify("alert")
        alert(run, f"{self.metric} passed {self.above:g} in epoch {run.epoch + 1}")

    def state_dict(self) -> dict[str, bool]:
        """Return whether the value was passed."""
        return {"passed": self._passed}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        """Continue from a checkpoint."""
        self._passed = state["passed"]
