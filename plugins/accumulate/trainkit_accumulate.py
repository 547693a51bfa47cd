"""Gradient accumulation."""

from attrs import field
from attrs.validators import ge
from torch import Tensor
from torch.optim import Optimizer

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["Accumulate"]


@plugin
class Accumulate:
    """Accumulate gradients over several batches, so that a step is that of one large batch.

    Each image counts the same, so gradients are the mean over all images of a step, also in the last step of an epoch,
    which has fewer batches or a smaller one. Batch normalization still sees one batch at a time.

    Args:
        batches: batches a step; at least 1.
    """

    batches: int = field(default=2, validator=ge(1))

    @hookimpl
    def transform_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        """Tell the run how many batches make a step, before schedulers are built for its length."""
        run.batches_per_step = self.batches
        return optimizer

    @hookimpl
    def backward(self, run: Run, loss: Tensor) -> bool:
        """Add the gradients of a batch, weighted by its part of the step's images.

        Returns:
            Whether it is the last batch of its step.
        """
        train = run.batches["train"]
        before = run.batch_index * train.batch_size  # images of this epoch, before this batch
        after = min(before + train.batch_size, len(train.split))
        first = run.batch_index // self.batches * self.batches * train.batch_size
        last = min(first + self.batches * train.batch_size, len(train.split))
        (loss * ((after - before) / (last - first))).backward()  # type: ignore[no-untyped-call]
        return after == last
