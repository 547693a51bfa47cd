"""One cycle of the learning rate."""

from typing import ClassVar, Literal

import torch
from attrs import field
from attrs.validators import and_, ge, gt, le, lt, optional
from torch import Tensor
from torch.optim import Optimizer

from trainkit import Run, Schedule
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin

__all__ = ["OneCycleLR"]


@plugin
class OneCycleLR:
    """Raise the learning rate to a maximum and lower it to almost 0, once (Smith and Topin, arXiv:1708.07120).

    The options are those of ``torch.optim.lr_scheduler.OneCycleLR``, with its defaults, and the rates of all steps are
    torch's. The rate changes after every optimizer step. The optimizer's own learning rate is not used, but for
    proportions: a parameter group of ten times that rate has ten times the rate of the cycle.

    Args:
        max_lr: the highest learning rate; greater than 0.
        total_steps: optimizer steps of the cycle; at least 1. By default all steps of the run. Beyond it
            the rate stays as it was at the end.
        pct_start: the part of the cycle in which the learning rate rises; at least 0, at most 1.
        anneal_strategy: the shape of rise and fall: ``cos`` or ``linear``.
        cycle_momentum: let the momentum (or the first beta) move against the learning rate.
        base_momentum: the momentum at the highest learning rate; at least 0, below 1.
        max_momentum: the momentum at the beginning and at the end; at least 0, below 1.
        div_factor: the first learning rate is `max_lr` divided by this; greater than 0.
        final_div_factor: the last learning rate is the first divided by this; greater than 0.
        three_phase: after a fall that mirrors the rise, fall to the last learning rate in a third phase (the paper);
            `pct_start` is below one half then.
    """

    claims: ClassVar[tuple[str, ...]] = ("lr_schedule",)

    max_lr: float = field(validator=gt(0))
    total_steps: int | None = field(default=None, validator=optional(ge(1)))
    pct_start: float = field(default=0.3, validator=and_(ge(0), le(1)))
    anneal_strategy: Literal["cos", "linear"] = "cos"
    cycle_momentum: bool = True
    base_momentum: float = field(default=0.85, validator=and_(ge(0), lt(1)))
    max_momentum: float = field(default=0.95, validator=and_(ge(0), lt(1)))
    div_factor: float = field(default=25.0, validator=gt(0))
    final_div_factor: float = field(default=1e4, validator=gt(0))
    three_phase: bool = False

    @hookimpl
    def scheduler(self, run: Run, optimizer: Optimizer) -> Schedule:
        """Return torch's scheduler, which steps after every optimizer step.

        Raises:
            RecipeError: the optimizer has no momentum to cycle, or the rise is one step long.
        """
        total_steps = self.total_steps or run.total_steps
        if self.cycle_momentum and not {"momentum", "betas"} & optimizer.defaults.keys():
            raise RecipeError(
                f"{type(optimizer).__name__} has neither a momentum nor betas to cycle; set cycle_momentum: false"
            )
        if self.pct_start * total_steps == 1:  # torch would divide by the 0 steps between first and highest rate
            raise RecipeError(
                f"'pct_start': {self.pct_start:g} of {total_steps} steps is one step, and the first one cannot be at "
                "both the first and the highest learning rate; set it to 0, or to more than one step"
            )
        scheduler = _OneCycle(
            optimizer,
            self._max_lrs(optimizer),
            total_steps=total_steps,
            pct_start=self.pct_start,
            anneal_strategy=self.anneal_strategy,
            cycle_momentum=self.cycle_momentum,
            base_momentum=self.base_momentum,
            max_momentum=self.max_momentum,
            div_factor=self.div_factor,
            final_div_factor=self.final_div_factor,
            three_phase=self.three_phase,
        )
        return Schedule(scheduler, "step")

    def _max_lrs(self, optimizer: Optimizer) -> list[float]:
        """Return the highest rate of each group, in proportion to the group's rate now."""
        own = optimizer.defaults["lr"]
        return [self.max_lr * (group["lr"] / own if own else 1.0) for group in optimizer.param_groups]


class _OneCycle(torch.optim.lr_scheduler.OneCycleLR):
    """torch's cycle, whose rate stays as it is after the last step."""

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of the next step.

        A schedule moves on after the last step of its cycle, too. There, torch (2.14) extrapolates, even below 0. At
        the move after that it fails.
        """
        if self.last_epoch >= self.total_steps:
            return [group["lr"] for group in self.optimizer.param_groups]
        return super().get_lr()
