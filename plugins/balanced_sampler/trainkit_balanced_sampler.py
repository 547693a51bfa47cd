"""Each class equally often."""

from typing import Any

import numpy as np
import torch
from attrs import field
from attrs.validators import ge, optional
from torch import Tensor

from trainkit import Run
from trainkit.data import class_targets, describe
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin

__all__ = ["BalancedSampler"]


@plugin
class BalancedSampler:
    """Draw each class equally often in each epoch, with replacement.

    An epoch of n images has n // C of each of the C classes of the training split; the n % C that are left go to as
    many classes, drawn anew each epoch. Within a class each image is drawn from all of the class, independently of the
    others: with replacement, so that some come twice and some not at all. Then the epoch is shuffled.

    Args:
        images: images of an epoch, at least 1; by default as many as the training split has.
    """

    images: int | None = field(default=None, validator=optional(ge(1)))
    _split: Any = field(init=False, default=None)  # the one whose images are sorted by class in `_of_class`
    _of_class: list[np.ndarray[Any, np.dtype[np.int64]]] = field(init=False, factory=list)

    @hookimpl
    def epoch_order(self, run: Run) -> Tensor:
        """Draw the images of an epoch, which depend on seed and epoch alone.

        Raises:
            RecipeError: the data's targets are no classes.
        """
        if self._split is not run.data.train:
            self._sort(run)
        rng = run.rng("balanced_sampler")
        classes = len(self._of_class)
        each, left = divmod(self.images or len(run.data.train), classes)
        counts = np.full(classes, each)
        counts[rng.permutation(classes)[:left]] += 1
        drawn = [rng.choice(indices, count) for indices, count in zip(self._of_class, counts, strict=True)]
        return torch.from_numpy(rng.permutation(np.concatenate(drawn)))

    def _sort(self, run: Run) -> None:
        """Sort the images of the training split by class."""
        split = run.data.train
        if not hasattr(split, "targets"):
            run.console.print(
                f"balanced_sampler: decodes all {len(split)} training images for their classes; a split with an "
                "attribute `targets` spares that",
                soft_wrap=True,
            )
        targets = class_targets(split)
        if targets is None:
            raise RecipeError(f"it balances classes, and the data's targets are {describe(split[0][1])}; drop it")
        found = [(targets == label).nonzero().flatten().numpy() for label in range(int(targets.max()) + 1)]
        self._of_class = [indices for indices in found if len(indices)]
        self._split = split
