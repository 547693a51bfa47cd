"""A first convolution that whitens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from attrs import field
from attrs.validators import ge, optional
from torch import Tensor, nn

from trainkit import Run
from trainkit.data import Batches, subset
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, matching_modules, plugin
from trainkit.rng import stream

__all__ = ["Whitening", "whitening_filters"]

BATCH = 250  # images whose patches are in memory at a time


@plugin
class Whitening:
    """Start the first convolution so that it whitens patches of the training images (Jordan, arXiv:2404.00498).

    Its filters are the eigenvectors of the patches' second moments, those of the greatest eigenvalues first, each
    divided by the square root of its eigenvalue plus `eps`; then the same with the other sign. Filters beyond these
    keep their initial values, and of a convolution with fewer filters the last are left out.

    The images are drawn from the training split by the seed, without replacement. They pass through the transforms of
    the test split, such as ``normalize``.

    Args:
        module: path of the convolution, such as ``stem.conv``; by default the network's first.
        images: training images whose patches count; at least 1. Of a smaller training split all do.
        eps: added to the eigenvalues, so that directions with hardly any variance are not scaled up; at least 0.
        freeze: keep the convolution's weights as they are set. They count as parameters nevertheless.
        bias_epochs: train the convolution's bias for so many epochs, at least 0; by default for all.
    """

    module: str | None = None
    images: int = field(default=5000, validator=ge(1))
    eps: float = field(default=5e-4, validator=ge(0))
    freeze: bool = True
    bias_epochs: int | None = field(default=None, validator=optional(ge(0)))
    _conv: nn.Conv2d = field(init=False)

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Set the filters; not in a run that is only tried, or whose weights are about to be loaded.

        Raises:
            RecipeError: there is no such convolution, it is grouped, or it lacks the bias that `bias_epochs` names.
        """
        self._conv = self._find(model)
        if not run.dry:
            filters = whitening_filters(_second_moments(run, self._conv, self.images), self.eps)
            filters = filters[: self._conv.out_channels].reshape(-1, *self._conv.weight.shape[1:])
            self._conv.weight.detach()[: len(filters)] = filters.to(self._conv.weight.dtype)
        return model

    def _find(self, model: nn.Module) -> nn.Conv2d:
        candidates: Sequence[nn.Module]
        if self.module is None:
            candidates = [part for part in model.modules() if isinstance(part, nn.Conv2d)][:1]
        else:
            candidates = list(matching_modules(model, [self.module], "module").values())
        conv = candidates[0] if len(candidates) == 1 else None
        if not isinstance(conv, nn.Conv2d):
            where = "the network has none" if self.module is None else f"{self.module!r} is not one"
            raise RecipeError(f"'module': a convolution of images is needed, and {where}")
        if conv.groups > 1:
            raise RecipeError("'module': the convolution is grouped, and sees no whole patches; name another one")
        if self.bias_epochs is not None and conv.bias is None:
            raise RecipeError("'bias_epochs': the convolution has no bias; leave it out")
        return conv

    @hookimpl
    def train_start(self, run: Run) -> None:
        """Freeze what is to be frozen in this epoch."""
        if self.freeze:
            self._conv.weight.requires_grad_(False)
        if self.bias_epochs is not None and self._conv.bias is not None:
            self._conv.bias.requires_grad_(run.epoch < self.bias_epochs)


def whitening_filters(moments: Tensor, eps: float) -> Tensor:
    """Return the filters that whiten, both signs, float64 [2 * d, d].

    Args:
        moments: float64 [d, d], the patches' second moments.
        eps: added to the eigenvalues.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(moments)
    directions = eigenvectors.T.flip(0)  # a row each, the greatest eigenvalue first
    # The sign of an eigenvector is up to the library: let its entry of greatest magnitude be positive.
    greatest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    scaled = directions * greatest.sign() / (eigenvalues.flip(0).clamp(min=0) + eps).sqrt().unsqueeze(1)
    return torch.cat([scaled, -scaled])


def _second_moments(run: Run, conv: nn.Conv2d, images: int) -> Tensor:
    """Return the mean product of each two values of a patch, over all patches of a sample, float64 [d, d]."""
    size = len(run.data.train)
    chosen = stream(run.recipe.seed, "whitening").permutation(size)[:images]
    sample = subset(run.data.train, torch.from_numpy(chosen).sort().values)
    batches = Batches(sample, BATCH, run.device, run.data.workers, seed=run.recipe.seed)
    total, count = torch.zeros(()), 0
    for batch in batches.iterate():
        seen = run.transforms["test"](batch.images, lambda name: stream(run.recipe.seed, name))
        patches = F.unfold(seen.double(), conv.kernel_size, conv.dilation).transpose(0, 1).flatten(1).cpu()
        total = total + patches @ patches.T
        count += patches.shape[1]
    batches.close()
    return total / count
