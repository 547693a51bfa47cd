"""Learning rate along a cosine."""

from typing import ClassVar, Literal

import torch
from attrs import field
from attrs.validators import ge, optional
from torch.optim import Optimizer

from trainkit import Run, Schedule
from trainkit.plugin import hookimpl, plugin

__all__ = ["CosineAnnealingLR"]


@plugin
class CosineAnnealingLR:
    """Lower the learning rate along half a cosine (Loshchilov and Hutter, ICLR 2017, without restarts).

    After t epochs (or steps) it is ``eta_min + (lr - eta_min) * (1 + cos(pi * t / t_max)) / 2`` (equation 5), as with
    torch's CosineAnnealingLR; beyond `t_max` it rises again.

    Args:
        t_max: epochs (or steps) until `eta_min` is reached; at least 1. Beyond it the rate rises again. By default the
            whole run: the recipe's epochs, or its optimizer steps.
        eta_min: the lowest learning rate; at least 0.
        unit: change the learning rate after every ``epoch`` or after every ``step``.
    """

    claims: ClassVar[tuple[str, ...]] = ("lr_schedule",)

    t_max: int | None = field(default=None, validator=optional(ge(1)))
    eta_min: float = field(default=0.0, validator=ge(0))
    unit: Literal["epoch", "step"] = "epoch"

    @hookimpl
    def scheduler(self, run: Run, optimizer: Optimizer) -> Schedule:
        """Return torch's scheduler and its unit."""
        whole_run = run.total_steps if self.unit == "step" else run.total_epochs
        t_max = self.t_max or whole_run
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, t_max, self.eta_min)
        return Schedule(scheduler, self.unit)
