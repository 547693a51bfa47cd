"""Mirror images that alternate."""

from typing import ClassVar

import torch
from attrs import field
from torch import Tensor

from trainkit import Gather, Run
from trainkit.plugin import hookimpl, plugin
from trainkit.rng import stream
from trainkit.transforms import Params, Size

__all__ = ["AlternatingFlip"]


@plugin
class AlternatingFlip(Gather):
    """Mirror each training image in every other epoch, beginning at random (Jordan, arXiv:2404.00498).

    In the first epoch a coin decides which images are mirrored. It depends on the seed and the image alone. From then
    on each image is what it was not in the epoch before. So two epochs show each image from both sides, where
    independent coins show one half of the images twice from the same side.
    """

    needs_indices: ClassVar[bool] = True

    _first: Tensor = field(init=False)  # bool, whether each training image is mirrored in the first epoch

    @hookimpl
    def transforms(self, run: Run, split: str) -> Gather | None:
        """Take part in training only; toss the coins of all images."""
        if split != "train":
            return None
        coins = stream(run.recipe.seed, "alternating_flip").random(len(run.data.train)) < 0.5
        self._first = torch.from_numpy(coins).to(run.device)
        return self

    def look_up(self, indices: Tensor, epoch: int) -> Params:
        """Return ``flip``, bool [n]: whether each image is mirrored in this epoch."""
        first = self._first[indices]
        return {"flip": first if epoch % 2 == 0 else ~first}

    def source(self, params: Params, y: Tensor, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Return the same row, and the mirrored column where an image is to be mirrored."""
        mirrored = size[1] - 1 - x
        return y, torch.where(params["flip"].view(-1, 1, 1), mirrored, x)
