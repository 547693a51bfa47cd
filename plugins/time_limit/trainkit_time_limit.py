"""A limit of wall time."""

import re
from time import monotonic
from typing import ClassVar

import attrs
from attrs import field

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["TimeLimit", "seconds"]

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def seconds(text: str) -> float:
    """Return the seconds that a duration such as ``90s``, ``1h30m`` or ``2d`` stands for.

    Raises:
        ValueError: it is not numbers each followed by d, h, m or s, or it is 0.
    """
    well_formed = re.fullmatch(r"(\d+(\.\d+)?[dhms])+", text, re.ASCII)
    parts = re.findall(r"([\d.]+)([dhms])", text) if well_formed else []
    total = sum(float(number) * UNITS[unit] for number, unit in parts)
    if total == 0:
        raise ValueError(
            "'limit' must be a time greater than 0, numbers followed by d, h, m or s, such as 90s, 55m, 1h30m or "
            f"2d, not {text!r}"
        )
    return total


def _check_limit(instance: object, attribute: "attrs.Attribute[str]", value: str) -> None:
    seconds(value)


@plugin
class TimeLimit:
    """Stop the run at a safe point when its time is used up.

    The clock starts when training does: building the run does not count, nor does the time before it was resumed.

    Args:
        limit: numbers followed by ``d``, ``h``, ``m`` or ``s``, such as ``90s``, ``55m``, ``1h30m`` or ``2d``; greater
            than 0.
    """

    observer: ClassVar = True

    limit: str = field(validator=_check_limit)
    _end: float = field(init=False, default=0.0)  # on the monotonic clock, which is never set back

    @hookimpl
    def fit_start(self) -> None:
        """Start the clock."""
        self._end = monotonic() + seconds(self.limit)

    @hookimpl
    def step_end(self, run: Run) -> None:
        """Ask for a stop before the safe point of this step, where a plugin that saves then sees it."""
        self._stop_if_over(run)

    @hookimpl
    def forward_end(self, run: Run) -> None:
        """Ask for a stop within an evaluation, which is repeated when the run is resumed."""
        if run.split != "train":
            self._stop_if_over(run)

    def _stop_if_over(self, run: Run) -> None:
        if monotonic() >= self._end:
            run.stop(f"time_limit {self.limit}", exit_code=143)
