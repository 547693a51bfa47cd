"""Moving average of the weights."""

import copy
from collections.abc import Mapping
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
    one: torch's ``AveragedModel`` with ``get_ema_multi_avg_fn``. Only parameters are averaged; buffers, such as the
    statistics of batch normalization, are the trained network's. Training does not see the average.

    Args:
        decay: the share of the average that each step keeps; greater than 0, less than 1.
    """

    decay: float = field(default=0.999, validator=and_(gt(0), lt(1)))
    _model: nn.Module = field(init=False)
    _average: nn.Module = field(init=False)
    _weights: list[Tensor] = field(init=False)  # of the two networks, in the same order
    _averages: list[Tensor] = field(init=False)
    _steps: int = field(init=False, default=0)  # averaged so far

    @hookimpl
    def wrap_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Copy the network, which is complete and on its device now, before a checkpoint is loaded; wraps nothing."""
        self._model, self._average = run.model, copy.deepcopy(run.model).eval().requires_grad_(False)
        self._weights, self._averages = list(self._model.parameters()), list(self._average.parameters())
        return model

    @hookimpl
    @torch.no_grad()
    def step_end(self) -> None:
        """Move the average towards the weights, all parameters in one operation."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay if self._steps else 1.0)
        self._steps += 1

    @hookimpl
    def eval_model(self) -> nn.Module | None:
        """Return the averaged network; None, for the trained one, while there is nothing to average."""
        return self._synchronised() if self._steps else None

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the averaged network's state dict, which the plain network can load."""
        return {"steps": self._steps, "model": self._synchronised().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            RuntimeError: the state is of another network.
        """
        self._average.load_state_dict(state["model"])
        self._steps = state["steps"]

    def _synchronised(self) -> nn.Module:
        """Return the averaged network with the buffers of the trained one."""
        for buffer, current in zip(self._average.buffers(), self._model.buffers(), strict=True):
            buffer.copy_(current)
        return self._average
