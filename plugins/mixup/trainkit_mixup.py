"""Mixtures of images and of targets."""

from typing import ClassVar

from attrs import field
from attrs.validators import gt
from torch.nn.functional import one_hot

from trainkit import Batch, Run
from trainkit.data import describe
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin

__all__ = ["Mixup", "mix"]


@plugin
class Mixup:
    """Mix each training image and its target with another one (Zhang et al., ICLR 2018).

    As in torchvision's MixUp, a batch has one ratio, lambda, and the other image is the one before it in the batch,
    whose order is random. Targets become probabilities.

    Args:
        alpha: lambda follows the distribution Beta(alpha, alpha); greater than 0. Small values keep most images nearly
            as they are, 1 makes all ratios equally likely.
    """

    conflicts: ClassVar = ("cutmix",)

    alpha: float = field(default=1.0, validator=gt(0))

    @hookimpl
    def built(self, run: Run) -> None:
        """Look at the targets of the data.

        Raises:
            RecipeError: they are no classes.
        """
        if not run.data.has_class_targets:
            raise RecipeError(
                f"it mixes classes, and the data's targets are {describe(run.data.first_target)}; drop it, or list a "
                "plugin that mixes such targets"
            )

    @hookimpl
    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        """Mix the batches of the training split."""
        if run.split != "train":
            return batch
        lam = run.rng("mixup").beta(self.alpha, self.alpha)
        return mix(batch, lam, len(run.data.classes))


def mix(batch: Batch, lam: float, classes: int) -> Batch:
    """Return ``lam`` of each image and target and ``1 - lam`` of the ones before, those of the last before the first.

    Args:
        batch: images [N, C, H, W] and targets, [N] or probabilities [N, classes].
        lam: 0 to 1.
        classes: number of classes.

    Returns:
        Images [N, C, H, W] and probabilities [N, classes].
    """
    targets = batch.targets if batch.targets.ndim == 2 else one_hot(batch.targets, classes).to(batch.images.dtype)
    images = batch.images.roll(1, 0).lerp_(batch.images, lam)
    return Batch(images, targets.roll(1, 0).lerp_(targets, lam), batch.indices)
