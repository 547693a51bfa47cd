"""Masked squares."""

import numpy as np
import torch
from attrs import field
from attrs.validators import ge
from torch import Tensor

from trainkit import Map
from trainkit.plugin import hookimpl, plugin
from trainkit.transforms import Draws, Params, Size

__all__ = ["Cutout"]


@plugin
class Cutout(Map):
    """Mask a square of each training image with zeros, centred anywhere in it (DeVries and Taylor, arXiv:1708.04552).

    A square near an edge is clipped there, so that less of the image is masked. The authors found that to matter. After
    ``normalize`` a zero is the mean colour, which is what they mask with; before it, black.

    Args:
        size: pixels of the square's sides; at least 1.
    """

    size: int = field(default=16, validator=ge(1))

    @hookimpl
    def transforms(self, split: str) -> Map | None:
        """Take part in training only."""
        return self if split == "train" else None

    def draw(self, rng: np.random.Generator, n: int, size: Size) -> Draws:
        """Draw the centres, row ``y`` and column ``x``, int64 [n]: each pixel of the image is as likely."""
        height, width = size
        return {"y": rng.integers(height, size=n), "x": rng.integers(width, size=n)}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Mask rows ``y - size // 2`` to ``y - size // 2 + size - 1``, and columns likewise."""
        rows = self._within(params["y"], images.shape[2]).unsqueeze(2)
        columns = self._within(params["x"], images.shape[3]).unsqueeze(1)
        return images.masked_fill((rows & columns).unsqueeze(1), 0)

    def _within(self, centre: Tensor, length: int) -> Tensor:
        """Return which positions along one side lie in the square, bool [n, length]."""
        first = (centre - self.size // 2).view(-1, 1)
        position = torch.arange(length, device=centre.device)
        return (position >= first) & (position < first + self.size)
