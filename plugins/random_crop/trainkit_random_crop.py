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


def _positive(instance: object, attribute: "attrs.Attribute[Any]", value: Pair) -> None:
    if any(side < 1 for side in _pair(value)):
        raise ValueError(f"'size' must be a number of pixels, or [height, width], each at least 1, not {value}")


def _borders(instance: object, attribute: "attrs.Attribute[Any]", value: int | tuple[int, ...]) -> None:
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

    size: Pair = field(validator=_positive)
    padding: int | tuple[int, ...] = field(default=0, validator=_borders)
    padding_mode: Literal["constant", "edge", "reflect", "symmetric"] = "constant"

    @hookimpl
    def transforms(self, split: Literal["train", "test"]) -> Gather | None:
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
        crop = _pair(self.size)
        left, top, right, bottom = self.borders()
        padded = (size[0] + top + bottom, size[1] + left + right)
        if crop[0] > padded[0] or crop[1] > padded[1]:
            raise RecipeError(
                f"plugins.random_crop.size: a crop of {crop[0]}x{crop[1]} pixels (height x width) is larger than the "
                f"images that reach it, {size[0]}x{size[1]} and {padded[0]}x{padded[1]} with their padding; make "
                "`size` smaller or `padding` larger"
            )
        return crop

    def draw(self, rng: np.random.Generator, n: int, size: Size) -> Draws:
        """Draw ``top`` and ``left``, int32 [n]: the crop's corner in each padded image."""
        height, width = self.out_size(size)
        left, top, right, bottom = self.borders()
        return {
            "top": rng.integers(size[0] + top + bottom - height, size=n, dtype=np.int32, endpoint=True),
            "left": rng.integers(size[1] + left + right - width, size=n, dtype=np.int32, endpoint=True),
        }

    def source(self, params: Params, y: Tensor, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Return rows and columns moved by the corner, and brought back into the image unless padding is black."""
        left, top, _, _ = self.borders()
        y = y + (params["top"] - top).view(-1, 1, 1)
        x = x + (params["left"] - left).view(-1, 1, 1)
        return self._padded(y, size[0]), self._padded(x, size[1])

    def _padded(self, position: Tensor, length: int) -> Tensor:
        match self.padding_mode:
            case "constant":
                return position
            case "edge":
                return position.clamp(0, length - 1)
            case "reflect":  # 0 1 2 3 2 1 | 0 1 2 3 2 1; a single pixel is its own mirror image
                last = max(1, 2 * (length - 1))
                position = position.remainder(last)
                return torch.minimum(position, last - position)
            case "symmetric":  # 0 1 2 3 3 2 1 0 | 0 1 2 3 3 2 1 0
                position = position.remainder(2 * length)
                return torch.minimum(position, 2 * length - 1 - position)


def _pair(size: Pair) -> Size:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
