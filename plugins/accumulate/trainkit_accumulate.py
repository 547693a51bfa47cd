"""Gradient accumulation."""

from attrs import field
from attrs.validators import ge
from torch import Tensor

from trainkit import Run
from trainkit.errors import PluginError
from trainkit.plugin import hookimpl, is_observer, plugin

__all__ = ["Accumulate"]


@plugin
class Accumulate:
    """Accumulate gradients over several batches, so that a step is that of one large batch.

    Each image counts the same, so gradients are the mean over all images of a step, also in the last step of an epoch,
    which has fewer batches or a smaller one. Batch normalization still sees one batch at a time. List it after plugins
    that add terms to the loss, which it scales.

    Args:
        batches: batches a step; at least 1.
    """

    batches: int = field(default=2, validator=ge(1))

    @hookimpl
    def batches_per_step(self) -> int:
        """Return how many batches make a step."""
        return self.batches

    @hookimpl
    def built(self, run: Run) -> None:
        """Check that nothing adds a term to the loss after it was scaled.

        Raises:
            PluginError: a plugin that changes the loss is listed later.
        """
        plugins = [impl.plugin for impl in run.hooks.implementations("transform_loss")]
        last = [plugin for plugin in plugins if not is_observer(type(plugin.instance))][-1]
        if last.instance is not self:
            raise PluginError(f"it scales the loss, and {last} changes it afterwards: list it after {last.name!r}")

    @hookimpl
    def transform_loss(self, run: Run, loss: Tensor) -> Tensor:
        """Weight the mean loss of a batch by the batch's part of the step's images."""
        size = run.recipe.batch_size
        before = run.batch_index * size  # images of this epoch, before this batch
        after = min(before + size, run.images_per_epoch)
        first = run.batch_index // self.batches * self.batches * size
        last = min(first + self.batches * size, run.images_per_epoch)
        return loss * ((after - before) / (last - first))
