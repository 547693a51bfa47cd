"""Random rotation."""

from typing import Any

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


def _angle_range(degrees: Angle | tuple[Angle, Angle]) -> tuple[Angle, Angle]:
    """Return the least and the greatest angle."""
    least, greatest = degrees if isinstance(degrees, tuple | list) else (-degrees, degrees)
    return least, greatest


def _check_degrees(instance: object, attribute: "attrs.Attribute[Any]", value: Angle | tuple[Angle, Angle]) -> None:
    least, greatest = _angle_range(value)
    if not -np.inf < least <= greatest < np.inf:
        raise ValueError(f"'degrees' must be a number from 0 on, or a range [least, greatest], not {value}")


@plugin
class RandomRotation(Gather):
    """Rotate each training image by a random angle, as torchvision's RandomRotation does on PIL images.

    It rotates around the centre, takes the nearest pixel, keeps the size, and leaves black what comes from outside of
    the image. Byte for byte what Pillow gives for the same angle, for images of up to 27,000 pixels a side. (Pillow
    computes larger ones in another way.)

    Args:
        degrees: angles are uniform in [-degrees, degrees], or in [least, greatest]; counter-clockwise.
    """

    degrees: Angle | tuple[Angle, Angle] = field(default=10, validator=_check_degrees)

    @hookimpl
    def transforms(self, split: str) -> Gather | None:
        """Take part in training only."""
        return self if split == "train" else None

    def draw(self, rng: np.random.Generator, n: int, size: Size) -> Draws:
        """Draw ``angle``, float32 [n] in degrees, and give ``matrix``, int32 [n, 6]: see :func:`affine`."""
        least, greatest = _angle_range(self.degrees)
        angle = rng.uniform(least, greatest, n).astype(np.float32)
        return {"angle": angle, "matrix": affine(angle, size)}

    def source(self, params: Params, y: Tensor, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Return where the rotation takes each output pixel from."""
        a, b, c, d, e, f = params["matrix"].view(-1, 6, 1, 1).unbind(1)
        row = d * x + (e * y + f)
        column = a * x + (b * y + c)
        return row >> 16, column >> 16  # the last 16 bits are the fraction of a pixel


def affine(angle: NDArray[np.floating], size: Size) -> NDArray[np.int32]:
    """Return the matrices (a, b, c, d, e, f) with which Pillow rotates, in units of 1 / 65536.

    Output pixel (x, y) comes from column ``a x + b y + c`` and row ``d x + e y + f``. ``Image.rotate`` rounds sine and
    cosine to 15 decimals, and its affine transform for nearest pixels rounds the matrix to 16 binary places. Pillow has
    code of its own for right angles, which gives the same.

    Args:
        angle: [n], in degrees counter-clockwise.
        size: height and width of the images.

    Returns:
        [n, 6].
    """
    height, width = size
    radians = -np.deg2rad(angle.astype(np.float64) % 360.0)
    cos = np.round(np.cos(radians), 15)
    sin = np.round(np.sin(radians), 15)
    # The order of these operations is Pillow's. Another one can round to another pixel.
    c = cos * (-width / 2) + sin * (-height / 2) + width / 2
    f = -sin * (-width / 2) + cos * (-height / 2) + height / 2
    # From the corner of a pixel to its centre.
    c = c + cos * 0.5 + sin * 0.5
    f = f + -sin * 0.5 + cos * 0.5
    exact = np.stack([cos, sin, c, -sin, cos, f], axis=1)
    matrix: NDArray[np.int32] = np.floor(exact * 65536.0 + 0.5).astype(np.int32)
    return matrix
