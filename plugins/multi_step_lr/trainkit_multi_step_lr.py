"""Learning rate by milestones."""

from itertools import pairwise
from typing import ClassVar, Literal

import attrs
import torch
from attrs import field
from attrs.validators import gt
from torch.optim import Optimizer

from trainkit import Schedule
from trainkit.plugin import hookimpl, plugin

__all__ = ["MultiStepLR"]


def _check_milestones(instance: object, attribute: "attrs.Attribute[list[int]]", value: list[int]) -> None:
    increasing = all(earlier < later for earlier, later in pairwise(value))
    if not value or value[0] < 1 or not increasing:
        raise ValueError(f"'milestones' must be increasing numbers from 1 on, such as [60, 85, 100], not {value}")


@plugin
class MultiStepLR:
    """Multiply the learning rate by gamma at each milestone, as torch's MultiStepLR does.

    Args:
        milestones: after so many epochs (or steps) the learning rate changes; increasing, each at least 1. With 60 the
            61st epoch is the first with the new one. Milestones that the run does not reach have no effect.
        gamma: the factor; greater than 0.
        unit: what milestones count: ``epoch``, as is usual where they are published, or ``step``.
    """

    claims: ClassVar[tuple[str, ...]] = ("lr_schedule",)

    milestones: list[int] = field(validator=_check_milestones)
    gamma: float = field(default=0.1, validator=gt(0))
    unit: Literal["epoch", "step"] = "epoch"

    @hookimpl
    def scheduler(self, optimizer: Optimizer) -> Schedule:
        """Return torch's scheduler and its unit."""
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.milestones, self.gamma)
        return Schedule(scheduler, self.unit)
