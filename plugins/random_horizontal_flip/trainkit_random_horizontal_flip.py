"""Random mirror images."""

import numpy as np
import torch
from attrs import field
from attrs.validators import and_, ge, le
from torch import Tensor

from trainkit import Gather
from trainkit.plugin import hookimpl, plugin
from trainkit.transforms import Draws, Params, Size

__all__ = ["RandomHorizontalFlip"]


@plugin
class RandomHorizontalFlip(Gather):
    """Mirror each training image left to right at random, as torchvision's RandomHorizontalFlip does.

    Args:
        p: the probability that an image is mirrored, 0 to 1.
    """

    p: float = field(default=0.5, validator=and_(ge(0), le(1)))

    @hookimpl
    def transforms(self, split: str) -> Gather | None:
        """Take part in training only."""
        return self if split == "train" else None

    def draw(self, rng: np.random.Generator, n: int, size: Size) -> Draws:
        """Draw ``flip``, bool [n]: whether to mirror each image."""
        return {"flip": rng.random(n) < self.p}

    def source(self, params: Params, y: Tensor, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Return the same row, and the mirrored column where an image is to be mirrored."""
        mirrored = size[1] - 1 - x
        return y, torch.where(params["flip"].view(-1, 1, 1), mirrored, x)
