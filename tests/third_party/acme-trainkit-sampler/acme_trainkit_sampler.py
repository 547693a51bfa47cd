"""A sampler of hard examples."""

from typing import Any

import torch
from attrs import field
from attrs.validators import and_, ge, gt, le
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainkit import Batch, Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["Sampler"]

UNSEEN = -1.0


@plugin
class Sampler:
    """Train more often on the images whose last loss was high.

    An epoch takes a part of the training images, each at most once, drawn in proportion to ``loss ** power``. An image
    that was not seen yet counts as the hardest. The loss of an image is its cross-entropy, whatever the run minimizes.

    Args:
        fraction: the part of the training images that makes an epoch; greater than 0, at most 1.
        power: 0 draws all images alike; the greater, the more the hard ones are preferred.
        warmup: epochs at the beginning that draw all images alike.
    """

    fraction: float = field(default=0.5, validator=and_(gt(0), le(1)))
    power: float = field(default=1.0, validator=ge(0))
    warmup: int = field(default=1, validator=ge(0))
    _losses: Tensor = field(init=False, factory=lambda: torch.empty(0))
    _drawn_by: Tensor = field(init=False, factory=lambda: torch.empty(0))

    @hookimpl
    def built(self, run: Run) -> None:
        """No image was seen yet."""
        self._losses = torch.full((len(run.data.train),), UNSEEN, device=run.device)
        self._drawn_by = self._losses.clone()

    @hookimpl
    def epoch_start(self) -> None:
        """Keep the losses by which the epoch is drawn: it is drawn again when a run resumes inside it."""
        self._drawn_by = self._losses.clone()

    @hookimpl
    def epoch_order(self, run: Run) -> Tensor:
        """Draw the epoch's images."""
        n = len(run.data.train)
        size = max(1, round(self.fraction * n))
        weights = torch.ones(n, dtype=torch.float64)
        if len(self._drawn_by) and run.epoch >= self.warmup:
            losses = self._drawn_by.cpu().double()
            seen = losses != UNSEEN
            losses = losses.nan_to_num(posinf=1e6).clamp(min=1e-6, max=1e6)
            if seen.any():
                weights = torch.where(seen, losses, losses[seen].max()).pow(self.power)
        drawn = run.rng("sampler").choice(n, size, replace=False, p=(weights / weights.sum()).numpy())
        return torch.from_numpy(drawn)

    @hookimpl
    def forward_end(self, run: Run, batch: Batch, output: Tensor) -> None:
        """Note the loss of each training image."""
        if run.split == "train" and batch.indices is not None:
            losses = cross_entropy(output.detach().float(), batch.targets, reduction="none")
            self._losses[batch.indices] = losses

    def state_dict(self) -> dict[str, Any]:
        """Return the losses, and those by which the current epoch is drawn."""
        return {"losses": self._losses, "drawn_by": self._drawn_by}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._losses.copy_(state["losses"])
        self._drawn_by.copy_(state["drawn_by"])
