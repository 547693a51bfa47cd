"""Random crops of random size, resized."""

from typing import Any, ClassVar, Literal

import attrs
import numpy as np
import torch
from attrs import field
from torch import Tensor

from trainkit import Map
from trainkit.plugin import hookimpl, plugin
from trainkit.transforms import Draws, Params, Size

__all__ = ["RandomResizedCrop"]

TRIES = 10
BITS = 32 - 8 - 2  # of Pillow's fixed-point weights


def _positive(instance: object, attribute: "attrs.Attribute[Any]", value: int | tuple[int, int]) -> None:
    if any(side < 1 for side in (value if isinstance(value, tuple | list) else [value])):
        raise ValueError(f"'size' must be a number of pixels, or [height, width], each at least 1, not {value}")


def _ascending(instance: object, attribute: "attrs.Attribute[Any]", value: tuple[float, float]) -> None:
    if not 0 < value[0] <= value[1] < np.inf:
        raise ValueError(f"{attribute.name!r} must be [least, greatest], both greater than 0, not {value}")


@plugin
class RandomResizedCrop(Map):
    """Crop a random part of each training image and resize it, as torchvision's RandomResizedCrop does on PIL images.

    Bilinear and antialiased, byte for byte what Pillow gives for the same box. Pillow since 13.0: before, it resized
    widths first always, also where the height shrinks much more; that changes crops higher than `size` only.

    Args:
        size: pixels of the result's sides, or [height, width].
        scale: the least and the greatest area of the crop, as parts of the image's.
        ratio: the least and the greatest width of the crop, as multiples of its height.
    """

    before: ClassVar = ("normalize",)
    needs_uint8: ClassVar = True

    size: int | tuple[int, int] = field(validator=_positive)
    scale: tuple[float, float] = field(default=(0.08, 1.0), validator=_ascending)
    ratio: tuple[float, float] = field(default=(3 / 4, 4 / 3), validator=_ascending)

    @hookimpl
    def transforms(self, split: Literal["train", "test"]) -> Map | None:
        """Take part in training only."""
        return self if split == "train" else None

    def out_size(self, size: Size) -> Size:
        """Return the size of the result."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    def draw(self, rng: np.random.Generator, n: int, size: Size) -> Draws:
        """Draw the crops: top ``i``, left ``j``, height ``h`` and width ``w`` in pixels, int64 [n] each.

        Of ten tries with uniform area and log-uniform ratio the first that fits into the image counts; where none
        does, it is the largest central crop of an allowed ratio.
        """
        height, width = size
        area = rng.uniform(*self.scale, [n, TRIES]) * (height * width)
        ratio = np.exp(rng.uniform(np.log(self.ratio[0]), np.log(self.ratio[1]), [n, TRIES]))
        widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        first = np.arange(n), fits.argmax(1)
        found = fits[first]
        central = min(max(width / height, self.ratio[0]), self.ratio[1])
        w = np.where(found, widths[first], max(1, min(width, round(height * central)))).astype(np.int64)
        h = np.where(found, heights[first], max(1, min(height, round(width / central)))).astype(np.int64)
        i, j = rng.integers(height - h, endpoint=True), rng.integers(width - w, endpoint=True)
        return {"i": np.where(found, i, (height - h) // 2), "j": np.where(found, j, (width - w) // 2), "h": h, "w": w}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Crop and resize uint8 images [N, C, H, W]; of integers only, without waiting for the device."""
        i, j, h, w = (params[name] for name in "ijhw")
        height, width = self.out_size((images.shape[2], images.shape[3]))
        resized = _resample(_resample(images, 3, j, w, width), 2, i, h, height)
        if images.shape[2] > height:  # Pillow takes the other order for some crops; a choice by image would wait for it
            other = _resample(_resample(images, 2, i, h, height), 3, j, w, width)
            tall = (h > height) & (h - height > 2 * (w - width))
            resized = torch.where(tall.view(-1, 1, 1, 1), other, resized)
        return resized.contiguous()


def _resample(images: Tensor, dim: int, start: Tensor, length: Tensor, out: int) -> Tensor:
    """Resize the part of `length` pixels from `start` on to `out` pixels, in one dimension and rounded to uint8."""
    lines = images.movedim(dim, 1)
    n, size, *rest = lines.shape
    lines = lines.reshape(n * size, -1)
    index, weights = _taps(length, out, size)
    index += (start + torch.arange(n, device=images.device) * size).view(-1, 1)
    total = torch.full((n * out, lines.shape[1]), 1 << (BITS - 1), dtype=torch.int32, device=images.device)
    for source, weight in zip(index.flatten(1), weights.flatten(1), strict=True):
        total.addcmul_(lines.index_select(0, source).to(torch.int32), weight.unsqueeze(1))
    return total.bitwise_right_shift_(BITS).to(torch.uint8).view(n, out, *rest).movedim(1, dim)


def _taps(length: Tensor, out: int, size: int) -> tuple[Tensor, Tensor]:
    """Return which pixels of a crop make up each pixel of the result, and their fixed-point weights, [taps, N, out].

    Pillow's triangle filter (``precompute_coeffs``) in whole numbers: it computes positions in pixels of the crop, here
    they are multiplied by ``2 * out``. Its float64 rounds to the same weights.

    Args:
        length: sizes of the crops, int64 [N].
        out: size of the result.
        size: size of the images, which no crop exceeds.
    """
    length = length.view(-1, 1)
    support = 2 * length.clamp(min=out)  # of the filter: a pixel of the crop or of the result, whichever is larger
    center = (2 * torch.arange(out, device=length.device) + 1) * length
    first = (center - support + out).clamp_(min=0).div_(2 * out, rounding_mode="floor")
    taps = -(-2 * max(size, out) // out)
    pixel = first + torch.arange(taps, device=length.device).view(-1, 1, 1)
    weight = (support - ((2 * pixel + 1) * out - center).abs_()).clamp_(min=0) * (pixel < length)
    total = weight.sum(0)
    weight = ((weight << (BITS + 1)) + total).div_(2 * total, rounding_mode="floor")
    return torch.minimum(pixel, length - 1), weight.to(torch.int32)
