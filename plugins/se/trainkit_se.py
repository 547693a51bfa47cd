"""Squeeze-and-excitation."""

import copy
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from attrs import field
from attrs.validators import ge, min_len
from torch import Tensor, nn

from trainkit import Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, matching_modules, plugin

__all__ = ["SE", "SqueezeExcitation"]


@plugin
class SE:
    """Recalibrate feature maps with squeeze-and-excitation (Hu et al., CVPR 2018).

    Each matched module is replaced by ``nn.Sequential`` of ``module`` (the original) and ``se``
    (a :class:`SqueezeExcitation` of as many channels as the original gives). Any network will do.

    Args:
        after: module paths to match, such as ``stages.*.*.bn2``: shell patterns, component by component, so that
            ``*`` stands for one component of a path, or a part of it: ``layer*.*.bn2`` fits torchvision's ResNets.
        reduction: channels are squeezed to ``channels // reduction`` values; at least 1.
        bias: whether the excitation's two layers have a bias.
    """

    after: list[str] = field(validator=min_len(1))
    reduction: int = field(default=16, validator=ge(1))
    bias: bool = False

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Insert the modules.

        Raises:
            RecipeError: a pattern matches nothing, or something after which there is no place for
                squeeze-and-excitation.
        """
        modules = matching_modules(model, self.after, "after")
        channels = _channels(model, list(modules), run)
        # Inner modules before outer ones: to replace an outer one changes the paths of those within it.
        for path, count in reversed(channels.items()):
            if count < self.reduction:
                raise RecipeError(
                    f"'reduction' {self.reduction} leaves nothing of the {count} channels of {path!r}; lower it"
                )
            se = SqueezeExcitation(count, count // self.reduction, bias=self.bias)
            model.set_submodule(path, nn.Sequential(OrderedDict(module=modules[path], se=se)))
        return model


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from the means of all channels (Hu et al., eq. 2 to 4).

    ``x * sigmoid(fc2(relu(fc1(mean(x)))))``. Two linear layers on the means [N, C] compute the same as two 1x1
    convolutions on [N, C, 1, 1]; they differ in the shape of their weights alone.

    Args:
        channels: channels C of the feature maps.
        squeeze_channels: values between the two layers.
        bias: whether the two layers have a bias.
    """

    def __init__(self, channels: int, squeeze_channels: int, *, bias: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, squeeze_channels, bias=bias)
        self.fc2 = nn.Linear(squeeze_channels, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C, H, W]."""
        # Not x.mean: its gradient is a whole feature map in contiguous order. In a network with SE in every block,
        # writing it and adding it to channels_last gradients takes a tenth of a step. The gradient of a sum is a view.
        # Without dtype, autocast would sum in float32 on a GPU, and the gradient would be a whole feature map again.
        means = x.sum((2, 3), dtype=x.dtype) / (x.shape[2] * x.shape[3])
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(means))))
        return x * gate[:, :, None, None]


def _channels(model: nn.Module, paths: list[str], run: Run) -> dict[str, int]:
    """Return how many channels the modules give, as seen in one forward pass of a blank image.

    The pass runs through a copy in evaluation mode, and torch's generator is restored afterwards. So neither the
    statistics of batch normalization nor later random numbers change.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {path: [] for path in paths}
    copied = copy.deepcopy(model).eval()
    for path in paths:
        copied.get_submodule(path).register_forward_hook(partial(_record, shapes[path]))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        copied(torch.zeros(1, *run.image_shape))

    channels = {}
    for path, given in shapes.items():
        if len(given) != 1 or len(given[0]) != 4:
            raise RecipeError(
                f"'after': squeeze-and-excitation follows a module that gives feature maps [N, C, H, W] once in a "
                f"forward pass; {path!r} gave {' and '.join(map(str, given)) or 'nothing'}"
            )
        channels[path] = given[0][1]
    return channels


def _record(shapes: list[tuple[int, ...]], module: nn.Module, inputs: Any, output: Any) -> None:
    """Note the shape of an output; that of one without a shape, such as a tuple, is empty."""
    shapes.append(tuple(getattr(output, "shape", ())))
