"""Residual networks for small images."""

from collections import OrderedDict
from typing import Literal

from attrs import Attribute, field
from attrs.validators import and_, deep_iterable, ge, lt, min_len
from torch import Tensor, nn

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["BasicBlock", "ResNet"]


def _check_odd(plugin: object, attribute: "Attribute[list[int]]", value: list[int]) -> None:
    if any(size < 1 or size % 2 == 0 for size in value):
        raise ValueError(f"{attribute.name!r} must be odd, so that padding keeps the image size, not {value}")


@plugin
class ResNet:
    """Residual network of basic blocks for small images (He et al., CVPR 2016).

    A 3x3 convolution at full resolution, stages of :class:`BasicBlock`, global average pooling and a linear layer.
    Its modules are ``stem.conv``, ``stem.bn``, ``stem.relu``, ``stages.<stage>.<block>`` (counted from 0),
    ``avgpool``, ``flatten`` and ``fc``.

    Args:
        stem: output channels of the first convolution.
        blocks: blocks of each stage; its length is the number of stages.
        channels: output channels of each stage.
        kernel_sizes: kernel size of the convolutions of each stage, odd; one value stands for all stages.
        shortcut_kernel_sizes: kernel size of each stage's shortcut convolution, odd; one value stands for all stages.
        strides: stride of each stage's first block; when empty, 1 in the first stage and 2 in the others.
        dropout: probability of dropping a value between a block's two convolutions, in [0, 1).
        init: ``pytorch`` leaves the weights as PyTorch initializes them; ``kaiming_normal`` draws the weights of all
            convolutions with ``nn.init.kaiming_normal_(weight)``: mean 0, variance 2 / fan_in. With either,
            batch normalization starts with weight 1 and bias 0, and ``fc`` as PyTorch initializes it.
    """

    stem: int = field(default=64, validator=ge(1))
    blocks: list[int] = field(factory=lambda: [2, 2, 2, 2], validator=[min_len(1), deep_iterable(ge(1))])
    channels: list[int] = field(factory=lambda: [64, 128, 256, 512], validator=deep_iterable(ge(1)))
    kernel_sizes: list[int] = field(factory=lambda: [3], validator=_check_odd)
    shortcut_kernel_sizes: list[int] = field(factory=lambda: [1], validator=_check_odd)
    strides: list[int] = field(factory=list, validator=deep_iterable(ge(1)))
    dropout: float = field(default=0.0, validator=and_(ge(0), lt(1)))
    init: Literal["pytorch", "kaiming_normal"] = "pytorch"

    def __attrs_post_init__(self) -> None:
        stages = len(self.blocks)
        self._check_length("channels", stages)
        self._check_length("kernel_sizes", stages, 1)
        self._check_length("shortcut_kernel_sizes", stages, 1)
        self._check_length("strides", stages, 0)

    def _check_length(self, name: str, *allowed: int) -> None:
        length = len(getattr(self, name))
        if length not in allowed:
            raise ValueError(
                f"{name!r} has length {length} and 'blocks' {len(self.blocks)}; give one value for each stage"
            )

    @hookimpl
    def model(self, run: Run) -> nn.Module:
        """Build the network for the data's channels and classes."""
        # Each layer draws its initial weights when it is made, so the order of these lines decides what each one gets.
        stages = self._stages()
        stem = _sequential(
            conv=_conv(run.data.shape[0], self.stem, 3), bn=nn.BatchNorm2d(self.stem), relu=nn.ReLU(inplace=True)
        )
        fc = nn.Linear(self.channels[-1], len(run.data.classes))
        model = _sequential(stem=stem, stages=stages, avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=fc)
        if self.init == "kaiming_normal":
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
        return model

    def _stages(self) -> nn.Sequential:
        """Build all stages; the first block of each changes the number of channels and the size."""
        kernel_sizes = self._for_each_stage(self.kernel_sizes)
        shortcut_kernel_sizes = self._for_each_stage(self.shortcut_kernel_sizes)
        strides = self.strides or [1] + [2] * (len(self.blocks) - 1)
        in_channels = self.stem
        stages = nn.Sequential()
        for number, blocks in enumerate(self.blocks):
            stage = nn.Sequential()
            for block in range(blocks):
                stage.append(
                    BasicBlock(
                        in_channels,
                        self.channels[number],
                        stride=strides[number] if block == 0 else 1,
                        kernel_size=kernel_sizes[number],
                        shortcut_kernel_size=shortcut_kernel_sizes[number],
                        dropout=self.dropout,
                    )
                )
                in_channels = self.channels[number]
            stages.append(stage)
        return stages

    def _for_each_stage(self, sizes: list[int]) -> list[int]:
        return sizes * len(self.blocks) if len(sizes) == 1 else sizes


class BasicBlock(nn.Module):
    """Two convolutions with a shortcut around them: ``relu2(bn2(conv2(relu1(bn1(conv1(x))))) + shortcut(x))``.

    ``shortcut`` is the identity, or a convolution (``shortcut.conv``) with batch normalization (``shortcut.bn``) where
    the number of channels or the size changes. ``dropout`` acts before ``conv2``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution and the shortcut.
        kernel_size: of both convolutions; odd.
        shortcut_kernel_size: of the shortcut's convolution; odd.
        dropout: probability in [0, 1).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        kernel_size: int,
        shortcut_kernel_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, kernel_size, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = _conv(out_channels, out_channels, kernel_size)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _sequential(
                conv=_conv(in_channels, out_channels, shortcut_kernel_size, stride), bn=nn.BatchNorm2d(out_channels)
            )
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(self.dropout(out)))
        result: Tensor = self.relu2(out + self.shortcut(x))
        return result


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without bias, because batch normalization follows; at stride 1 it keeps the size."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def _sequential(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))
