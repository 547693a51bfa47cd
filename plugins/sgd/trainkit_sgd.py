"""Stochastic gradient descent."""

import attrs
import torch
from attrs import field
from attrs.validators import ge
from torch import nn

from trainkit.plugin import hookimpl, plugin

__all__ = ["SGD"]


def _needs_momentum(sgd: "SGD", attribute: "attrs.Attribute[bool]", value: bool) -> None:
    if value and (sgd.momentum == 0 or sgd.dampening != 0):
        raise ValueError(
            f"'nesterov' needs a momentum greater than 0 and a dampening of 0, not {sgd.momentum:g} and "
            f"{sgd.dampening:g}; set momentum, such as 0.9, or drop nesterov"
        )


@plugin
class SGD:
    """Stochastic gradient descent with momentum, weight decay and Nesterov's variant (Sutskever et al., ICML 2013).

    The options are those of ``torch.optim.SGD``, with its defaults.

    Args:
        lr: learning rate; at least 0.
        momentum: factor of the gradients' running sum; at least 0, and 0 keeps none.
        dampening: the part of each gradient that the running sum leaves out.
        weight_decay: L2 penalty, added to the gradient; at least 0.
        nesterov: Nesterov's variant: look ahead along the running sum; needs a momentum, and no dampening.
    """

    lr: float = field(default=1e-3, validator=ge(0))
    momentum: float = field(default=0.0, validator=ge(0))
    dampening: float = 0.0
    weight_decay: float = field(default=0.0, validator=ge(0))
    nesterov: bool = field(default=False, validator=_needs_momentum)

    @hookimpl
    def optimizer(self, params: list[nn.Parameter]) -> torch.optim.SGD:
        """Return torch's optimizer, in its fastest form for these parameters."""
        # The fused kernel passes over memory once. None leaves the choice between the other forms to torch: where torch
        # has no such kernel, where it is wrong (16 bits on a processor, torch 2.11), or could not start as below.
        exact = (torch.float32, torch.float64)
        fused = not self.dampening and all(p.device.type in ("cpu", "cuda") and p.dtype in exact for p in params)
        optimizer = torch.optim.SGD(
            params,
            lr=self.lr,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=fused or None,
        )
        if fused and self.momentum:
            # Its running sums begin as memory that is not initialised. The first step fills them, unless a gradient
            # scaler has it left out. From 0 on they become the same, except with dampening: that spares the first step.
            for p in params:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer
