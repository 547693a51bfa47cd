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


#: Batches that wait on a processor to be added up together: so the small operations of a step cost half as much.
WAITING = 64
#: Values of an output from which it is added up at once: too many to keep, and worth operations of its own.
LARGE = 2**14


@attrs.define(eq=False)
class _Total:
    """What a split has added up to so far."""

    loss: Tensor  # float64 [], over images, not over batches: the last batch is usually smaller
    correct: Tensor  # int64 []
    images: int = 0
    waiting: list[tuple[Tensor, Tensor, Tensor]] = field(factory=list)  # loss, output and targets of a batch
    most: int = 1  # how many of them may wait

    def add_up(self) -> None:
        """Add the batches that wait."""
        if not self.waiting:
            return
        losses, outputs, targets = zip(*self.waiting, strict=True)
        self.waiting.clear()
        sizes = [t.numel() for t in targets]
        if len({*sizes}) == 1:
            self.loss.add_(torch.stack(losses).sum(dtype=torch.float64), alpha=sizes[0])
        else:
            for loss, size in zip(losses, sizes, strict=True):
                self.loss.add_(loss, alpha=size)
        # eq_ in int64 spares the sum a conversion from bool
        self.correct.add_(_joined(outputs).argmax(1).eq_(_joined(targets)).sum())
        self.images += sum(sizes)
        # a graph on a GPU writes its next output over this one
        self.most = 1 if outputs[0].is_cuda or outputs[0].numel() > LARGE else WAITING

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, and the batches that wait: added up apart, they could round apart."""
        waiting = [*zip(*self.waiting, strict=True)]
        return {
            "loss": self.loss.clone(),
            "correct": self.correct.clone(),
            "images": self.images,
            "waiting": [torch.stack(waiting[0]), *map(torch.cat, waiting[1:])] if waiting else [],
            "sizes": [targets.numel() for _, _, targets in self.waiting],
            "most": self.most,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "_Total":
        """Continue on a device from what :meth:`state_dict` returned."""
        loss, correct = (state[name].to(device, copy=True) for name in ("loss", "correct"))
        total = cls(loss, correct, state["images"], most=1 if device.type == "cuda" else state["most"])
        if state["waiting"]:
            losses, outputs, targets = (part.to(device, copy=True) for part in state["waiting"])
            total.waiting = [*zip(losses, outputs.split(state["sizes"]), targets.split(state["sizes"]), strict=True)]
        return total


def _joined(batches: tuple[Tensor, ...]) -> Tensor:
    return batches[0] if len(batches) == 1 else torch.cat(batches)


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
    _loss: Tensor | None = field(init=False, default=None)  # of the current batch

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Move what a checkpoint brought to the device of the run."""
        self._totals = {s: _Total.from_state(t.state_dict(), run.device) for s, t in self._totals.items()}

    @hookimpl
    def epoch_start(self) -> None:
        """Forget the training split of the epoch before."""
        self._totals.pop("train", None)

    @hookimpl
    def forward_end(self, run: Run, batch: Batch, output: Tensor, loss: Tensor) -> None:
        """Take a batch; nothing is read from the device."""
        total = self._totals.get(run.split)
        if total is None:
            total = self._totals[run.split] = _Total(
                torch.zeros((), dtype=torch.float64, device=loss.device),
                torch.zeros((), dtype=torch.int64, device=loss.device),
            )
        targets = batch.targets
        if targets.ndim == 2:
            targets = targets.argmax(1)
        self._loss = loss.detach()
        total.waiting.append((self._loss, output.detach(), targets))
        if len(total.waiting) >= total.most:
            total.add_up()

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
        total.add_up()
        return {"loss": total.loss / total.images, "accuracy": total.correct.double() * 100 / total.images}

    def state_dict(self) -> dict[str, Any]:
        """Return what each split has added up to."""
        return {split: total.state_dict() for split, total in self._totals.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, whatever device its tensors are on."""
        self._totals = {split: _Total.from_state(total, total["loss"].device) for split, total in state.items()}
