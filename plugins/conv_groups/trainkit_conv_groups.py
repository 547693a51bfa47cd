"""A small network without shortcuts that trains fast."""

from collections import OrderedDict

from attrs import field
from attrs.validators import and_, deep_iterable, ge, gt, le, min_len, optional
from torch import Tensor, nn

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["ConvGroup", "ConvGroups"]

PATCH = 2  # pixels of the sides of the first convolution's kernels


@plugin
class ConvGroups:
    """Network of airbench94: a 2x2 convolution and groups of two 3x3 ones, no shortcuts (Jordan, arXiv:2404.00498).

    A 2x2 convolution with a bias, groups of :class:`ConvGroup`, each of which halves the sides, the maximum over what
    is left of them, and a linear layer without bias, whose outputs are scaled. Its modules are ``whiten``, ``act``,
    ``groups.<group>`` (counted from 0) with ``conv1``, ``norm1``, ``conv2`` and ``norm2``, ``pool``, ``flatten``,
    ``fc`` and ``scale``.

    Args:
        whiten: output channels of the first convolution; at least 1. None for both signs of each direction in a patch:
            2 * 2 * 2 * channels, 24 for RGB.
        widths: output channels of each group; their number is the number of groups.
        momentum: of batch normalization, in torch's notation: the share of each batch's statistics in the running ones;
            greater than 0, at most 1.
        eps: of batch normalization; greater than 0.
        affine: whether batch normalization has a weight. Its bias is trained anyway.
        logit_scale: what outputs are multiplied by; greater than 0.
    """

    whiten: int | None = field(default=None, validator=optional(ge(1)))
    widths: list[int] = field(factory=lambda: [64, 256, 256], validator=[min_len(1), deep_iterable(ge(1))])
    momentum: float = field(default=0.4, validator=and_(gt(0), le(1)))
    eps: float = field(default=1e-12, validator=gt(0))
    affine: bool = False
    logit_scale: float = field(default=1 / 9, validator=gt(0))

    @hookimpl
    def model(self, run: Run) -> nn.Module:
        """Build the network for the data's channels and classes."""
        channels = run.data.shape[0]
        inputs = self.whiten or 2 * PATCH * PATCH * channels
        groups = nn.Sequential()
        modules = OrderedDict[str, nn.Module](whiten=nn.Conv2d(channels, inputs, PATCH), act=nn.GELU(), groups=groups)
        for width in self.widths:
            groups.append(ConvGroup(inputs, width, momentum=self.momentum, eps=self.eps, affine=self.affine))
            inputs = width
        modules.update(
            pool=nn.AdaptiveMaxPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(inputs, len(run.data.classes), bias=False),
            scale=Scale(self.logit_scale),
        )
        return nn.Sequential(modules)


class ConvGroup(nn.Module):
    """``act2(norm2(conv2(act1(norm1(pool(conv1(x)))))))``: two 3x3 convolutions, and half the sides between them.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        momentum: of batch normalization, in torch's notation.
        eps: of batch normalization.
        affine: whether batch normalization has a weight that is trained; without, it stays 1.
    """

    def __init__(self, in_channels: int, out_channels: int, *, momentum: float, eps: float, affine: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)
        self.act1 = nn.GELU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)
        self.act2 = nn.GELU()
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(affine)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, H // 2, W // 2]."""
        x = self.act1(self.norm1(self.pool(self.conv1(x))))
        result: Tensor = self.act2(self.norm2(self.conv2(x)))
        return result


class Scale(nn.Module):
    """Multiply by a constant.

    Args:
        factor: the constant.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times the constant."""
        return x * self.factor

    def extra_repr(self) -> str:
        """Show the constant."""
        return f"{self.factor:g}"
