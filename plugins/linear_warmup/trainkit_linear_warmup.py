"""Linear warm-up of the learning rate."""

from typing import Any

from attrs import field
from attrs.validators import and_, ge, gt, le, optional
from torch.optim import Optimizer

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["LinearWarmup"]


@plugin
class LinearWarmup:
    """Warm the learning rate up linearly, on top of any schedule (Goyal et al., arXiv:1706.02677).

    Step t, counted from 0, is taken with the schedule's learning rate times
    ``start_factor + (1 - start_factor) * min(t / steps, 1)``, exactly, whatever the schedule and wherever it is listed.
    Alone, that is torch's LinearLR. The product is set for the duration of the optimizer's step only, so the
    schedule, which may compute each rate from the one before, never meets it.

    Args:
        start_factor: the factor of the first step; greater than 0, at most 1.
        steps: optimizer steps until the factor is 1; at least 1.
        epochs: the same in epochs, of as many optimizer steps as an epoch has, rounded; greater than 0.
    """

    start_factor: float = field(default=1 / 3, validator=and_(gt(0), le(1)))
    steps: int | None = field(default=None, validator=optional(ge(1)))
    epochs: float | None = field(default=None, validator=optional(gt(0)))
    _length: int = field(init=False, default=1)  # in steps

    def __attrs_post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            given = "neither is" if self.steps is None else "both are"
            raise ValueError(f"the length of the warm-up is either 'steps' or 'epochs', and {given} given")

    @hookimpl
    def built(self, run: Run) -> None:
        """Surround the optimizer's step."""
        self._length = self.steps or max(1, round((self.epochs or 0) * run.steps_per_epoch))
        # The rates before each step that is under way: torch fires these hooks again, within the first time, where the
        # step of an optimizer's class calls that of its base class.
        before: list[list[Any]] = []

        def warm(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            factor = 1.0 if before else self.factor(run.step)
            before.append([group["lr"] for group in optimizer.param_groups])
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

        def restore(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for group, rate in zip(optimizer.param_groups, before.pop(), strict=True):
                group["lr"] = rate

        run.optimizer.register_step_pre_hook(warm)
        run.optimizer.register_step_post_hook(restore)

    @hookimpl
    def epoch_end(self, run: Run, metrics: dict[str, float]) -> None:
        """Multiply the learning rate of the epoch's record, the schedule's, by the factor reached."""
        metrics["lr"] *= self.factor(run.step)

    def factor(self, step: int) -> float:
        """Return the factor of a step, counted from 0."""
        return self.start_factor + (1 - self.start_factor) * min(step / self._length, 1.0)
