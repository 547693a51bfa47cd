"""A validation split out of the training split."""

import torch
from attrs import field
from attrs.validators import and_, ge, gt, lt, optional
from torch import Tensor

from trainkit import Data, Run
from trainkit.data import Split, class_targets, describe, subset
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.rng import stream

__all__ = ["HoldOut", "shares"]


@plugin
class HoldOut:
    """Hold a validation split out of the training split, class by class, drawn by the seed.

    Where there is a validation split, the best epoch, early stopping and schedules look at it, and the test split is
    evaluated once, at the end. Images keep their order in both splits. Give either `fraction` or `count`.

    Args:
        fraction: the share of the training images that is held out, rounded to whole images; between 0 and 1.
        count: how many training images are held out, at least 1, in place of `fraction`.
        per_class: hold the same share of each class out, to within one image; else draw from all images alike.
        seed: chooses the images; by default the run's seed. Runs of several seeds with one `seed` here hold the same
            images out.
    """

    fraction: float | None = field(default=None, validator=optional(and_(gt(0), lt(1))))
    count: int | None = field(default=None, validator=optional(ge(1)))
    per_class: bool = True
    seed: int | None = None

    def __attrs_post_init__(self) -> None:
        if (self.fraction is None) == (self.count is None):
            given = "neither is" if self.fraction is None else "both are"
            raise ValueError(f"how much is held out is either 'fraction' or 'count', and {given} given")

    @hookimpl
    def transform_data(self, run: Run, data: Data) -> Data:
        """Return the data with a validation split and the training images that are left.

        Raises:
            RecipeError: there is a validation split; nothing, everything or a whole class would be held out; or targets
                are no classes and `per_class` is wanted.
        """
        if data.validation is not None:
            raise RecipeError(
                f"the data have a validation split of {len(data.validation)} images already; drop hold_out, or the "
                "option of the data plugin that makes that split"
            )
        images = len(data.train)
        total = self._total(images)
        targets = self._targets(run, data.train)
        order = stream(run.recipe.seed if self.seed is None else self.seed, "hold_out").permutation(images)
        shuffled = torch.from_numpy(order)
        is_held = torch.zeros(images, dtype=torch.bool)
        if self.per_class:
            assert targets is not None
            for label, share in enumerate(shares(total, targets.bincount().tolist())):
                is_held[shuffled[targets[shuffled] == label][:share]] = True
        else:
            is_held[shuffled[:total]] = True
        if targets is not None:
            _check_classes_are_left(targets, is_held, data.classes)
        return data.replace(
            train=subset(data.train, (~is_held).nonzero().flatten()),
            validation=subset(data.train, is_held.nonzero().flatten()),
        )

    def _total(self, images: int) -> int:
        key = "count" if self.fraction is None else "fraction"
        total = self.count if self.fraction is None else round(self.fraction * images)
        assert total is not None
        if not 0 < total < images:
            raise RecipeError(
                f"{key!r}: {total} of the {images} training images would be held out; hold at least 1 out and leave at "
                "least 1"
            )
        return total

    def _targets(self, run: Run, split: Split) -> Tensor | None:
        """Return the class of each image, or None where they are not needed and not known without decoding."""
        known = hasattr(split, "targets")
        if not (self.per_class or known):
            return None
        if not known:
            run.console.print(
                f"hold_out: decodes all {len(split)} training images for their classes; a split with an attribute "
                "`targets` spares that",
                soft_wrap=True,
            )
        targets = class_targets(split)
        if targets is None and self.per_class:
            raise RecipeError(
                f"'per_class': the data's targets are no classes but {describe(split[0][1])}; set "
                "plugins.hold_out.per_class=false"
            )
        return targets


def shares(total: int, counts: list[int]) -> list[int]:
    """Divide a total among classes in proportion to their counts, by largest remainders; of equal ones the first.

    Args:
        total: images to take; at most the sum of `counts`.
        counts: images of each class.

    Returns:
        Images to take of each class: its exact share rounded down or up. They sum to `total`.
    """
    images = sum(counts)
    taken = [total * count // images for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda label: -(total * counts[label] % images))
    for label in by_remainder[: total - sum(taken)]:
        taken[label] += 1
    return taken


def _check_classes_are_left(targets: Tensor, is_held: Tensor, classes: tuple[str, ...]) -> None:
    before = targets.bincount()
    after = targets[~is_held].bincount(minlength=len(before))
    for label in ((before > 0) & (after == 0)).nonzero().flatten().tolist():
        name = classes[label] if label < len(classes) else label
        raise RecipeError(
            f"class {name!r} has {before[label]} training images, and all of them would be held out; hold fewer "
            "images out, or add images of that class"
        )
