"""Random changes of brightness, contrast, saturation and hue."""

from typing import Any, ClassVar

import attrs
import numpy as np
import torch
from attrs import field
from torch import Tensor

from trainkit import Map, Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.transforms import Draws, Params, Size

__all__ = ["ColorJitter"]

Amount = int | float | tuple[int | float, int | float]

#: The operations by their numbers, which are torchvision's.
OPERATIONS = ("brightness", "contrast", "saturation", "hue")
CONTRAST, SATURATION, HUE = 1, 2, 3

# The unit in which `_turn` computes: see there.
UNIT = 255 * 85


def _factor_range(operation: str, amount: Amount) -> tuple[float, float]:
    """Return the least and the greatest factor of an operation."""
    if isinstance(amount, tuple | list):
        return amount[0], amount[1]
    if operation == "hue":
        return -amount, amount
    return max(0, 1 - amount), 1 + amount


def _check_amount(instance: object, attribute: "attrs.Attribute[Any]", value: Amount) -> None:
    low, high = _factor_range(attribute.name, value)
    least, most = (-0.5, 0.5) if attribute.name == "hue" else (0, np.finfo(np.float32).max)
    if not least <= low <= high <= most:
        raise ValueError(
            f"{attribute.name!r} must be 0 to {most:.2g}, or a range in {least} to {most:.2g}, not {value}"
        )


def _hue_table() -> Tensor:
    """Return Pillow's 8-bit hues, uint8 [511 * 511].

    A hue depends only on the differences between the channels. Its index is ``511 (r - g) + (g - b) + 255 * 512``.
    """
    red_minus_green, green_minus_blue = np.mgrid[-255:256, -255:256]
    rgb = np.stack([red_minus_green + green_minus_blue, green_minus_blue, np.zeros_like(green_minus_blue)])
    spread = np.maximum(np.ptp(rgb, 0), 1)  # 1 for a gray: it has no hue, and nothing is divided by 0
    red, green, blue = (rgb.max(0) - rgb).astype(np.float32) / spread.astype(np.float32)
    # Pillow computes in float64 from float32 values and stores float32, which makes some hues one less. So do these.
    sixths = np.select(
        [red == 0, green == 0],
        [blue - green, 2 + red.astype(np.float64) - blue],
        default=4 + green.astype(np.float64) - red,
    )
    turns = np.fmod(sixths.astype(np.float32).astype(np.float64) / 6 + 1, 1).astype(np.float32)
    hues = (turns.astype(np.float64) * 255).astype(np.uint8)
    return torch.from_numpy(hues.ravel())


@plugin
class ColorJitter(Map):
    """Change brightness, contrast, saturation and hue of each training image, as torchvision's ColorJitter does.

    Each image has its own factors and its own order of the operations. Byte for byte what Pillow gives for the same
    parameters, for RGB images and for gray ones, whose saturation and hue stay as they are. 0 turns an operation off.

    Args:
        brightness: factors are uniform in [max(0, 1 - brightness), 1 + brightness], or in [least, greatest]; 0 is off.
        contrast: likewise.
        saturation: likewise.
        hue: hues turn by a part of the circle, uniform in [-hue, hue] and at most 0.5, or in [least, greatest]; 0 is
            off.
    """

    before: ClassVar = ("normalize",)
    needs_uint8: ClassVar = True

    brightness: Amount = field(default=0, validator=_check_amount)
    contrast: Amount = field(default=0, validator=_check_amount)
    saturation: Amount = field(default=0, validator=_check_amount)
    hue: Amount = field(default=0, validator=_check_amount)
    _hues: Tensor = field(init=False, factory=_hue_table)

    @hookimpl
    def transforms(self, run: Run, split: str) -> Map | None:
        """Take part in training only.

        Raises:
            RecipeError: the images are neither RGB nor gray.
        """
        if run.data.shape[0] not in (1, 3):
            channels = f"the images have {run.data.shape[0]} channels, and it takes RGB (3) and gray ones (1)"
            raise RecipeError(f"plugins.color_jitter: {channels}; drop it with `color_jitter: false`")
        self._hues = self._hues.to(run.device)
        return self if split == "train" else None

    def draw(self, rng: np.random.Generator, n: int, size: Size) -> Draws:
        """Draw the operations of each image, in its own order, and the factor of each.

        Returns:
            ``order``, int64 [n, k]: the k operations that are on, 0 brightness, 1 contrast, 2 saturation, 3 hue;
            ``factor``, float32 [n, k], in that order; with hue ``shift``, uint8 [n]: its factor in Pillow's 8-bit unit.
        """
        ranges = [_factor_range(name, getattr(self, name)) for name in OPERATIONS]
        idle = [(0, 0) if name == "hue" else (1, 1) for name in OPERATIONS]
        on = [number for number in range(len(OPERATIONS)) if ranges[number] != idle[number]]
        least, greatest = zip(*ranges, strict=True)
        # Factors are drawn for all four operations, so those of one do not depend on which others are on.
        factor = rng.uniform(least, greatest, [n, len(OPERATIONS)]).astype(np.float32)
        order = rng.permuted(np.tile(np.array(on, dtype=np.int64), (n, 1)), axis=1)
        draws: Draws = {"order": order, "factor": np.take_along_axis(factor, order, axis=1)}
        if HUE in on:
            draws["shift"] = (factor[:, HUE].astype(np.float64) * 255).astype(np.int32).astype(np.uint8)
        return draws

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Change the colors of uint8 images [N, 3, H, W] or [N, 1, H, W].

        Grouping the images by operation would synchronise with the device, since the host needs the sizes of the
        groups. So every step blends all images. Brightness, contrast and saturation are one blend, each image with its
        own operand, and a factor of 1 leaves an image as it is. Hue is turned once, for all images together. The blends
        run once before it and once after it; for each image, either the first or the second of the two has factor 1.
        """
        order, factor = params["order"], params["factor"]
        steps = order.shape[1]
        values = images.to(torch.float32)
        if "shift" not in params:
            for step in range(steps):
                _blend(values, order[:, step], factor[:, step])
            return values.to(torch.uint8)

        hue_reached = (order == HUE).cumsum(1) > 0  # [N, steps]: at this step or at an earlier one
        for step in range(steps - 1):  # at the last step, hue is reached in every image
            _blend(values, order[:, step], torch.where(hue_reached[:, step], 1, factor[:, step]))
        if values.shape[1] == 3:
            _turn(values, params["shift"], self._hues.to(values.device))
        for step in range(1, steps):
            hue_passed = hue_reached[:, step - 1]  # so this step is not hue itself
            _blend(values, order[:, step], torch.where(hue_passed, factor[:, step], 1))
        return values.to(torch.uint8)


def _gray(values: Tensor) -> Tensor:
    """Return float images as Pillow's whole gray levels, [N, H, W]."""
    if values.shape[1] == 1:
        return values[:, 0]
    red, green, blue = values.unbind(1)
    # Exact in float32: the terms are multiples of 2 ** -16 and their sum is below 2 ** 8.
    gray = red.mul(19595 / 65536).add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536)
    return gray.add_(0.5).floor_()


