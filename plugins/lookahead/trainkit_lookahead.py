"""Lookahead."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from attrs import field
from attrs.validators import and_, ge, gt, le, optional
from torch import Tensor
from torch.optim import Optimizer

from trainkit import Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin

__all__ = ["Lookahead", "LookaheadOptimizer"]

Sync = Literal["every_k", "first_step"]


@plugin
class Lookahead:
    """Lookahead: every k steps, slow weights follow the fast ones, which restart there (Zhang et al., NeurIPS 2019).

    Args:
        k: fast steps between two synchronisations; at least 1.
        alpha: how far the slow weights move towards the fast ones; greater than 0, at most 1.
        sync: ``every_k`` synchronises after steps k, 2k, 3k, ..., and the slow weights begin as the weights before the
            first step (Algorithm 1 of the paper); ``first_step`` synchronises after steps 1, k+1, 2k+1, ..., and they
            begin as the weights after the first step (what widespread implementations do).
        ramp: let alpha fall from 1 to `alpha` over the run: after a share p of its steps it is
            ``1 - (1 - alpha) * p ** ramp``; greater than 0. So Lookahead does nothing at first and averages at the end
            (Jordan, arXiv:2404.00498, with ramp 3). None for the same alpha throughout.
    """

    k: int = field(default=5, validator=ge(1))
    alpha: float = field(default=0.5, validator=and_(gt(0), le(1)))
    sync: Sync = "every_k"
    ramp: float | None = field(default=None, validator=optional(gt(0)))

    @hookimpl
    def transform_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        """Wrap the optimizer, which takes the fast steps."""
        alpha: float | Callable[[int], float] = self.alpha
        if self.ramp is not None:
            alpha = _ramp(self.alpha, run.total_steps, self.ramp)
        return LookaheadOptimizer(optimizer, k=self.k, alpha=alpha, sync=self.sync)


def _ramp(alpha: float, total_steps: int, power: float) -> Callable[[int], float]:
    """Return the function from steps taken to alpha, which is 1 at first and `alpha` after `total_steps`."""

    def at(steps: int) -> float:
        return 1 - (1 - alpha) * math.pow(min(steps / total_steps, 1), power)

    return at


class LookaheadOptimizer(Optimizer):
    """An optimizer around another one, whose parameter groups and state it shares.

    Args:
        base: takes the fast steps.
        k: fast steps between two synchronisations.
        alpha: step size of the slow weights, or a function from the number of steps taken to it.
        sync: when to synchronise, and where the slow weights begin (see :class:`Lookahead`).
    """

    def __init__(self, base: Optimizer, *, k: int, alpha: float | Callable[[int], float], sync: Sync) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self.k = k
        self.alpha = alpha
        self.sync = sync
        #: It synchronises when the number of steps modulo k is this.
        self.due = 0 if sync == "every_k" else 1 % k
        self.steps = 0
        self.slow: list[Tensor] = []
        self._share()

    def _share(self) -> None:
        """Hold the base optimizer's own groups and state, so that a new learning rate or group here is one there."""
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def _fast(self) -> list[Tensor]:
        """Return the parameters of all groups, which are the fast weights."""
        fast: list[Tensor] = []
        for group in self.param_groups:
            fast += group["params"]
        return fast

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a fast step and, when it is due, synchronise.

        Args:
            closure: computes the loss again, where the base optimizer needs it.

        Returns:
            What the base optimizer returns.
        """
        if self.sync == "every_k":
            self._begin()
        loss = self.base.step(closure)
        self.steps += 1
        if self.steps % self.k == self.due:
            self._begin()
            self._synchronise()
        return loss

    def _begin(self) -> None:
        """Copy the parameters that have no slow weights yet: at first all, later those of an added group."""
        without_slow = self._fast()[len(self.slow) :]
        self.slow += [parameter.clone() for parameter in without_slow]

    def _synchronise(self) -> None:
        """Compute ``slow += (fast - slow) * alpha; fast = slow``: Algorithm 1.

        The fast weights are overwritten at the end, so they hold the intermediate results, and no memory is allocated.
        Each operation rounds as it would for one parameter at a time. A fused one (lerp, or add with alpha) would round
        once less.
        """
        alpha = self.alpha(self.steps) if callable(self.alpha) else self.alpha
        fast = self._fast()
        torch._foreach_sub_(fast, self.slow)
        torch._foreach_mul_(fast, alpha)
        torch._foreach_add_(self.slow, fast)
        torch._foreach_copy_(fast, self.slow)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state, with the number of steps and the slow weights in ``lookahead``."""
        return {**self.base.state_dict(), "lookahead": {"steps": self.steps, "slow": list(self.slow)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            RecipeError: the state was saved without Lookahead, or of another model.
        """
        own = state_dict.get("lookahead")
        if own is None:
            raise RecipeError(
                "the saved optimizer state has no slow weights: it was saved without lookahead; continue with the "
                "recipe that it was saved with"
            )
        fast = self._fast()
        saved = own["slow"]  # fewer than the parameters where a group was added after the last step
        if [slow.shape for slow in saved] != [parameter.shape for parameter in fast[: len(saved)]]:
            raise RecipeError(
                "the saved slow weights do not fit the model; continue with the recipe they were saved with"
            )
        self.base.load_state_dict(state_dict)
        self._share()
        self.steps = own["steps"]
        # In the parameters' own memory format: torch's multi-tensor operations are fast only where formats agree.
        self.slow = [torch.empty_like(parameter).copy_(slow) for parameter, slow in zip(fast, saved, strict=False)]
