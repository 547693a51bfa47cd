"""Cross-entropy in which every class counts."""

from collections.abc import Callable
from typing import ClassVar, Literal

from attrs import field
from attrs.validators import and_, ge, le, lt
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainkit import Run
from trainkit.data import class_targets, describe
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin

__all__ = ["ClassBalance", "class_weights", "weighted_cross_entropy"]

Weights = Literal["effective", "inverse"]


@plugin
class ClassBalance:
    """Cross-entropy with weights that balance classes, by their effective numbers of images (Cui et al., CVPR 2019).

    In training the loss of a batch is the weighted mean over its images, as torch's ``cross_entropy`` with ``weight``.
    In evaluation it is the plain mean, so that it can be compared with other runs'. Targets may be classes, or class
    probabilities after mixup or cutmix.

    Args:
        weights: of a class of n images: ``effective`` is ``(1 - beta) / (1 - beta ** n)``, ``inverse`` is ``1 / n``.
        beta: at least 0, below 1. With 0 all classes weigh the same; the closer to 1, the closer are the weights to
            ``inverse``, which does not use it.
        label_smoothing: the share of each target that is spread evenly over all classes; 0 to 1.
    """

    conflicts: ClassVar = ("balanced_sampler",)  # classes would be balanced twice

    weights: Weights = "effective"
    beta: float = field(default=0.999, validator=and_(ge(0), lt(1)))
    label_smoothing: float = field(default=0.0, validator=and_(ge(0), le(1)))

    @hookimpl
    def loss(self, run: Run) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the mean over a batch of logits [N, classes] and targets: int64 [N], or probabilities [N, classes].

        Raises:
            RecipeError: the data's targets are no classes, or a class has no training image.
        """
        split = run.data.train
        if not hasattr(split, "targets"):
            said = f"class_balance: decodes all {len(split)} training images to count classes"
            run.console.print(f"{said}; a split with an attribute `targets` spares that", soft_wrap=True)
        targets = class_targets(split)
        if targets is None:
            raise RecipeError(
                f"it balances classes, and the data's targets are {describe(run.data.first_target)}; list another loss"
            )
        counts = targets.bincount(minlength=len(run.data.classes))
        if empty := [run.data.classes[label] for label in (counts == 0).nonzero().flatten().tolist()]:
            raise RecipeError(
                f"the class {empty[0]!r} has no training images, so that its weight would be infinite; leave the class "
                "out of the data, or list cross_entropy in place of class_balance"
            )
        weight = class_weights(counts, self.weights, self.beta).to(run.device)
        smoothing = self.label_smoothing

        def loss(output: Tensor, targets: Tensor) -> Tensor:
            if run.split != "train":
                return cross_entropy(output, targets, label_smoothing=smoothing)
            return weighted_cross_entropy(output, targets, weight, smoothing)

        return loss


def class_weights(counts: Tensor, weights: Weights, beta: float) -> Tensor:
    """Return the weight of each class, float32 [classes], with a mean of 1.

    Args:
        counts: int64 [classes], images of each class; none is 0.
        weights: as for :class:`ClassBalance`.
        beta: likewise.
    """
    images = counts.double()
    found = 1 / images if weights == "inverse" else (1 - beta) / (1 - beta**images)
    return (found / found.mean()).float()


def weighted_cross_entropy(output: Tensor, targets: Tensor, weight: Tensor, label_smoothing: float) -> Tensor:
    """Return the weighted mean over a batch, a scalar.

    Torch divides the weighted losses of classes by the sum of the weights, those of probabilities by the number of
    images. Here it is the sum of the weights for both, so that a probability of 1 is the same as a class.

    Args:
        output: logits [N, classes].
        targets: int64 [N], or probabilities [N, classes].
        weight: [classes].
        label_smoothing: as for :class:`ClassBalance`.
    """
    if targets.ndim == 1:
        return cross_entropy(output, targets, weight, label_smoothing=label_smoothing)
    total = cross_entropy(output, targets, weight, label_smoothing=label_smoothing, reduction="sum")
    return total / (targets * weight).sum()
