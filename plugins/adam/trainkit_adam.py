"""Adam."""

import torch
from attrs import field
from attrs.validators import and_, deep_iterable, ge, lt
from torch import nn

from trainkit.plugin import hookimpl, plugin

__all__ = ["Adam"]


@plugin
class Adam:
    """Adam, with AMSGrad as an option (Kingma and Ba, ICLR 2015; Reddi et al., ICLR 2018).

    The options are those of ``torch.optim.Adam``, with its defaults.

    Args:
        lr: learning rate; at least 0.
        betas: decay of the running means of the gradient and of its square; each at least 0 and below 1.
        eps: added to the denominator, for stability; at least 0.
        weight_decay: L2 penalty, added to the gradient (not decoupled from it, as in AdamW); at least 0.
        amsgrad: divide by the largest running mean of the square so far.
    """

    lr: float = field(default=1e-3, validator=ge(0))
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=deep_iterable(and_(ge(0), lt(1))))
    eps: float = field(default=1e-8, validator=ge(0))
    weight_decay: float = field(default=0.0, validator=ge(0))
    amsgrad: bool = False

    @hookimpl
    def optimizer(self, params: list[nn.Parameter]) -> torch.optim.Adam:
        """Return torch's optimizer, in its fastest form for these parameters."""
        # The fused kernel passes over memory once. torch has it for real numbers on CPUs and CUDA.
        fused = all(parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() for parameter in params)
        return torch.optim.Adam(
            params,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
            fused=fused or None,  # None leaves the choice between the other forms to torch
        )
