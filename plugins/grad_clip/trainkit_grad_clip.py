"""Gradient clipping."""

from typing import Literal

from attrs import field
from attrs.validators import gt
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["GradClip"]


@plugin
class GradClip:
    """Clip gradients by value or by norm between backward and step (Zhang et al., ICLR 2020).

    Args:
        limit: the largest absolute value of an element (``value``), or the largest 2-norm of all gradients taken
            together (``norm``); greater than 0.
        mode: ``value`` or ``norm``.
    """

    limit: float = field(default=0.1, validator=gt(0))
    mode: Literal["value", "norm"] = "value"

    @hookimpl
    def gradients_ready(self, run: Run) -> None:
        """Clip in place, without waiting for the device."""
        if self.mode == "value":
            clip_grad_value_(run.model.parameters(), self.limit)
        else:
            clip_grad_norm_(run.model.parameters(), self.limit)
