"""Cross-entropy."""

from collections.abc import Callable
from functools import partial

from attrs import field
from attrs.validators import and_, ge, le
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainkit.plugin import hookimpl, plugin

__all__ = ["CrossEntropy"]


@plugin
class CrossEntropy:
    """Cross-entropy of classes or class probabilities, with label smoothing (Szegedy et al., CVPR 2016).

    Args:
        label_smoothing: the share of each target that is spread evenly over all classes; 0 to 1.
    """

    label_smoothing: float = field(default=0.0, validator=and_(ge(0), le(1)))

    @hookimpl
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the mean over a batch of logits [N, classes] and targets: int64 [N], or probabilities [N, classes]."""
        return partial(cross_entropy, label_smoothing=self.label_smoothing)
