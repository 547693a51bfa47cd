"""One random operation an image."""

from typing import ClassVar

import numpy as np
import torch
from attrs import field
from attrs.validators import ge
from numpy.typing import NDArray
from torch import Tensor

from trainkit import Gather, Map, Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.transforms import Draws, Params, Size, gather

__all__ = ["OPERATIONS", "TrivialAugment"]

#: By their numbers, with torchvision's names, in torchvision's order.
OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
BLENDS = [NUMBER[name] for name in ("Brightness", "Color", "Contrast", "Sharpness")]
SIGNED = [NUMBER[name] for name in ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")] + BLENDS


def _magnitudes(bins: int) -> NDArray[np.float64]:
    """Return the magnitudes of each operation, [operations, bins]: the paper's wide space, as torchvision has it."""
    table = torch.zeros(len(OPERATIONS), bins)
    for name in ("ShearX", "ShearY", "Brightness", "Color", "Contrast", "Sharpness"):
        table[NUMBER[name]] = torch.linspace(0.0, 0.99, bins)
    for name in ("TranslateX", "TranslateY"):
        table[NUMBER[name]] = torch.linspace(0.0, 32.0, bins)
    table[NUMBER["Rotate"]] = torch.linspace(0.0, 135.0, bins)
    table[NUMBER["Posterize"]] = 8 - (torch.arange(bins) / ((bins - 1) / 6)).round()
    table[NUMBER["Solarize"]] = torch.linspace(255.0, 0.0, bins)
    return table.double().numpy()


@plugin
class TrivialAugment(Map):
    """Change each training image by one random operation of random strength (Müller and Hutter, ICCV 2021).

    Byte for byte torchvision's TrivialAugmentWide on PIL images: one of 14 operations, one of its magnitudes and, where
    it has a direction, a sign, all equally likely and each image's own. Pixels are nearest ones, and what comes from
    outside of the image is black. For RGB images and gray ones, of up to 16,000 pixels a side.

    Args:
        num_magnitude_bins: magnitudes of each operation, from none to the strongest; at least 2.
    """

    before: ClassVar = ("normalize",)
    needs_uint8: ClassVar = True

    num_magnitude_bins: int = field(default=31, validator=ge(2))

    @hookimpl
    def transforms(self, run: Run, split: str) -> Map | None:
        """Take part in training only.

        Raises:
            RecipeError: the images are neither RGB nor gray.
        """
        if run.data.shape[0] not in (1, 3):
            raise RecipeError(
                f"the images have {run.data.shape[0]} channels, and it takes RGB (3) and gray ones (1); drop it with "
                "`trivial_augment: false`"
            )
        return self if split == "train" else None

    def draw(self, rng: np.random.Generator, n: int, size: Size) -> Draws:
        """Draw an operation for each image, and give what it computes with.

        Returns:
            ``operation``, int64 [n], and ``magnitude``, float64 [n], with its sign; and what :func:`parameters` makes
            of them.
        """
        operation = rng.integers(len(OPERATIONS), size=n)
        magnitude = _magnitudes(self.num_magnitude_bins)[operation, rng.integers(self.num_magnitude_bins, size=n)]
        is_negative = rng.integers(2, size=n) * np.isin(operation, SIGNED)
        return parameters(operation, np.where(is_negative, -magnitude, magnitude), size)

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Change uint8 images [N, C, H, W].

        Grouping the images by operation would synchronise with the device, since the host needs the sizes of the
        groups. So all images pass through the three kinds of operations, with parameters that change nothing in two.
        """
        moved = gather(images, [(_Affine(), params)])
        blended = _blend(moved, params["operation"], params["factor"])
        return _map_levels(blended, params)


def parameters(operation: NDArray[np.int64], magnitude: NDArray[np.float64], size: Size) -> Draws:
    """Return what images are changed with, given torchvision's operations and magnitudes.

    Args:
        operation: [n], places in :data:`OPERATIONS`.
        magnitude: [n], with its sign.
        size: height and width of the images.

    Returns:
        Both, and by kind of operation ``matrix``, int32 [n, 6]: see :func:`_matrix`; ``factor``, float32 [n]: of a
        blend, 1 leaves an image as it is; ``mask``, uint8 [n]: the bits that Posterize keeps; ``threshold``, float64
        [n]: the first level that Solarize inverts, 256 for none.
    """
    bits = np.where(operation == NUMBER["Posterize"], magnitude, 8).astype(np.int64)
    return {
        "operation": operation,
        "magnitude": magnitude,
        "matrix": _matrix(operation, magnitude, size),
        "factor": np.where(np.isin(operation, BLENDS), 1 + magnitude, 1).astype(np.float32),
        "mask": (256 - (1 << (8 - bits))).astype(np.uint8),
        "threshold": np.where(operation == NUMBER["Solarize"], magnitude, 256),
    }


def _matrix(operation: NDArray[np.int64], magnitude: NDArray[np.float64], size: Size) -> NDArray[np.int32]:
    """Return the matrices (a, b, c, d, e, f) with which Pillow moves pixels, in units of 1 / 65536.

    Output pixel (x, y) comes from column ``a x + b y + c`` and row ``d x + e y + f``. Pillow's affine transform for
    nearest pixels rounds them to 16 binary places.
    """
    height, width = size

    def of(name: str) -> NDArray[np.float64]:
        return np.where(operation == NUMBER[name], magnitude, 0)

    # Image.rotate rounds sine and cosine to 15 decimals. The order of these operations is Pillow's.
    radians = -np.deg2rad(of("Rotate") % 360.0)
    cos, sin = np.round(np.cos(radians), 15), np.round(np.sin(radians), 15)
    c = cos * (-width / 2) + sin * (-height / 2) + width / 2
    f = -sin * (-width / 2) + cos * (-height / 2) + height / 2
    # Whatever an image's operation is, the terms of the others are 0.
    a, b, d, e = cos, sin + of("ShearX"), -sin + of("ShearY"), cos
    c = c - np.trunc(of("TranslateX"))
    f = f - np.trunc(of("TranslateY"))
    # From the corner of a pixel to its centre.
    c = c + a * 0.5 + b * 0.5
    f = f + d * 0.5 + e * 0.5
    exact = np.stack([a, b, c, d, e, f], axis=1)
    matrix: NDArray[np.int32] = np.floor(exact * 65536.0 + 0.5).astype(np.int32)
    return matrix


class _Affine(Gather):
    """Moves pixels by the matrices of :func:`_matrix`."""

    __slots__ = ()

    def source(self, params: Params, y: Tensor, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Return where the matrix takes each output pixel from."""
        a, b, c, d, e, f = params["matrix"].view(-1, 6, 1, 1).unbind(1)
        row = d * x + (e * y + f)
        column = a * x + (b * y + c)
        return row >> 16, column >> 16  # the last 16 bits are the fraction of a pixel


def _blend(images: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Move images away from an operand, as Pillow's ImageEnhance does.

    The operand is black for Brightness, the image's own gray for Color, its mean gray for Contrast and the smoothed
    image for Sharpness.

    Args:
        images: uint8 [N, C, H, W].
        operation: [N].
        factor: [N]; 1 leaves an image as it is, whatever its operation.
    """

    def of(name: str) -> Tensor:
        return (operation == NUMBER[name]).view(-1, 1, 1, 1)

    values = images.to(torch.float32)
    gray = _gray(values)
    pixels = gray[0].numel()
    # float32 is exact for the sum of a row; that of a large image needs int64.
    total = gray.sum(3).sum(2, dtype=torch.int64).view(-1, 1, 1, 1)
    mean = (2 * total + pixels) // (2 * pixels)  # rounded, halves upwards
    operand = gray * of("Color") + mean * of("Contrast") + _smooth(values) * of("Sharpness")
    # Pillow rounds to float32 after each of these; a fused multiplication and addition would not.
    blended = values.sub_(operand).mul_(factor.view(-1, 1, 1, 1)).add_(operand)
    return blended.clamp_(0, 255).to(torch.uint8)


def _gray(values: Tensor) -> Tensor:
    """Return float images as Pillow's whole gray levels, [N, 1, H, W]."""
    if values.shape[1] == 1:
        return values
    red, green, blue = values.unsqueeze(2).unbind(1)
    # Exact in float32: the terms are multiples of 2 ** -16 and their sum is below 2 ** 8.
    gray = red.mul(19595 / 65536).add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536)
    return gray.add_(0.5).floor_()


def _smooth(values: Tensor) -> Tensor:
    """Return float images under Pillow's filter SMOOTH: the mean of 3x3 pixels, of which the middle one counts 5 times.

    Pixels at the edge stay as they are, and so does an image with a side of fewer than 3 pixels.
    """
    if min(values.shape[2:]) < 3:
        return values
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    total = box.add_(values[:, :, 1:-1, 1:-1], alpha=4)
    smoothed = values.clone()
    # total / 13, rounded; an odd number over 26 is never whole, so no rounding of the division shows.
    smoothed[:, :, 1:-1, 1:-1] = total.mul_(2).add_(13).div_(26).floor_()
    return smoothed


def _map_levels(images: Tensor, params: Params) -> Tensor:
    """Give each level of each channel another one: Posterize, Solarize, AutoContrast and Equalize.

    Args:
        images: uint8 [N, C, H, W].
        params: ``operation``, ``mask`` and ``threshold``.
    """
    n, channels, height, width = images.shape
    pixels = images.reshape(n, channels, -1).to(torch.int64)
    levels = torch.arange(256, device=images.device)
    operation = params["operation"].view(-1, 1, 1)
    inverted = torch.where(levels < params["threshold"].view(-1, 1, 1), levels, 255 - levels)
    table = (inverted & params["mask"].view(-1, 1, 1)).expand(n, channels, 256)
    table = torch.where(operation == NUMBER["AutoContrast"], _autocontrast(pixels, levels), table)
    table = torch.where(operation == NUMBER["Equalize"], _equalize(pixels, levels), table)
    return table.gather(2, pixels).to(torch.uint8).view(n, channels, height, width)


def _autocontrast(pixels: Tensor, levels: Tensor) -> Tensor:
    """Return the table that takes the least level of a channel to 0 and the greatest to 255, int64 [N, C, 256].

    Args:
        pixels: int64 [N, C, pixels].
        levels: int64 [256].
    """
    least, greatest = pixels.amin(2, keepdim=True), pixels.amax(2, keepdim=True)
    # In float64, operation by operation, as Pillow computes it in Python.
    spread = (greatest - least).clamp(min=1).double()
    scale = torch.full_like(spread, 255.0) / spread  # `255.0 / spread` would multiply by a rounded 1 / spread
    offset = -least * scale
    table = (levels * scale + offset).to(torch.int64).clamp_(0, 255)
    return torch.where(greatest > least, table, levels)


def _equalize(pixels: Tensor, levels: Tensor) -> Tensor:
    """Return the table that makes all levels of a channel about equally frequent, int64 [N, C, 256].

    Args:
        pixels: int64 [N, C, pixels].
        levels: int64 [256].
    """
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int64, device=pixels.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    of_greatest = counts.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - of_greatest) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, table, levels)
