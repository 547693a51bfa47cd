"""Batched image transforms: whole uint8 batches, on the device, with per-image random parameters.

There are two kinds. A :class:`Gather` moves pixels: it says where each output pixel comes from, and neighbouring
gathers become one gather, exactly, because none of them computes a new value. A :class:`Map` computes values. Both give
their random parameters (``draw``) and their arithmetic apart, so that the same parameters can be handed to another
implementation.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Draws", "Gather", "Map", "Params", "Pipeline", "Size", "Transform"]

#: Height and width in pixels.
Size = tuple[int, int]
#: Random parameters by name, as drawn: one row an image.
Draws = dict[str, NDArray[np.generic]]
#: The same on the device.
Params = Mapping[str, Tensor]

CHUNK = 512  # images transformed at a time: bounds the memory of index and value tensors, whatever the batch size


class Transform:
    """What both kinds share."""

    __slots__ = ()

    def draw(self, rng: np.random.Generator, n: int, size: Size) -> Draws:
        """Draw the random parameters of `n` images of this size; none by default.

        Args:
            rng: the stream of this transform at this batch.
            n: number of images.
            size: height and width of the images that arrive here.

        Returns:
            Arrays whose first dimension is `n`.
        """
        return {}

    def out_size(self, size: Size) -> Size:
        """Return the size of the images that leave, given the size of those that arrive."""
        return size


class Gather(Transform, ABC):
    """Moves pixels: each output pixel is a copy of one input pixel, or black where the source lies outside."""

    __slots__ = ()

    @abstractmethod
    def source(self, params: Params, y: Tensor, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Return where output pixels come from.

        Args:
            params: what ``draw`` gave, on the device, one row an image.
            y: int64 rows of output pixels, broadcastable with `x` to [N, H, W]; any integer may occur.
            x: int64 columns of output pixels.
            size: height and width of the input images.

        Returns:
            int64 rows and columns in the input, broadcastable to [N, H, W]; outside of the image means black. Keep
            separable results separable ([N, H, 1] and [N, 1, W]): it saves work.
        """


class Map(Transform, ABC):
    """Computes new pixel values."""

    __slots__ = ()

    @abstractmethod
    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Transform a batch.

        Args:
            images: [N, C, H, W], uint8 or what the transforms before this one return; it may be changed in place.
            params: what ``draw`` gave, on the device, one row an image.

        Returns:
            [N, C, H', W'] with H' and W' as ``out_size`` says.
        """


class Pipeline:
    """The transforms of one split, in order, each under the name of its random stream.

    Calling it takes uint8 images [N, C, H, W] and a function from name to generator, and returns float32 images: what
    is still uint8 at the end is scaled to [0, 1], as torchvision's ``ToTensor`` does.
    """

    def __init__(self, steps: Sequence[tuple[str, Transform]]) -> None:
        self.steps = tuple(steps)

    def __call__(self, images: Tensor, stream: Callable[[str], np.random.Generator]) -> Tensor:
        """Transform a batch; parameters are drawn for the whole batch, so chunks do not change them."""
        params = self.draw(len(images), (images.shape[2], images.shape[3]), stream, images.device)
        if len(images) <= CHUNK:
            return self.apply(images, params)
        return torch.cat(
            [
                self.apply(images[i : i + CHUNK], [{k: v[i : i + CHUNK] for k, v in p.items()} for p in params])
                for i in range(0, len(images), CHUNK)
            ]
        )

    def draw(
        self, n: int, size: Size, stream: Callable[[str], np.random.Generator], device: torch.device
    ) -> list[Params]:
        """Draw the parameters of every transform for `n` images of this size."""
        params: list[Params] = []
        for name, step in self.steps:
            draws = step.draw(stream(name), n, size)
            params.append({k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in draws.items()})
            size = step.out_size(size)
        return params

    def apply(self, images: Tensor, params: Sequence[Params]) -> Tensor:
        """Transform images with the given parameters, one mapping a transform."""
        gathers: list[tuple[Gather, Params]] = []
        for (_, step), given in zip(self.steps, params, strict=True):
            if isinstance(step, Gather):
                gathers.append((step, given))
                continue
            images = gather(images, gathers)
            gathers = []
            assert isinstance(step, Map)
            images = step.apply(images, given)
        images = gather(images, gathers)
        return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images


def gather(images: Tensor, steps: Sequence[tuple[Gather, Params]]) -> Tensor:
    """Apply neighbouring gathers as one: walk back from the output pixels to their sources, then copy once.

    Args:
        images: [N, C, H, W] of any dtype.
        steps: the gathers in order, with their parameters.
    """
    if not steps:
        return images
    n, channels, height, width = images.shape
    sizes = [(height, width)]
    for step, _ in steps:
        sizes.append(step.out_size(sizes[-1]))
    out_height, out_width = sizes.pop()
    y = torch.arange(out_height, device=images.device).view(1, -1, 1)
    x = torch.arange(out_width, device=images.device).view(1, 1, -1)
    inside: Tensor | None = None
    for (step, params), size in zip(reversed(steps), reversed(sizes), strict=True):
        y, x = step.source(params, y, x, size)
        here = ((y >= 0) & (y < size[0])) & ((x >= 0) & (x < size[1]))
        inside = here if inside is None else inside & here
    assert inside is not None
    index = (y * width + x).clamp_(0, height * width - 1).expand(n, out_height, out_width)
    flat = images.reshape(n, channels, height * width)
    picked = flat.gather(2, index.reshape(n, 1, -1).expand(n, channels, -1)).view(n, channels, out_height, out_width)
    return picked.mul_(inside.view(-1, 1, out_height, out_width))
