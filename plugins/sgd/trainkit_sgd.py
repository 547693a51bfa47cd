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
        fused = self._can_be_fused(params)
        optimizer = torch.optim.SGD(
            params,
            lr=self.lr,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=fused or None,  # None leaves the choice between the other forms to torch
        )
        if fused and self.momentum:
            # torch (2.14) does not initialise the fused kernel's running sums. The first step fills them, unless a
            # gradient scaler skips it. Sums that begin as 0 become the same.
            for parameter in params:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def _can_be_fused(self, params: list[nn.Parameter]) -> bool:
        """Return whether torch's fused kernel, which passes over memory once, gives the right result.

        torch has it for CPUs and CUDA. With parameters of 16 bits on a CPU its result is wrong (torch 2.11). With
        dampening, running sums could not begin as 0: the first step takes its gradient undampened.
        """
        if self.dampening:
            return False
        exact = (torch.float32, torch.float64)
        return all(parameter.device.type in ("cpu", "cuda") and parameter.dtype in exact for parameter in params)
