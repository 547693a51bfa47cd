"""Muon for filters, SGD for the rest."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from attrs import field
from attrs.validators import and_, ge, gt, lt
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin

__all__ = ["Muon", "MuonAndSGD", "orthogonalized"]

AdjustLR = Literal["original", "match_rms_adamw"]
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Jordan's quintic iteration


@plugin
class Muon:
    """Muon: momentum, orthogonalized by Newton-Schulz iterations, for filters; SGD for the rest (Jordan et al., 2024).

    The filters of a convolution are a matrix with a row for each output channel. Its momentum is replaced by a matrix
    with the same singular vectors, whose singular values are all about 1. All other parameters are trained by SGD with
    Nesterov's momentum. Options without `sgd_` are those of ``torch.optim.Muon``, which takes matrices alone.

    Args:
        lr: learning rate of filters; at least 0.
        momentum: of filters; at least 0, below 1.
        nesterov: let filters' momentum look ahead.
        weight_decay: of filters, decoupled: each step multiplies them by 1 - lr * weight_decay; at least 0.
        ns_steps: Newton-Schulz iterations; at least 1.
        eps: the least norm by which a momentum is divided; greater than 0.
        adjust_lr_fn: how the rate follows the shape of a matrix of n rows and m columns: ``original`` multiplies it by
            sqrt(max(1, n / m)), ``match_rms_adamw`` by 0.2 * sqrt(max(n, m)), so that rates for AdamW fit.
        matrices: treat the matrices of linear layers as filters, too; the last layer is better left to SGD.
        sgd_lr: learning rate of all other parameters; at least 0.
        sgd_momentum: of all other parameters; greater than 0, below 1.
        sgd_weight_decay: of all other parameters, added to the gradient; at least 0.
    """

    lr: float = field(default=0.02, validator=ge(0))
    momentum: float = field(default=0.95, validator=and_(ge(0), lt(1)))
    nesterov: bool = True
    weight_decay: float = field(default=0.0, validator=ge(0))
    ns_steps: int = field(default=5, validator=ge(1))
    eps: float = field(default=1e-7, validator=gt(0))
    adjust_lr_fn: AdjustLR = "original"
    matrices: bool = False
    sgd_lr: float = field(default=0.1, validator=ge(0))
    sgd_momentum: float = field(default=0.9, validator=and_(gt(0), lt(1)))
    sgd_weight_decay: float = field(default=0.0, validator=ge(0))

    @hookimpl
    def optimizer(self, params: list[nn.Parameter]) -> Optimizer:
        """Return the optimizer, whose first group is that of the filters.

        Raises:
            RecipeError: the network has no filters.
        """
        filters = [parameter for parameter in params if parameter.ndim > (1 if self.matrices else 2)]
        others = [parameter for parameter in params if parameter.ndim <= (1 if self.matrices else 2)]
        if not filters:
            raise RecipeError("'matrices': the network has no convolutions to train; set matrices: true, or use sgd")
        groups: list[dict[str, Any]] = [{"params": filters}]
        if others:
            sgd = {"lr": self.sgd_lr, "momentum": self.sgd_momentum, "weight_decay": self.sgd_weight_decay}
            groups.append({"params": others, "orthogonalize": False, "nesterov": True, **sgd})
        return MuonAndSGD(
            groups,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            ns_steps=self.ns_steps,
            eps=self.eps,
            adjust_lr_fn=self.adjust_lr_fn,
            orthogonalize=True,
        )


class MuonAndSGD(Optimizer):
    """Muon in parameter groups with ``orthogonalize``, SGD in the others.

    Args:
        params: parameters, or groups of them.
        defaults: of groups that do not say otherwise: the options of :class:`Muon` without ``sgd_``, and
            ``orthogonalize``.
    """

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss again.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = _muon if group["orthogonalize"] else _sgd
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    update(parameter, parameter.grad, state["momentum_buffer"], group)
        return loss


def _muon(parameter: Tensor, gradient: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
    momentum = group["momentum"]
    buffer.lerp_(gradient, 1 - momentum)
    ahead = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
    update = orthogonalized(ahead.flatten(1), group["ns_steps"], group["eps"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    rate = group["lr"] * _adjustment(group["adjust_lr_fn"], *update.shape)
    parameter.add_(update.view(parameter.shape), alpha=-rate)


def _sgd(parameter: Tensor, gradient: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
    if group["weight_decay"]:
        gradient = gradient.add(parameter, alpha=group["weight_decay"])
    buffer.mul_(group["momentum"]).add_(gradient)
    parameter.add_(gradient.add(buffer, alpha=group["momentum"]), alpha=-group["lr"])


def _adjustment(kind: AdjustLR, rows: int, columns: int) -> float:
    """Return what the rate of a matrix of this shape is multiplied by."""
    if kind == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def orthogonalized(matrix: Tensor, steps: int, eps: float) -> Tensor:
    """Return a matrix with the same singular vectors, whose singular values are between about 0.7 and 1.2.

    It computes in the matrix's own type: float32, where torch's Muon takes bfloat16. That costs little beside a
    convolution's gradient, and many CPUs emulate bfloat16.

    Args:
        matrix: [n, m].
        steps: Newton-Schulz iterations. Each multiplies small singular values by about 3.4, so that five are enough
            for those of at least a five-hundredth of the norm.
        eps: the least norm by which the matrix is divided.
    """
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm().clamp(min=eps)  # no singular value is greater than 1
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:  # the product with itself is the smaller one
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: Tensor = x.T if is_tall else x
    return result.contiguous()
