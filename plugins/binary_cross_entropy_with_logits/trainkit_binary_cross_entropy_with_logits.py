"""Binary cross-entropy."""

from collections.abc import Callable
from functools import partial

import torch
from attrs import field
from torch import Tensor
from torch.nn import functional as F

from trainkit import Run, TensorSplit
from trainkit.data import describe
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin

__all__ = ["BinaryCrossEntropyWithLogits", "binary_cross_entropy_with_logits"]


def _positive(instance: object, attribute: object, value: float | list[float] | None) -> None:
    weights = value if isinstance(value, list) else [] if value is None else [value]
    if value == [] or not all(weight > 0 for weight in weights):
        raise ValueError(f"'pos_weight' must be greater than 0, one number or one for each label, not {value}")


@plugin
class BinaryCrossEntropyWithLogits:
    """Binary cross-entropy for several labels an image, as torch's function of that name.

    Each label is decided for itself: a target is a tensor of one number for each of the data's classes, 1 where the
    image has it and 0 where it has not. The loss is the mean over labels and images.

    Args:
        pos_weight: weight of the loss where a label is 1: one number, or one for each label; greater than 0. A label
            that one image in ten has is balanced by 9.
    """

    pos_weight: int | float | list[float] | None = field(default=None, validator=_positive)

    @hookimpl
    def loss(self, run: Run) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the mean over logits and targets, both [N, classes].

        Raises:
            RecipeError: the data's targets are classes, or not one number from 0 to 1 for each label; or there are more
                or fewer weights than labels.
        """
        labels = _labels(run)
        if self.pos_weight is None:
            return partial(binary_cross_entropy_with_logits, pos_weight=None)
        if isinstance(self.pos_weight, list) and len(self.pos_weight) != labels:
            raise RecipeError(
                f"'pos_weight': {len(self.pos_weight)} weights for {labels} labels; give one for each, or one number"
            )
        weight = torch.tensor(self.pos_weight, dtype=torch.float32, device=run.device)
        return partial(binary_cross_entropy_with_logits, pos_weight=weight.expand(labels))


def binary_cross_entropy_with_logits(output: Tensor, targets: Tensor, pos_weight: Tensor | None) -> Tensor:
    """Return torch's loss, for targets of any type.

    Args:
        output: logits [N, labels].
        targets: [N, labels].
        pos_weight: [labels], or None.
    """
    # Targets of float64 would make a loss, and a backward pass, of float64.
    return F.binary_cross_entropy_with_logits(output, targets.float(), pos_weight=pos_weight)


def _labels(run: Run) -> int:
    """Return the number of labels of an image, after a look at the targets: all of them where they are in memory."""
    split = run.data.train
    target = split[0][1]
    if run.data.has_class_targets:
        raise RecipeError(
            "binary cross-entropy takes several labels an image, and the data's targets are classes, one an image; "
            "list cross_entropy in its place"
        )
    classes = len(run.data.classes)
    if not isinstance(target, Tensor) or target.dim() != 1 or (classes and len(target) != classes):
        raise RecipeError(
            f"a target must be a tensor of {classes or 'several'} numbers, one for each label, and the data's are "
            f"{describe(target)}"
        )
    seen = split.targets if isinstance(split, TensorSplit) else target
    least, most = float(seen.min()), float(seen.max())
    if not 0 <= least <= most <= 1:
        raise RecipeError(f"targets must be from 0 to 1, and the data's go from {least:g} to {most:g}")
    return len(target)
