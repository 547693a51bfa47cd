"""Cross-entropy."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from attrs import field
from attrs.validators import and_, ge, le
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainkit import Run
from trainkit.data import describe
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin

__all__ = ["CrossEntropy"]


@plugin
class CrossEntropy:
    """Cross-entropy of classes or class probabilities, with label smoothing (Szegedy et al., CVPR 2016).

    Args:
        label_smoothing: the share of each target that is spread evenly over all classes; 0 to 1.
        targets: what the data have: ``classes``, or ``probabilities`` of all classes, which sum to 1.
    """

    label_smoothing: float = field(default=0.0, validator=and_(ge(0), le(1)))
    targets: Literal["classes", "probabilities"] = "classes"

    @hookimpl
    def loss(self, run: Run) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the mean over a batch of logits [N, classes] and targets: int64 [N], or probabilities [N, classes].

        Raises:
            RecipeError: the data's targets are neither.
        """
        target = run.data.first_target
        if self.targets == "classes" and not run.data.has_class_targets:
            raise RecipeError(
                f"cross-entropy takes classes, and the data's targets are {describe(target)}; list "
                "binary_cross_entropy_with_logits for several labels an image, or set "
                "plugins.cross_entropy.targets=probabilities where a target is the probabilities of all classes"
            )
        shape = (len(run.data.classes),)
        is_float = isinstance(target, Tensor) and target.is_floating_point()
        if self.targets == "probabilities" and not (is_float and tuple(target.shape) == shape):
            raise RecipeError(
                f"'targets': probabilities are floats {list(shape)}, and the data's are {describe(target)}"
            )
        return partial(cross_entropy, label_smoothing=self.label_smoothing)
