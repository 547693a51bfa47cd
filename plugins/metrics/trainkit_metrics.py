"""Loss and accuracy."""

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
from attrs import field
from attrs.validators import ge
from torch import Tensor

from trainkit import Batch, Metric, Run
from trainkit.data import describe
from trainkit.errors import RecipeError
from trainkit.numerics import widest_float
from trainkit.plugin import hookimpl, plugin

__all__ = ["Metrics"]


@attrs.define(eq=False)
class _Total:
    """What a split has added up to so far, on the device."""

    loss: Tensor  # float64 (on MPS float32) [], over images, not over batches: the last batch is usually smaller
    correct: Tensor  # int64 []
    images: int = 0

    @classmethod
    def zero(cls, device: torch.device) -> "_Total":
        loss = torch.zeros((), dtype=widest_float(device), device=device)
        return cls(loss, torch.zeros((), dtype=torch.int64, device=device))

    def to(self, device: torch.device) -> "_Total":
        return _Total(self.loss.to(device, copy=True), self.correct.to(device, copy=True), self.images)


@plugin
class Metrics:
    """Mean loss and top-1 accuracy in percent over all images of a split, counted on the device.

    They are exact: losses add up in float64, correct images as integers. A prediction is the class of the greatest
    logit, the first of several that are equal; an output that is not finite is a wrong prediction. A target of
    probabilities, which mixup and cutmix make of classes, counts as its most probable class, so the training accuracy
    is that of the dominant image. Data with other targets than classes need ``accuracy: false``.

    Args:
        every: record the loss of the current batch every so many training steps; 0 for never.
        accuracy: report the accuracy beside the loss; needs classes as targets.
    """

    without_effect: ClassVar = ("every",)

    every: int = field(default=50, validator=ge(0))
    accuracy: bool = True
    _totals: dict[str, _Total] = field(init=False, factory=dict)  # by split
    _loss: Tensor | None = field(init=False, default=None)  # of the current batch

    @hookimpl
    def built(self, run: Run) -> None:
        """Look at the targets of the data.

        Raises:
            RecipeError: they are no classes, and the accuracy is wanted.
        """
        if self.accuracy and not run.data.has_class_targets:
            target = run.data.first_target
            raise RecipeError(
                f"the accuracy is that of classes, and the data's targets are {describe(target)}; set "
                "plugins.metrics.accuracy=false to report the loss alone, and list a plugin that measures such targets"
            )

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Move what a checkpoint brought to the device of the run."""
        self._totals = {split: total.to(run.device) for split, total in self._totals.items()}

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        """Begin the training split of an epoch."""
        self._totals["train"] = _Total.zero(run.device)

    @hookimpl
    def eval_start(self, run: Run) -> None:
        """Begin a split that is evaluated."""
        self._totals[run.split] = _Total.zero(run.device)

    @hookimpl
    def forward_end(self, run: Run, batch: Batch, output: Tensor, loss: Tensor) -> None:
        """Add a batch up; nothing is read from the device."""
        total = self._totals[run.split]
        self._loss = loss.detach()
        correct = _correct(batch, output.detach()) if self.accuracy else total.correct.new_zeros(())
        if run.world > 1 and run.split == "train":
            # In each step, so that the state of any process is that of all, whenever it is saved.
            sums = torch.stack([self._loss.to(total.loss.dtype) * len(batch), correct.to(total.loss.dtype)])
            run.processes.all_reduce(sums)
            self._loss = (sums[0] / run.images_in_batch).to(self._loss.dtype)
            total.loss.add_(sums[0])
            total.correct.add_(sums[1].to(total.correct.dtype))
            total.images += run.images_in_batch
            return
        total.loss.add_(self._loss, alpha=len(batch))
        total.correct.add_(correct)
        total.images += len(batch)

    @hookimpl
    def step_end(self, run: Run) -> None:
        """Record the loss of the step's (last) batch now and then."""
        if self.every and run.step % self.every == 0 and self._loss is not None:
            run.log({"loss": self._loss.clone()})

    @hookimpl
    def metrics(self, run: Run, split: str) -> dict[str, Metric] | None:
        """Report a split.

        Returns:
            ``loss`` and ``accuracy`` (0 to 100), scalars on the device, or None if no batch was seen.
        """
        total = self._totals.get(split)
        is_shared = run.world > 1 and split != "train"
        if total is None or (total.images == 0 and not is_shared):
            return None
        images: Tensor | int = total.images
        if is_shared:
            images = run.processes.all_reduce(torch.tensor(total.images, device=run.device))
            total = _Total(
                run.processes.all_reduce(total.loss.clone()), run.processes.all_reduce(total.correct.clone())
            )
        reported = {"loss": Metric(total.loss / images, better="less", progress=True)}
        if self.accuracy:
            percent = total.correct.to(total.loss.dtype) * 100 / images
            reported["accuracy"] = Metric(percent, better="more", progress=True)
        return reported

    def state_dict(self) -> dict[str, Any]:
        """Return what the training split has added up to."""
        return {
            split: {"loss": total.loss.clone(), "correct": total.correct.clone(), "images": total.images}
            for split, total in self._totals.items()
            if split == "train"
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, whatever device its tensors are on."""
        self._totals = {split: _Total(**total) for split, total in state.items()}


def _correct(batch: Batch, output: Tensor) -> Tensor:
    """Return how many images of a batch are recognized, int64 [], on the device."""
    targets = batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(1)
    finite = output.isfinite().all(1)  # argmax alone calls a row of NaN class 0
    return ((output.argmax(1) == targets) & finite).sum()
