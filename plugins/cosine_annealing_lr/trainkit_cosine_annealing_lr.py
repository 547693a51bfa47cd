"""Learning rate along a cosine."""

import math
from typing import Any, ClassVar, Literal

from attrs import field
from attrs.validators import ge, optional
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR as TorchCosine

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
        stretch: let a run that is resumed with more epochs go on: what is left of the half cosine is spread over what
            is left of the longer run, so the rate goes on falling from where it is, and never rises. Where the curve
            had come to its end, the rate stays at `eta_min`. Without it such a run is refused.
    """

    claims: ClassVar[tuple[str, ...]] = ("lr_schedule",)
    without_effect: ClassVar[tuple[str, ...]] = ("stretch",)  # until the length changes, and that is recorded

    t_max: int | None = field(default=None, validator=optional(ge(1)))
    eta_min: float = field(default=0.0, validator=ge(0))
    unit: Literal["epoch", "step"] = "epoch"
    stretch: bool = False

    @hookimpl
    def scheduler(self, run: Run, optimizer: Optimizer) -> Schedule:
        """Return torch's scheduler and its unit."""
        whole_run = run.total_steps if self.unit == "step" else run.total_epochs
        t_max = self.t_max or whole_run
        return Schedule(_Cosine(optimizer, t_max, self.eta_min, stretch=self.stretch), self.unit)


class _Cosine(TorchCosine):
    """torch's schedule, whose rest can be spread over a longer run.

    Args:
        optimizer: whose rates it sets.
        T_max: epochs (or steps) of the half cosine.
        eta_min: the lowest rate.
        stretch: whether loading the state of a shorter schedule spreads its rest over this one.
    """

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float, *, stretch: bool) -> None:  # noqa: N803
        self.stretch = stretch
        self.stretched: list[tuple[int, float]] = []  # from which epoch, and how far along the half cosine that was
        super().__init__(optimizer, T_max, eta_min)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of the next epoch: torch's, until the schedule was stretched."""
        if not self.stretched:
            return super().get_lr()
        height = (1 + math.cos(math.pi * self._progress(self.last_epoch))) / 2
        return [self.eta_min + (base - self.eta_min) * height for base in self.base_lrs]

    def _progress(self, epoch: int) -> float:
        """Return how far along the half cosine an epoch is, 0 to 1."""
        start, done = self.stretched[-1] if self.stretched else (0, 0.0)
        return min(done + (1 - done) * (epoch - start) / max(self.T_max - start, 1), 1.0)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; of a shorter schedule only what is left is spread, so what was trained stays as it was."""
        length, stretch = self.T_max, self.stretch
        super().load_state_dict(state)
        self.stretch = stretch
        if stretch and length > self.T_max:
            done = self._progress(self.last_epoch)
            self.T_max = length
            self.stretched = [*self.stretched, (self.last_epoch, done)]
