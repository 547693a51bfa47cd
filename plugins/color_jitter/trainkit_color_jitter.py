"""Random changes of brightness, contrast, saturation and hue."""

from typing import Any, ClassVar, Literal

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

CONTRAST, SATURATION, HUE = 1, 2, 3  # torchvision's numbers; brightness is 0


def _range(name: str, amount: Amount) -> tuple[float, float]:
    if isinstance(amount, tuple | list):
        return amount[0], amount[1]
    return (-amount, amount) if name == "hue" else (max(0, 1 - amount), 1 + amount)


def _amount(instance: object, attribute: "attrs.Attribute[Any]", value: Amount) -> None:
    low, high = _range(attribute.name, value)
    least, most = (-0.5, 0.5) if attribute.name == "hue" else (0, np.finfo(np.float32).max)
    if not least <= low <= high <= most:
        raise ValueError(
            f"{attribute.name!r} must be 0 to {most:.2g}, or a range in {least} to {most:.2g}, not {value}"
        )


def _hue_table() -> Tensor:
    """Return Pillow's 8-bit hues, uint8 [511 * 511], which depend on ``511 (r - g) + (g - b) + 255 * 512`` only."""
    rg, gb = np.mgrid[-255:256, -255:256]
    rgb = np.stack([rg + gb, gb, 0 * gb])
    r, g, b = (rgb.max(0) - rgb).astype(np.float32) / np.maximum(np.ptp(rgb, 0), 1).astype(np.float32)
    # Like Pillow in float64 from float32 and back: it makes some hues one less than they are.
    sixths = np.where(r == 0, b - g, np.where(g == 0, 2 + r.astype(float) - b, 4 + g.astype(float) - r))
    turns = np.fmod(sixths.astype(np.float32).astype(float) / 6 + 1, 1).astype(np.float32)
    return torch.from_numpy((turns.astype(float) * 255).astype(np.uint8).ravel())


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

    brightness: Amount = field(default=0, validator=_amount)
    contrast: Amount = field(default=0, validator=_amount)
    saturation: Amount = field(default=0, validator=_amount)
    hue: Amount = field(default=0, validator=_amount)
    _hues: Tensor = field(init=False, factory=_hue_table)

    @hookimpl
    def transforms(self, run: Run, split: Literal["train", "test"]) -> Map | None:
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
        ranges = [_range(name, getattr(self, name)) for name in ("brightness", "contrast", "saturation", "hue")]
        on = [number for number, limits in enumerate(ranges) if limits != ((0, 0) if number == HUE else (1, 1))]
        low, high = zip(*ranges, strict=True)
        factor = rng.uniform(low, high, [n, 4]).astype(np.float32)
        order = rng.permuted(np.tile(np.array(on, dtype=np.int64), (n, 1)), axis=1)
        draws: Draws = {"order": order, "factor": np.take_along_axis(factor, order, axis=1)}
        if HUE in on:
            draws["shift"] = (factor[:, HUE].astype(np.float64) * 255).astype(np.int32).astype(np.uint8)
        return draws

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Change the colors of uint8 images [N, 3, H, W] or [N, 1, H, W].

        Images are not grouped by operation, which would make a GPU wait. Three operations are one: a blend with
        operands of each image's own, which a factor of 1 makes idle. Hue comes once, for all images at the same time,
        between the blends that precede it and those that follow; for each image half of these blends are idle.
        """
        order, factor = params["order"], params["factor"]
        steps = range(order.shape[1])
        passed = (order == HUE).cumsum(1) > 0
        values = images.to(torch.float32)
        for k in steps[: len(steps) - ("shift" in params)]:
            _blend(values, order[:, k], torch.where(passed[:, k], 1, factor[:, k]))
        if "shift" in params:
            if values.shape[1] == 3:
                _turn(values, params["shift"], self._hues.to(values.device))
            for k in steps[1:]:  # passed one step earlier: this step is not hue itself
                _blend(values, order[:, k], torch.where(passed[:, k - 1], factor[:, k], 1))
        return values.to(torch.uint8)


def _blend(values: Tensor, operation: Tensor, factor: Tensor) -> None:
    """Move float images away from black, from their mean gray or from their own gray, as Pillow's ImageEnhance does."""
    gray = values[:, 0]
    if values.shape[1] == 3:  # exact: units of 2 ** -16 below 2 ** 8
        gray = gray.mul(19595 / 65536).add_(values[:, 1], alpha=38470 / 65536).add_(values[:, 2], alpha=7471 / 65536)
        gray.add_(0.5).floor_()
    pixels = gray[0].numel()
    total = gray.sum(2).sum(1, dtype=torch.int64)  # float32 is exact for a row, and not for a large image
    mean = (2 * total + pixels) // (2 * pixels) * (operation == CONTRAST)
    base = (gray * (operation == SATURATION).view(-1, 1, 1)).add_(mean.view(-1, 1, 1)).unsqueeze_(1)
    # Pillow rounds to float32 after each of these; a fused multiplication and addition would not.
    values.sub_(base).mul_(factor.view(-1, 1, 1, 1)).add_(base).clamp_(0, 255).floor_()


def _turn(values: Tensor, shift: Tensor, hues: Tensor) -> None:
    """Turn the hues of float images, through Pillow's 8-bit HSV and back.

    A channel is ``v (1 - s / 255 * d / 85)`` of value v and saturation s, where d goes from 0 to 85 and back around a
    circle of 510. In units of 1 / (255 * 85) these are whole numbers below 2 ** 24, exact, and never half a result.
    """
    r, g, b = values.unbind(1)
    value, least = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    index = r.mul(511).add_(g, alpha=-510).sub_(b).add_(255 * 512).to(torch.int32).flatten()
    angle = (hues.index_select(0, index).view(r.shape) + shift.view(-1, 1, 1)).float().mul_(2)
    saturation = (value - least).mul_(255).add_(0.5).div_(value.clamp(min=1)).floor_()
    depth, top = saturation.mul_(value).neg_(), value.mul(21675).add_(10837)
    for channel, center, sign, offset in ((r, 255, -1, 170), (g, 170, 1, -85), (b, 340, 1, -85)):
        distance = (angle - center).abs_().mul_(sign).add_(offset).clamp_(0, 85)
        channel.copy_(distance.mul_(depth).add_(top).mul_(1 / 21675).floor_())
