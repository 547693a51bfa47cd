"""Loss and accuracy."""

from collections.abc import Mapping
from typing import Any, Literal

import attrs
import torch
from attrs import field
from attrs.validators import ge
from torch import Tensor

from trainkit import Batch, Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["Metrics"]


@attrs.define(eq=False)
class _Total:
    """What a split has added up to so far."""

    loss: Tensor  # float64 [], over images, not over batches: the last batch is usually smaller
    correct: Tensor  # int64 []
    images: int = 0


@plugin
class Metrics:
    """Mean loss and top-1 accuracy in percent over all images of a split, counted on the device.

    They are exact: losses add up in float64, correct images as integers. A prediction is the class of the greatest
    logit, the first of several that are equal. A target of probabilities counts as its most probable class, so under
    mixup the training accuracy is that of the dominant image.

    Args:
        every: record the loss of the current batch every so many training steps; 0 for never.
    """

    every: int = field(default=50, validator=ge(0))
    _totals: dict[str, _Total] = field(init=False, factory=dict)  # by split
    _loss: Tensor | None = field(init=False, default=None)  # of the current training batch

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Move what a checkpoint brought to the device of the run."""
        for total in self._totals.values():
            total.loss, total.correct = total.loss.to(run.device), total.correct.to(run.device)

    @hookimpl
    def epoch_start(self) -> None:
        """Forget the training split of the epoch before."""
        self._totals.pop("train", None)

    @hookimpl
    def forward_end(self, run: Run, batch: Batch, output: Tensor, loss: Tensor) -> None:
        """Add a batch: five small operations on the device, nothing read from it."""
        total = self._totals.get(run.split)
        if total is None:
            total = self._totals[run.split] = _Total(
                torch.zeros((), dtype=torch.float64, device=loss.device),
                torch.zeros((), dtype=torch.int64, device=loss.device),
            )
        loss, targets = loss.detach(), batch.targets
        images = targets.shape[0]
        if targets.ndim == 2:
            targets = targets.argmax(1)
        total.loss.add_(loss, alpha=images)
        total.correct.add_(output.argmax(1).eq_(targets).sum())  # eq_ in int64 spares the sum a conversion from bool
        total.images += images
        if run.split == "train":
            self._loss = loss

    @hookimpl
    def step_end(self, run: Run) -> None:
        """Record the loss of the step's (last) batch now and then."""
        if self.every and run.step % self.every == 0 and self._loss is not None:
            run.log({"loss": self._loss})

    @hookimpl
    def metrics(self, split: Literal["train", "test"]) -> dict[str, Tensor | float] | None:
        """Report a split.

        The test split is forgotten here. The training split stays until the next epoch begins: a run that is stopped
        while testing resumes after its last training batch and reports that epoch again.

        Returns:
            ``loss`` and ``accuracy`` (0 to 100), scalars on the device, or None if no batch was seen.
        """
        total = self._totals.get(split) if split == "train" else self._totals.pop(split, None)
        if total is None:
            return None
        return {"loss": total.loss / total.images, "accuracy": total.correct.double() * 100 / total.images}

    def state_dict(self) -> dict[str, Any]:
        """Return what each split has added up to."""
        return {
            split: {"loss": total.loss.clone(), "correct": total.correct.clone(), "images": total.images}
            for split, total in self._totals.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, whatever device its tensors are on."""
        self._totals = {
            split: _Total(total["loss"].clone(), total["correct"].clone(), total["images"])
            for split, total in state.items()
        }
