"""Batched image transforms: whole uint8 batches, on the device, with per-image random parameters.

There are two kinds. A :class:`Gather` moves pixels: it says where each output pixel comes from, and neighbouring
gathers become one gather, exactly, because none of them computes a new value. A :class:`Map` computes values. Both give
their random parameters (``draw``) and their arithmetic apart, so that the same parameters can be handed to another
implementation. Parameters that follow from which image it is, and not from the batch that it is in, come from
``look_up``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainkit.errors import PluginError

__all__ = ["Draws", "Gather", "Map", "Params", "Pipeline", "Size", "Transform", "gather", "to_float"]

#: Height and width in pixels.
Size = tuple[int, int]
#: Random parameters by name, as drawn: one row an image.
Draws = dict[str, NDArray[np.generic]]
#: The same on the device.
Params = Mapping[str, Tensor]

# Pixels transformed at a time, which bounds memory whatever the batch size: on a CPU few enough to stay in its cache
# (256 images of 32x32), on a GPU enough to keep it busy.
CPU_CHUNK, GPU_CHUNK = 2**18, 2**22


class Transform:
    """What both kinds share. One that must know which images it gets says so: ``needs_indices: ClassVar = True``."""

    __slots__ = ()

    needs_indices: ClassVar[bool] = False  #: whether ``look_up`` is called, and batches without indices are refused

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

    def look_up(self, indices: Tensor, epoch: int) -> Params:
        """Return parameters that depend on which images these are; none by default.

        Args:
            indices: int64 [n], each image's place in its split, on the device; reading a value stalls a GPU.
            epoch: from 0.

        Returns:
            Tensors on the device whose first dimension is n, beside those that ``draw`` gives.
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
            y: int32 rows of output pixels, broadcastable with `x` to [N, H, W]; any integer may occur, and what comes
                of those outside of the output is ignored. Not to be changed in place.
            x: int32 columns of output pixels.
            size: height and width of the input images.

        Returns:
            Rows and columns in the input, of any integer type, broadcastable to [N, H, W]; outside of the image means
            black. Keep separable results separable ([N, H, 1] and [N, 1, W]): it saves work.
        """


class Map(Transform, ABC):
    """Computes new pixel values. One that computes with bytes says so: ``needs_uint8: ClassVar = True``."""

    __slots__ = ()

    needs_uint8: ClassVar[bool] = False  #: whether it is refused after a transform that returns floats

    @abstractmethod
    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Transform a batch.

        Args:
            images: [N, C, H, W], uint8 or what the transforms before this one return; not to be changed in place,
                because it may be the data set itself.
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

    def __call__(
        self,
        images: Tensor,
        stream: Callable[[str], np.random.Generator],
        indices: Tensor | None = None,
        epoch: int = 0,
        share: tuple[int, int] | None = None,
    ) -> Tensor:
        """Transform a batch; parameters are drawn for the whole batch, so neither chunks nor processes change them.

        Args:
            images: uint8 [N, C, H, W].
            stream: the generator of a name.
            indices: int64 [N], each image's place in its split; a transform may need them.
            epoch: from 0.
            share: see :class:`trainkit.data.Batch`.

        Raises:
            PluginError: a transform needs the indices, and there are none.
        """
        if not self.steps:
            return to_float(images)
        n, channels, height, width = images.shape
        params = self.draw(n, (height, width), stream, images.device, indices=indices, epoch=epoch, share=share)
        sizes = self.sizes((height, width))
        chunk = max(1, (CPU_CHUNK if images.device.type == "cpu" else GPU_CHUNK) // max(h * w for h, w in sizes))
        if n <= chunk:
            return self.apply(images, params)
        done = torch.empty(n, channels, *sizes[-1], device=images.device)
        for i in range(0, n, chunk):
            part = [{k: v[i : i + chunk] for k, v in p.items()} for p in params]
            done[i : i + chunk] = self.apply(images[i : i + chunk], part)
        return done

    def sizes(self, size: Size) -> list[Size]:
        """Return the size of the images before each transform and after the last one.

        Args:
            size: height and width of the images that arrive.

        Raises:
            TrainkitError: a transform cannot take images of the size that would reach it.
        """
        sizes = [size]
        for _, step in self.steps:
            sizes.append(step.out_size(sizes[-1]))
        return sizes

    def draw(
        self,
        n: int,
        size: Size,
        stream: Callable[[str], np.random.Generator],
        device: torch.device,
        *,
        indices: Tensor | None = None,
        epoch: int = 0,
        share: tuple[int, int] | None = None,
    ) -> list[Params]:
        """Draw, and look up, the parameters of every transform for `n` images of this size.

        Of a batch that several processes share, parameters are drawn for all images, and those of `n` are returned.

        Raises:
            PluginError: a transform needs the indices, and there are none.
        """
        params: list[Params] = []
        first, total = share or (0, n)
        for (name, step), arriving in zip(self.steps, self.sizes(size)[:-1], strict=True):
            drawn = step.draw(stream(name), total, arriving)
            given = {k: _sent(v[first : first + n], device) for k, v in drawn.items()}
            if step.needs_indices:
                if indices is None:
                    raise PluginError(
                        f"transform {name.partition('/')[0]!r} needs to know which images it gets, and the batch has "
                        "no indices; give them to the Batch, or to the pipeline"
                    )
                given.update(step.look_up(indices, epoch))
            params.append(given)
        return params

    def apply(self, images: Tensor, params: Sequence[Params]) -> Tensor:
        """Transform images with the given parameters, one mapping a transform."""
        gathers: list[tuple[Gather, Params]] = []
        for (name, step), given in zip(self.steps, params, strict=True):
            if isinstance(step, Gather):
                gathers.append((step, given))
                continue
            images = gather(images, gathers)
            gathers = []
            assert isinstance(step, Map)
            if step.needs_uint8 and images.dtype != torch.uint8:
                raise PluginError(
                    f"transform {name.partition('/')[0]!r} needs uint8 images, and a transform before it returns "
                    f"{str(images.dtype).removeprefix('torch.')}; list it above that one (such as normalize)"
                )
            images = step.apply(images, given)
        return to_float(gather(images, gathers))


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images as new float32 ones in [0, 1], as torchvision's ``ToTensor`` does, and others as they are."""
    if images.dtype != torch.uint8:
        return images
    # A GPU divides by a number by multiplying with a rounded 1 / 255, which can miss the last bit; not by a tensor.
    divisor = torch.full((1,), 255.0, device=images.device) if images.is_cuda else 255.0
    return images.to(torch.float32).div_(divisor)


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
    # int32 takes a third of the time of int64, and indices count the pixels of one image, so they fit.
    y = torch.arange(out_height, dtype=torch.int32, device=images.device).view(1, -1, 1)
    x = torch.arange(out_width, dtype=torch.int32, device=images.device).view(1, 1, -1)
    # Outside of the images between two gathers it is black, even where the earlier one would find a pixel: a 0 in
    # `rows` or `columns`. Kept apart they are small as long as `y` and `x` are separable.
    rows, columns = torch.ones_like(y), torch.ones_like(x)
    for number in reversed(range(len(steps))):
        step, params = steps[number]
        y, x = step.source(params, y, x, sizes[number])
        if number > 0:
            rows = rows * _within(y, sizes[number][0])
            columns = columns * _within(x, sizes[number][1])
    # Pad by one black pixel: sources outside the image clamp onto it. Index 0 is its corner.
    index = torch.add(x.clamp(-1, width).add_(width + 3), y.clamp(-1, height), alpha=width + 2)
    if len(steps) > 1:
        index = index * rows * columns
    index = index.to(torch.int64).expand(n, out_height, out_width).reshape(n, 1, -1).expand(n, channels, -1)
    framed = F.pad(images, (1, 1, 1, 1)).reshape(n, channels, -1)
    return framed.gather(2, index).view(n, channels, out_height, out_width)


def _sent(array: NDArray[np.generic], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # from other memory than this, a copy of more than 64 KiB waits
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _within(position: Tensor, length: int) -> Tensor:
    return (position >= 0) & (position < length)
