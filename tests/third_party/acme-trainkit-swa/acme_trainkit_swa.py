"""Stochastic weight averaging."""

import copy
from typing import Any

import torch
from attrs import field
from attrs.validators import ge
from torch import nn

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["SWA"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@plugin
class SWA:
    """Evaluate a stochastic weight average (Izmailov et al., UAI 2018).

    The average is over the weights at the end of each epoch from ``start`` on. Before it is evaluated, the statistics
    of its batch normalizations are estimated anew from one pass over the training images. Training does not see it.

    Args:
        start: the first epoch whose end is averaged, counted from 1.
    """

    start: int = field(validator=ge(1))
    _average: nn.Module = field(init=False)
    _count: int = field(init=False, default=0)
    _estimated: bool = field(init=False, default=False)

    @hookimpl
    def built(self, run: Run) -> None:
        """Copy the network."""
        self._average = copy.deepcopy(run.model).requires_grad_(False).eval()

    @hookimpl
    def step_end(self, run: Run) -> None:
        """Average at the end of an epoch: ``epoch_end`` would be too late, after the evaluation."""
        if run.epoch + 1 < self.start or (run.step % run.steps_per_epoch and not run.at_max_steps):
            return
        self._count += 1
        self._estimated = False
        with torch.no_grad():
            for mean, weight in zip(self._average.parameters(), run.model.parameters(), strict=True):
                mean.lerp_(weight, 1 / self._count)
            for kept, buffer in zip(self._average.buffers(), run.model.buffers(), strict=True):
                kept.copy_(buffer)

    @hookimpl
    def eval_model(self, run: Run) -> nn.Module | None:
        """Return the average, with statistics of its own."""
        if not self._count:
            return None
        if not self._estimated:
            self._estimate(run)
            self._estimated = True
        return self._average

    def _estimate(self, run: Run) -> None:
        """Estimate the statistics of batch normalization, as torch's ``update_bn`` does, within the run's contexts."""
        norms = [m for m in self._average.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
        if not norms:
            return
        momenta = [m.momentum for m in norms]
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # the plain mean over batches
        self._average.train()
        with torch.no_grad():
            for batch in run.iterate("train"):
                run.compute_loss(batch, self._average)
        self._average.eval()
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum

    def state_dict(self) -> dict[str, Any]:
        """Return the average."""
        return {"average": self._average.state_dict(), "count": self._count, "estimated": self._estimated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._average.load_state_dict(state["average"])
        self._count, self._estimated = state["count"], state["estimated"]
