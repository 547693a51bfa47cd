"""Average of the weights of several epochs."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from attrs import Attribute, field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from trainkit import Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin

__all__ = ["SWA", "update_bn"]


def _check_start(instance: object, attribute: "Attribute[Any]", value: int | float) -> None:
    if not (0 <= value < 1 or (value >= 1 and value % 1 == 0)):
        raise ValueError(f"'start' must be a part of the run, from 0 to below 1, or an epoch, from 1 on, not {value}")


@plugin
class SWA:
    """Evaluate the average of the weights at the ends of the last epochs (Izmailov et al., UAI 2018).

    Torch's ``AveragedModel``: parameters have an equal average over all epochs from `start` on, and buffers are the
    trained network's. Then the statistics of batch normalization are estimated anew, as torch's ``update_bn`` does, on
    all training images of the epoch as training saw them. Training does not see the average.

    Args:
        start: the first epoch whose weights are averaged, counted from 1; or, below 1, the part of the run before it.
    """

    start: int | float = field(default=0.75, validator=_check_start)
    _average: AveragedModel = field(init=False)
    _averaged: int = field(init=False, default=0)  # epochs

    @hookimpl
    def built(self, run: Run) -> None:
        """Copy the network, which is complete and on its device now."""
        self._average = AveragedModel(run.model)
        self._average.eval().requires_grad_(False)

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Look at the length of the run.

        Raises:
            RecipeError: it ends before the average begins.
        """
        if self._first(run) >= run.total_epochs:
            raise RecipeError(
                f"'start': the run has {run.total_epochs} epochs, and the average begins with epoch {self.start}; "
                "begin earlier"
            )

    def _first(self, run: Run) -> int:
        """Return the number of the first epoch that is averaged, counted from 0."""
        if self.start >= 1:
            return int(self.start) - 1
        return math.floor(self.start * run.total_epochs + 1e-9)  # 0.29 * 100 is a little below 29

    @hookimpl
    @torch.no_grad()
    def step_end(self, run: Run) -> None:
        """Take the weights at the end of a whole epoch, before it is evaluated.

        The statistics are estimated here, too: where the network is only used, there are no training images.
        """
        if run.batch_index < run.batches_per_epoch or run.epoch < self._first(run):
            return
        self._average.update_parameters(run.model)
        self._averaged += 1
        update_bn(run, self._average.module)

    @hookimpl
    def eval_model(self) -> nn.Module | None:
        """Return the averaged network; None, for the trained one, until the first epoch is averaged."""
        return self._average.module if self._averaged else None

    def state_dict(self) -> dict[str, Any]:
        """Return the number of averaged epochs and the averaged network's state dict, which the plain one can load."""
        return {"averaged": self._averaged, "model": self._average.module.state_dict() if self._averaged else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            RuntimeError: the state is of another network.
        """
        if state["averaged"]:
            self._average.module.load_state_dict(state["model"])
        self._averaged = state["averaged"]
        self._average.n_averaged.fill_(self._averaged)


def update_bn(run: Run, model: nn.Module) -> None:
    """Estimate the statistics of batch normalization anew, as the mean over all batches of the current epoch.

    Torch's function of that name, within the run's contexts. What is in evaluation mode in the network that is trained,
    such as a part that `freeze` froze, is so here, and keeps its statistics.

    Args:
        run: the run, in training.
        model: a copy of its network, in evaluation mode; it is left in that mode.
    """
    for part, trained in zip(model.modules(), run.model.modules(), strict=True):
        part.training = trained.training
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.training]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # each batch counts the same
    for batch in run.iterate("train") if norms else ():
        with run.context:
            model(batch.images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
