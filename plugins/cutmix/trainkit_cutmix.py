"""Boxes of other images."""

import math
from typing import ClassVar

import numpy as np
from attrs import field
from attrs.validators import gt
from torch.nn.functional import one_hot

from trainkit import Batch, Run
from trainkit.data import describe
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin

__all__ = ["Box", "CutMix", "mix"]

#: First column and row, and the column and row after the last.
Box = tuple[int, int, int, int]


@plugin
class CutMix:
    """Put a box of another image into each training image and mix the targets (Yun et al., ICCV 2019).

    As in torchvision's CutMix, a batch has one box, and the other image is the one before it in the batch, whose order
    is random. Targets become probabilities, in the ratio of the areas.

    Args:
        alpha: the part of the area that stays follows the distribution Beta(alpha, alpha), but for boxes that the
            border cuts; greater than 0. Small values make most boxes tiny or nearly whole, 1 makes all areas equally
            likely.
    """

    conflicts: ClassVar = ("mixup",)

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
        height, width = batch.images.shape[2:]
        return mix(batch, self.draw(run.rng("cutmix"), height, width), len(run.data.classes))

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Box:
        """Draw a box within images of this size; its center is uniform, and its sides have the image's ratio."""
        half = 0.5 * math.sqrt(1 - rng.beta(self.alpha, self.alpha))
        x, y = int(rng.integers(width)), int(rng.integers(height))
        half_width, half_height = int(half * width), int(half * height)
        left, top = max(0, x - half_width), max(0, y - half_height)
        return left, top, min(width, x + half_width), min(height, y + half_height)


def mix(batch: Batch, box: Box, classes: int) -> Batch:
    """Fill the box of each image from the one before, that of the first from the last, and mix the targets likewise.

    Args:
        batch: images [N, C, H, W], which are changed in place, and targets, [N] or probabilities [N, classes].
        box: what is exchanged.
        classes: number of classes.

    Returns:
        Images [N, C, H, W] and probabilities [N, classes].
    """
    x1, y1, x2, y2 = box
    part = batch.images[:, :, y1:y2, x1:x2]
    part.copy_(part.roll(1, 0))
    height, width = batch.images.shape[2:]
    kept = 1 - (x2 - x1) * (y2 - y1) / (height * width)
    targets = batch.targets if batch.targets.ndim == 2 else one_hot(batch.targets, classes).to(batch.images.dtype)
    return Batch(batch.images, targets.roll(1, 0).lerp_(targets, kept), batch.indices)
