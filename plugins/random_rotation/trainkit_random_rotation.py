"""Random rotation."""

from typing import Any, Literal

import attrs
import numpy as np
from attrs import field
from numpy.typing import NDArray
from torch import Tensor

from trainkit import Gather
from trainkit.plugin import hookimpl, plugin
from trainkit.transforms import Draws, Params, Size

__all__ = ["RandomRotation", "affine"]

Angle = int | float


def _range(instance: object, attribute: "attrs.Attribute[Any]", value: Angle | tuple[Angle, Angle]) -> None:
    low, high = value if isinstance(value, tuple | list) else (-value, value)
    if not -np.inf < low <= high < np.inf:
        raise ValueError(f"'degrees' must be a number from 0 on, or a range [least, greatest], not {value}")


@plugin
class RandomRotation(Gather):
    """Rotate each training image by a random angle, as torchvision's RandomRotation does on PIL images.

    Nearest pixel, around the centre, size kept, black where nothing comes from; byte for byte what Pillow gives for the
    same angle, for images of up to 27,000 pixels a side (it computes larger ones in another way).

    Args:
        degrees: angles are uniform in [-degrees, degrees], or in [least, greatest]; counter-clockwise.
    """

    degrees: Angle | tuple[Angle, Angle] = field(default=10, validator=_range)

    @hookimpl
    def transforms(self, split: Literal["train", "test"]) -> Gather | None:
        """Take part in training only."""
        return self if split == "train" else None

    def draw(self, rng: np.random.Generator, n: int, size: Size) -> Draws:
        """Draw ``angle``, float32 [n] in degrees, and give ``matrix``, int32 [n, 6]: see :func:`affine`."""
        low, high = self.degrees if isinstance(self.degrees, tuple | list) else (-self.degrees, self.degrees)
        angle = rng.uniform(low, high, n).astype(np.float32)
        return {"angle": angle, "matrix": affine(angle, size)}

    def source(self, params: Params, y: Tensor, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Return where the rotation takes each output pixel from; the last 16 bits are the fraction of a pixel."""
        a, b, c, d, e, f = params["matrix"].view(-1, 6, 1, 1).unbind(1)
        return (d * x + (e * y + f)) >> 16, (a * x + (b * y + c)) >> 16


def affine(angle: NDArray[np.floating], size: Size) -> NDArray[np.int32]:
    """Return the matrices (a, b, c, d, e, f) with which Pillow rotates, in units of 1 / 65536.

    Output pixel (x, y) comes from column ``a x + b y + c`` and row ``d x + e y + f``. ``Image.rotate`` rounds sine and
    cosine to 15 decimals, and its affine transform for nearest pixels rounds the matrix to 16 binary places. The right
    angles, which Pillow treats apart, come out the same.

    Args:
        angle: [n], in degrees counter-clockwise.
        size: height and width of the images.

    Returns:
        [n, 6].
    """
    height, width = size
    radians = -np.deg2rad(angle.astype(np.float64) % 360.0)
    cos, sin = np.round(np.cos(radians), 15), np.round(np.sin(radians), 15)
    # The order of these operations is Pillow's: another one can round to another pixel.
    c = cos * (-width / 2) + sin * (-height / 2) + width / 2
    f = -sin * (-width / 2) + cos * (-height / 2) + height / 2
    c, f = c + cos * 0.5 + sin * 0.5, f + -sin * 0.5 + cos * 0.5  # a pixel's centre
    matrix: NDArray[np.int32] = np.floor(np.stack([cos, sin, c, -sin, cos, f], 1) * 65536.0 + 0.5).astype(np.int32)
    return matrix
