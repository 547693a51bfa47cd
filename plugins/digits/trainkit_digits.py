"""Scikit-learn's handwritten digits."""

from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch
from attrs import field
from attrs.validators import and_, gt, lt
from numpy.typing import NDArray
from torch import Tensor

from trainkit import Data, TensorSplit
from trainkit.plugin import hookimpl, plugin

__all__ = ["Digits"]


@plugin
class Digits:
    """Scikit-learn's 1,797 handwritten digits of 8x8 pixels (Alpaydin and Kaynak, 1998).

    They come with scikit-learn, so nothing is downloaded. uint8 [1, 8, 8]: the grey values 0 to 16 are scaled to 0 to
    255. The split depends on the data and `test_fraction` alone, never on a run's seed, and is stratified: the test
    images are spread evenly over the images of each class, in the order in which scikit-learn gives them. By default
    1,442 images are for training and 355 (every fifth of each class) for testing.

    Args:
        test_fraction: the part of each class, rounded down, that is for testing, spread evenly; between 0 and 1.
    """

    test_fraction: float = field(default=0.2, validator=and_(gt(0), lt(1)))

    @hookimpl
    def data(self) -> Data:
        """Return both splits.

        Raises:
            DataError: `test_fraction` is so small that no class has a test image.
        """
        rows = _rows()
        gray = np.rint(rows[:, :64] * (255 / 16)).astype(np.uint8)
        images = torch.from_numpy(gray).view(-1, 1, 8, 8)
        targets = torch.from_numpy(rows[:, 64].astype(np.int64))
        test = self._for_testing(targets)
        return Data(
            train=TensorSplit(images[~test], targets[~test]),
            test=TensorSplit(images[test], targets[test]),
            classes=tuple("0123456789"),
            shape=(1, 8, 8),
        )

    def _for_testing(self, targets: Tensor) -> Tensor:
        """Return which images are for testing, bool [N]."""
        test = torch.zeros(len(targets), dtype=torch.bool)
        for digit in range(10):
            index = (targets == digit).nonzero().squeeze(1)
            # An image is for testing where the number of test images that is due so far reaches the next integer.
            due = np.floor(np.arange(len(index) + 1) * self.test_fraction)
            test[index] = torch.from_numpy(np.diff(due) > 0)
        return test


def _rows() -> NDArray[np.float64]:
    """Return 64 grey values and the digit of each image."""
    # The file that load_digits reads. Importing load_digits takes longer than all else before a run's first step.
    path = Path(str(distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")))
    if path.exists():
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    return np.column_stack(load_digits(return_X_y=True))
