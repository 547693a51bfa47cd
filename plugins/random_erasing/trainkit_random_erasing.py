"""Erased boxes."""

from typing import Any, Literal

import attrs
import numpy as np
import torch
from attrs import field
from attrs.validators import and_, ge, le
from torch import Tensor

from trainkit import Map, Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.transforms import Draws, Params, Size

__all__ = ["RandomErasing"]

TRIES = 10


def _check_scale(instance: object, attribute: "attrs.Attribute[Any]", value: tuple[float, float]) -> None:
    least, greatest = value
    if not 0 <= least <= greatest <= 1:
        raise ValueError(f"'scale' must be [least, greatest], 0 to 1, not {value}")


def _check_ratio(instance: object, attribute: "attrs.Attribute[Any]", value: tuple[float, float]) -> None:
    least, greatest = value
    if not 0 < least <= greatest < np.inf:
        raise ValueError(f"'ratio' must be [least, greatest], greater than 0, not {value}")


@plugin
class RandomErasing(Map):
    """Erase a random box of each training image, as torchvision's RandomErasing does (Zhong et al., AAAI 2020).

    It fills boxes of the images that reach it: listed after ``normalize``, normalized images, and else uint8 ones.

    Args:
        p: the probability that an image is erased in, 0 to 1.
        scale: the least and the greatest area of the box, as parts of the image's.
        ratio: the least and the greatest height of the box, as multiples of its width.
        value: what the box is filled with: a number, one number a channel, or ``random`` for standard normal noise,
            each pixel its own.
    """

    p: float = field(default=0.5, validator=and_(ge(0), le(1)))
    scale: tuple[float, float] = field(default=(0.02, 0.33), validator=_check_scale)
    ratio: tuple[float, float] = field(default=(0.3, 3.3), validator=_check_ratio)
    value: int | float | tuple[int | float, ...] | Literal["random"] = 0
    _fill: Tensor = field(init=False)  # [1, 1 or C, 1, 1]
    _generator: torch.Generator = field(init=False)  # of the noise

    @hookimpl
    def transforms(self, run: Run, split: str) -> Map | None:
        """Take part in training only.

        Raises:
            RecipeError: `value` has more or fewer numbers than the images have channels.
        """
        values = [0.0] if self.value == "random" else self._values()
        if len(values) not in (1, run.data.shape[0]):
            raise RecipeError(
                f"plugins.random_erasing.value: it has {len(values)} numbers, and the images have "
                f"{run.data.shape[0]} channels; give one number, or one a channel"
            )
        self._fill = torch.tensor(values, device=run.device).view(1, -1, 1, 1)
        self._generator = torch.Generator(run.device)
        return self if split == "train" else None

    def draw(self, rng: np.random.Generator, n: int, size: Size) -> Draws:
        """Draw the boxes: top ``i``, left ``j``, height ``h`` and width ``w`` in pixels, int64 [n] each.

        Of ten tries with uniform area and log-uniform ratio, the first counts that is less high and less wide than the
        image. Where none is, and in images that stay as they are, ``h`` and ``w`` are 0.
        """
        height, width = size
        erased = rng.random(n) < self.p
        area = rng.uniform(*self.scale, [n, TRIES]) * (height * width)
        ratio = np.exp(rng.uniform(np.log(self.ratio[0]), np.log(self.ratio[1]), [n, TRIES]))
        heights = np.rint(np.sqrt(area * ratio))
        widths = np.rint(np.sqrt(area / ratio))
        fits = (heights < height) & (widths < width) & erased[:, None]
        first = np.arange(n), fits.argmax(1)  # the first that fits; try 0 where none does
        found = fits[first]
        h = np.where(found, heights[first], 0).astype(np.int64)
        w = np.where(found, widths[first], 0).astype(np.int64)
        if self.value == "random":  # `apply` draws the noise on the device
            self._generator.manual_seed(int(rng.integers(2**63)))
        return {
            "i": rng.integers(height - h, endpoint=True),
            "j": rng.integers(width - w, endpoint=True),
            "h": h,
            "w": w,
        }

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Fill the boxes.

        Raises:
            RecipeError: the images are uint8, and `value` is not.
        """
        if images.dtype == torch.uint8 and not self._is_uint8():
            raise RecipeError(
                f"plugins.random_erasing.value: uint8 images reach it, so {self.value} must be whole numbers of 0 to "
                "255; or move the line `random_erasing:` below `normalize:`"
            )
        top, left, height, width = (params[name].view(-1, 1, 1) for name in ("i", "j", "h", "w"))
        y = torch.arange(images.shape[2], device=images.device).view(1, -1, 1)
        x = torch.arange(images.shape[3], device=images.device).view(1, 1, -1)
        rows = (y >= top) & (y < top + height)
        columns = (x >= left) & (x < left + width)
        box = (rows & columns).unsqueeze(1)
        fill = self._fill
        if self.value == "random":
            fill = torch.randn(images.shape, generator=self._generator, device=images.device)
        return torch.where(box, fill.to(images.dtype), images)

    def _values(self) -> list[float]:
        """Return the numbers that `value` gives; not where it is ``random``."""
        values = self.value if isinstance(self.value, tuple | list) else (self.value,)
        return [float(value) for value in values]

    def _is_uint8(self) -> bool:
        """Return whether `value` can fill uint8 images as it is."""
        if self.value == "random":
            return False
        return all(value in range(256) for value in self._values())
