"""Random crops."""

from typing import Any, Literal

import attrs
import numpy as np
import torch
from attrs import field
from torch import Tensor

from trainkit import Gather
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.transforms import Draws, Params, Size

__all__ = ["RandomCrop"]

Pair = int | tuple[int, int]


def _check_size(instance: object, attribute: "attrs.Attribute[Any]", value: Pair) -> None:
    if any(side < 1 for side in _pair(value)):
        raise ValueError(f"'size' must be a number of pixels, or [height, width], each at least 1, not {value}")


def _check_padding(instance: object, attribute: "attrs.Attribute[Any]", value: int | tuple[int, ...]) -> None:
    widths = (value,) if isinstance(value, int) else value
    if len(widths) not in (1, 2, 4) or min(widths) < 0:
        raise ValueError(
            "'padding' must be one width, [left and right, top and bottom] or [left, top, right, bottom], "
            f"in pixels from 0 on, not {value}"
        )


@plugin
class RandomCrop(Gather):
    """Pad each training image and crop it at a random place, as torchvision's RandomCrop does.

    Args:
        size: pixels of the crop's sides, or [height, width].
        padding: pixels added on every side, or [left and right, top and bottom], or [left, top, right, bottom].
        padding_mode: what is added: ``constant`` is black, ``edge`` repeats the last pixel, ``reflect`` mirrors without
            the last pixel, ``symmetric`` mirrors with it.
    """

    size: Pair = field(validator=_check_size)
    padding: int | tuple[int, ...] = field(default=0, validator=_check_padding)
    padding_mode: Literal["constant", "edge", "reflect", "symmetric"] = "constant"

    @hookimpl
    def transforms(self, split: str) -> Gather | None:
        """Take part in training only."""
        return self if split == "train" else None

    def borders(self) -> tuple[int, int, int, int]:
        """Return the padding as left, top, right and bottom."""
        given = (self.padding,) if isinstance(self.padding, int) else tuple(self.padding)
        left, top, right, bottom = given * (4 // len(given))
        return left, top, right, bottom

    def out_size(self, size: Size) -> Size:
        """Return the crop's size.

        Raises:
            RecipeError: the padded image is smaller.
        """
        crop_height, crop_width = _pair(self.size)
        height, width = self._padded_size(size)
        if crop_height > height or crop_width > width:
            raise RecipeError(
                f"plugins.random_crop.size: a crop of {crop_height}x{crop_width} pixels (height x width) is larger "
                f"than the images that reach it, {size[0]}x{size[1]} and {height}x{width} with their padding; make "
                "`size` smaller or `padding` larger"
            )
        return crop_height, crop_width

    def _padded_size(self, size: Size) -> Size:
        left, top, right, bottom = self.borders()
        return size[0] + top + bottom, size[1] + left + right

    def draw(self, rng: np.random.Generator, n: int, size: Size) -> Draws:
        """Draw ``top`` and ``left``, int32 [n]: the crop's corner in each padded image."""
        crop_height, crop_width = self.out_size(size)
        height, width = self._padded_size(size)
        return {
            "top": rng.integers(height - crop_height, size=n, dtype=np.int32, endpoint=True),
            "left": rng.integers(width - crop_width, size=n, dtype=np.int32, endpoint=True),
        }

    def source(self, params: Params, y: Tensor, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Return rows and columns moved by the crop's corner, and where the padding takes them from."""
        left, top, _, _ = self.borders()
        y = y + (params["top"] - top).view(-1, 1, 1)
        x = x + (params["left"] - left).view(-1, 1, 1)
        return self._padded(y, size[0]), self._padded(x, size[1])

    def _padded(self, position: Tensor, length: int) -> Tensor:
        """Return which pixel of the image each position in the padded image shows; outside of the image means black."""
        match self.padding_mode:
            case "constant":
                return position
            case "edge":
                return position.clamp(0, length - 1)
            case "reflect":  # 0 1 2 3 2 1 | 0 1 2 3 2 1
                period = max(1, 2 * (length - 1))  # 1 for a single pixel, which is its own mirror image
                position = position.remainder(period)
                return torch.minimum(position, period - position)
            case "symmetric":  # 0 1 2 3 3 2 1 0 | 0 1 2 3 3 2 1 0
                period = 2 * length
                position = position.remainder(period)
                return torch.minimum(position, period - 1 - position)


def _pair(size: Pair) -> Size:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
