"""Cross-validation."""

import torch
from attrs import field
from attrs.validators import ge

from trainkit import Data
from trainkit.data import class_targets, subset
from trainkit.errors import DataError, RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.rng import stream

__all__ = ["Folds"]


@plugin
class Folds:
    """Validate on one of k folds of the training images (Stone, 1974).

    The folds are the same in every run, whatever its seed. Each holds its share of each class, to within one image.

    Args:
        fold: which fold is the validation split, from 0 to ``folds - 1``; the others are trained on.
        folds: how many there are, at least 2.
        shuffle: chooses the folds.
    """

    fold: int = field(validator=ge(0))
    folds: int = field(default=5, validator=ge(2))
    shuffle: int = 0

    def __attrs_post_init__(self) -> None:
        if self.fold >= self.folds:
            raise ValueError(f"'fold' must be less than 'folds' ({self.folds}), not {self.fold}")

    @hookimpl
    def transform_data(self, data: Data) -> Data:
        """Split the training images."""
        if data.validation is not None:
            raise RecipeError("plugins.folds: there is a validation split already; leave out what holds it out")
        n = len(data.train)
        if n < self.folds:
            raise DataError(f"plugins.folds: {n} training images cannot make {self.folds} folds")
        order = torch.from_numpy(stream(self.shuffle, "folds").permutation(n))
        targets = class_targets(data.train)
        if targets is not None:
            order = order[targets[order].argsort(stable=True)]
        fold_of = torch.empty(n, dtype=torch.int64)
        fold_of[order] = torch.arange(n) % self.folds
        held = fold_of == self.fold
        return data.replace(
            train=subset(data.train, (~held).nonzero().flatten()),
            validation=subset(data.train, held.nonzero().flatten()),
        )
