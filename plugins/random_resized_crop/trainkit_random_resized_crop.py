"""Random crops of random size, resized."""

from typing import Any, ClassVar

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
BITS = 32 - 8 - 2  # of the fraction in Pillow's fixed-point weights


def _check_size(instance: object, attribute: "attrs.Attribute[Any]", value: int | tuple[int, int]) -> None:
    sides = value if isinstance(value, tuple | list) else (value,)
    if any(side < 1 for side in sides):
        raise ValueError(f"'size' must be a number of pixels, or [height, width], each at least 1, not {value}")


def _check_range(instance: object, attribute: "attrs.Attribute[Any]", value: tuple[float, float]) -> None:
    least, greatest = value
    if not 0 < least <= greatest < np.inf:
        raise ValueError(f"{attribute.name!r} must be [least, greatest], both greater than 0, not {value}")


@plugin
class RandomResizedCrop(Map):
    """Crop a random part of each training image and resize it, as torchvision's RandomResizedCrop does on PIL images.

    Bilinear and antialiased, byte for byte what Pillow 13.0 and later give for the same box. Earlier versions of Pillow
    always resize widths first, also where the height shrinks much more. They differ for crops higher than `size` only.

    Args:
        size: pixels of the result's sides, or [height, width].
        scale: the least and the greatest area of the crop, as parts of the image's.
        ratio: the least and the greatest width of the crop, as multiples of its height.
    """

    before: ClassVar = ("normalize",)
    needs_uint8: ClassVar = True

    size: int | tuple[int, int] = field(validator=_check_size)
    scale: tuple[float, float] = field(default=(0.08, 1.0), validator=_check_range)
    ratio: tuple[float, float] = field(default=(3 / 4, 4 / 3), validator=_check_range)

    @hookimpl
    def transforms(self, split: str) -> Map | None:
        """Take part in training only."""
        return self if split == "train" else None

    def out_size(self, size: Size) -> Size:
        """Return the size of the result."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    def draw(self, rng: np.random.Generator, n: int, size: Size) -> Draws:
        """Draw the crops: top ``i``, left ``j``, height ``h`` and width ``w`` in pixels, int64 [n] each.

        Of ten tries with uniform area and log-uniform ratio, the first that fits into the image counts. Where none
        does, the crop is the largest central one of an allowed ratio.
        """
        height, width = size
        area = rng.uniform(*self.scale, [n, TRIES]) * (height * width)
        ratio = np.exp(rng.uniform(np.log(self.ratio[0]), np.log(self.ratio[1]), [n, TRIES]))
        widths = np.rint(np.sqrt(area * ratio))
        heights = np.rint(np.sqrt(area / ratio))
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        first = np.arange(n), fits.argmax(1)  # the first that fits; try 0 where none does
        found = fits[first]

        central_ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        central_width = max(1, min(width, round(height * central_ratio)))
        central_height = max(1, min(height, round(width / central_ratio)))
        w = np.where(found, widths[first], central_width).astype(np.int64)
        h = np.where(found, heights[first], central_height).astype(np.int64)
        i = np.where(found, rng.integers(height - h, endpoint=True), (height - h) // 2)
        j = np.where(found, rng.integers(width - w, endpoint=True), (width - w) // 2)
        return {"i": i, "j": j, "h": h, "w": w}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Crop and resize uint8 images [N, C, H, W], in integers and without synchronising with the device."""
        top, left, crop_height, crop_width = (params[name] for name in ("i", "j", "h", "w"))
        height, width = self.out_size((images.shape[2], images.shape[3]))
        resized = _resample(images, 3, left, crop_width, width)
        resized = _resample(resized, 2, top, crop_height, height)
        if images.shape[2] > height:
            # Pillow resizes the height of some crops first. Which ones only the device knows, so both orders are
            # computed for all images, and each image takes one.
            other = _resample(images, 2, top, crop_height, height)
            other = _resample(other, 3, left, crop_width, width)
            height_first = (crop_height > height) & (crop_height - height > 2 * (crop_width - width))
            resized = torch.where(height_first.view(-1, 1, 1, 1), other, resized)
        return resized.contiguous()


def _resample(images: Tensor, dim: int, start: Tensor, length: Tensor, out: int) -> Tensor:
    """Resize a part of each image in one dimension, rounded to uint8.

    Args:
        images: uint8 [N, C, H, W].
        dim: the dimension, 2 or 3.
        start: the first pixel of the part, int64 [N].
        length: the pixels of the part, int64 [N].
        out: the pixels of the result.
    """
    lines = images.movedim(dim, 1)
    n, size, *rest = lines.shape
    lines = lines.reshape(n * size, -1)
    index, weights = _taps(length, out, size)
    # From pixels of a part to rows of `lines`.
    index += (start + torch.arange(n, device=images.device) * size).view(-1, 1)
    # Begins at one half, so that the shift at the end rounds.
    total = torch.full((n * out, lines.shape[1]), 1 << (BITS - 1), dtype=torch.int32, device=images.device)
    for source, weight in zip(index.flatten(1), weights.flatten(1), strict=True):
        total.addcmul_(lines.index_select(0, source).to(torch.int32), weight.unsqueeze(1))
    resized = total.bitwise_right_shift_(BITS).to(torch.uint8)
    return resized.view(n, out, *rest).movedim(1, dim)


def _taps(length: Tensor, out: int, size: int) -> tuple[Tensor, Tensor]:
    """Return which pixels of a crop make up each pixel of the result, and their fixed-point weights, [taps, N, out].

    This is Pillow's triangle filter (``precompute_coeffs``) in whole numbers. Pillow computes positions in pixels of
    the crop, in float64. Here they are multiplied by ``2 * out``. Both round to the same weights.

    Args:
        length: sizes of the crops, int64 [N].
        out: size of the result.
        size: size of the images, which no crop exceeds.
    """
    length = length.view(-1, 1)
    # The filter reaches one pixel of the crop or of the result to both sides, whichever is larger.
    support = 2 * length.clamp(min=out)
    center = (2 * torch.arange(out, device=length.device) + 1) * length
    first = (center - support + out).clamp_(min=0).div_(2 * out, rounding_mode="floor")
    taps = -(-2 * max(size, out) // out)  # rounded up; enough for the largest crop, since the host knows no other
    pixel = first + torch.arange(taps, device=length.device).view(-1, 1, 1)
    weight = (support - ((2 * pixel + 1) * out - center).abs_()).clamp_(min=0) * (pixel < length)
    total = weight.sum(0)
    # weight / total in units of 2 ** -BITS, rounded: floor((2 ** (BITS + 1) * weight + total) / (2 * total)).
    weight = ((weight << (BITS + 1)) + total).div_(2 * total, rounding_mode="floor")
    return torch.minimum(pixel, length - 1), weight.to(torch.int32)
