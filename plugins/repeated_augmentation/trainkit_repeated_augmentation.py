"""Each image several times."""

from attrs import field
from attrs.validators import ge
from torch import Tensor

from trainkit import Run
from trainkit.data import epoch_permutation
from trainkit.plugin import hookimpl, plugin

__all__ = ["RepeatedAugmentation"]


@plugin
class RepeatedAugmentation:
    """Train on each image several times in one batch, augmented anew (Hoffer et al., CVPR 2020).

    The training images are shuffled, each is repeated `times` times, one after the other, and the first of them make
    the epoch: as many as the split has. So an epoch has about 1 / `times` of the distinct images, and costs what it did
    before. It is the order of DeiT's RASampler in one process.

    Args:
        times: how often each image comes; at least 1, and 1 changes nothing.
    """

    times: int = field(default=3, validator=ge(1))

    @hookimpl
    def epoch_order(self, run: Run) -> Tensor:
        """Return the images of an epoch, those of the default order, each repeated."""
        images = len(run.data.train)
        distinct = -(-images // self.times)
        return epoch_permutation(run.recipe.seed, run.epoch, images)[:distinct].repeat_interleave(self.times)[:images]
