"""Moving average of the weights."""

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from attrs import field
from attrs.validators import and_, gt, lt
from torch import Tensor, nn

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["EMA"]


@plugin
class EMA:
    """Evaluate an exponential moving average of the weights (Polyak and Juditsky, 1992).

    ``average = decay * average + (1 - decay) * weights`` after each step, beginning with the weights after the first
    one: torch's ``AveragedModel`` with ``get_ema_multi_avg_fn`` and ``use_buffers``. Buffers of real numbers, such as
    the statistics of batch normalization, are averaged like parameters; others are the trained network's. Training does
    not see the average.

    Args:
        decay: the share of the average that each step keeps; greater than 0, less than 1.
        warmup: let the decay grow: after n steps it is ``(1 + n) / (10 + n)`` where that is less than `decay`, as in
            TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``. The average forgets the first weights
            sooner, so that it is of use early and in short runs.
    """

    decay: float = field(default=0.999, validator=and_(gt(0), lt(1)))
    warmup: bool = False
    _average: nn.Module = field(init=False)
    _averages: list[Tensor] = field(init=False)  # what is averaged of both networks, in the same order
    _weights: list[Tensor] = field(init=False)
    _steps: int = field(init=False, default=0)  # averaged so far

    @hookimpl
    def built(self, run: Run) -> None:
        """Copy the network, which is complete and on its device now, before a checkpoint is loaded."""
        # Counters and indices have no average; both networks have the same ones, which the copy takes from its memo.
        same = {id(buffer): buffer for buffer in run.model.buffers() if not buffer.is_floating_point()}
        self._average = copy.deepcopy(run.model, same).eval().requires_grad_(False)
        self._averages, self._weights = _real(self._average), _real(run.model)

    @hookimpl
    @torch.no_grad()
    def step_end(self) -> None:
        """Move the average towards the weights, all of them in one operation."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self._decay() if self._steps else 1.0)
        self._steps += 1

    def _decay(self) -> float:
        """Return the share of the average that the coming step keeps."""
        return min(self.decay, (1 + self._steps) / (10 + self._steps)) if self.warmup else self.decay

    @hookimpl
    def eval_model(self) -> nn.Module | None:
        """Return the averaged network; None, for the trained one, while there is nothing to average."""
        return self._average if self._steps else None

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the averaged network's state dict, which the plain network can load."""
        return {"steps": self._steps, "model": self._average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            RuntimeError: the state is of another network.
        """
        self._average.load_state_dict(state["model"])
        self._steps = state["steps"]


def _real(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point()]
