"""AdamW."""

import torch
from attrs import field
from attrs.validators import and_, deep_iterable, ge, lt
from torch import nn

from trainkit.plugin import hookimpl, plugin

__all__ = ["AdamW"]


@plugin
class AdamW:
    """AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019).

    The options are those of ``torch.optim.AdamW``, with its defaults.

    Args:
        lr: learning rate; at least 0.
        betas: decay of the running means of the gradient and of its square; each at least 0 and below 1.
        eps: added to the denominator, for stability; at least 0.
        weight_decay: the part of each weight, times the learning rate, that a step takes away; at least 0.
        amsgrad: divide by the largest running mean of the square so far (Reddi et al., ICLR 2018).
    """

    lr: float = field(default=1e-3, validator=ge(0))
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=deep_iterable(and_(ge(0), lt(1))))
    eps: float = field(default=1e-8, validator=ge(0))
    weight_decay: float = field(default=1e-2, validator=ge(0))
    amsgrad: bool = False

    @hookimpl
    def optimizer(self, params: list[nn.Parameter]) -> torch.optim.AdamW:
        """Return torch's optimizer, in its fastest form for these parameters."""
        # The fused kernel passes over memory once. torch has it for real numbers on CPUs and CUDA.
        fused = all(parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() for parameter in params)
        return torch.optim.AdamW(
            params,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
            fused=fused or None,  # None leaves the choice between the other forms to torch
        )
