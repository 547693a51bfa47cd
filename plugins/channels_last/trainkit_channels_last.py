"""Channels-last memory format."""

import torch
from torch import nn

from trainkit import Batch
from trainkit.plugin import hookimpl, plugin

__all__ = ["ChannelsLast"]


@plugin
class ChannelsLast:
    """Keep feature maps, images and kernels in torch's channels_last memory format.

    Shapes, values and names stay as they are. Only the order in memory changes, to the one in which convolutions
    compute on CPUs and on GPUs with tensor cores. In another order, each convolution reorders its input and its output.
    """

    @hookimpl
    def transform_model(self, model: nn.Module) -> nn.Module:
        """Reorder the network's parameters and buffers of four dimensions, in place."""
        return model.to(memory_format=torch.channels_last)

    @hookimpl
    def transform_batch(self, batch: Batch) -> Batch:
        """Reorder the images; nothing is copied where they are in this order already."""
        batch.images = batch.images.contiguous(memory_format=torch.channels_last)
        return batch