def _blend(values: Tensor, operation: Tensor, factor: Tensor) -> None:
    """Move float images away from an operand in place, as Pillow's ImageEnhance does.

    The operand is black for brightness, the image's mean gray for contrast and its own gray for saturation.

    Args:
        values: whole numbers from 0 to 255 as float32 [N, C, H, W].
        operation: [N]; hue counts as brightness here, and its factor must be 1.
        factor: [N]; 1 leaves an image as it is.
    """
    gray = _gray(values)
    pixels = gray[0].numel()
    # float32 is exact for the sum of a row; that of a large image needs int64.
    total = gray.sum(2).sum(1, dtype=torch.int64)
    mean = (2 * total + pixels) // (2 * pixels)  # rounded, halves upwards
    operand = gray * (operation == SATURATION).view(-1, 1, 1)
    operand = operand.add_((mean * (operation == CONTRAST)).view(-1, 1, 1)).unsqueeze_(1)
    # Pillow rounds to float32 after each of these; a fused multiplication and addition would not.
    values.sub_(operand).mul_(factor.view(-1, 1, 1, 1)).add_(operand).clamp_(0, 255).floor_()


def _turn(values: Tensor, shift: Tensor, hues: Tensor) -> None:
    """Turn the hues of float images in place, through Pillow's 8-bit HSV and back.

    A channel of a color with value v and saturation s is ``v (1 - s / 255 * d / 85)``. The distance d goes from 0 to 85
    and back around a circle of 510. In units of 1 / (255 * 85) these are whole numbers below 2 ** 24, which float32
    holds exactly, and none lies halfway between two results.

    Args:
        values: whole numbers from 0 to 255 as float32 [N, 3, H, W].
        shift: uint8 [N], added to the hues modulo 256.
        hues: what `_hue_table` returns.
    """
    red, green, blue = values.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    # 511 (r - g) + (g - b) + 255 * 512
    index = red.mul(511).add_(green, alpha=-510).sub_(blue).add_(255 * 512).to(torch.int32).flatten()
    hue = hues.index_select(0, index).view(red.shape) + shift.view(-1, 1, 1)
    angle = hue.float().mul_(2)
    saturation = (value - least).mul_(255).add_(0.5).div_(value.clamp(min=1)).floor_()
    slope = saturation.mul_(value).neg_()
    top = value.mul(UNIT).add_(UNIT // 2)  # the half makes the last step round
    # The distance is a clamped line to both sides of a center: falling for red, rising for green and blue.
    for channel, center, sign, offset in ((red, 255, -1, 170), (green, 170, 1, -85), (blue, 340, 1, -85)):
        distance = (angle - center).abs_().mul_(sign).add_(offset).clamp_(0, 85)
        channel.copy_(distance.mul_(slope).add_(top).mul_(1 / UNIT).floor_())
