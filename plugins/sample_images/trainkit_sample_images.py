"""What the network sees."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from attrs import field
from attrs.validators import and_, ge, le
from torch import Tensor

from trainkit import Run
from trainkit.images import displayed
from trainkit.plugin import hookimpl, plugin
from trainkit.run import epoch_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SampleImages", "draw"]

ACROSS = 8  # images beside each other


@plugin
class SampleImages:
    """Draw training images as they are stored and as the network sees them: ``figures/samples.png``.

    They are the first images of the first epoch, after every transform, mixing of images included. The values that the
    network sees are drawn from the least, black, to the greatest, white. A mirrored letter, a crop that misses the
    object or a channel that is empty shows at once.

    Args:
        count: how many images, 1 to 64; not more than a batch.
    """

    observer: ClassVar = True

    count: int = field(default=16, validator=and_(ge(1), le(64)))

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Draw, before the first step of a run."""
        if run.step or run.batch_index or run.dir is None:
            return
        batches = run.batches["train"]
        stored = next(iter(batches.iterate(epoch_order(run), epoch=run.epoch)))
        before, targets = stored.images[: self.count].cpu(), stored.targets[: self.count].cpu()
        batches.close()
        after = next(iter(run.iterate("train"))).images[: self.count].float().cpu()
        batches.close()
        names = [run.data.classes[int(target)] for target in targets] if run.data.has_class_targets else []
        data = io.BytesIO()
        draw(before / 255, _scaled(after), names).savefig(data, format="png")
        run.dir.write("figures/samples.png", data.getvalue())


def _scaled(images: Tensor) -> Tensor:
    """Map the least value to 0 and the greatest to 1, over all images."""
    least, greatest = images.amin(), images.amax()
    return (images - least) / (greatest - least).clamp(min=torch.finfo(images.dtype).tiny)


def draw(before: Tensor, after: Tensor, names: Sequence[str]) -> Figure:
    """Draw pairs of images, the stored one above the one that the network sees.

    Args:
        before: [N, C, H, W], from 0 to 1; of other than 1 or 3 channels the first is drawn.
        after: as `before`, of any size.
        names: of the classes; empty where there are none.
    """
    from matplotlib.figure import Figure

    n = len(before)
    across = min(n, ACROSS)
    blocks = -(-n // across)
    figure = Figure(figsize=(1.4 * across + 1.2, 3.1 * blocks), dpi=100, layout="constrained")
    grid = figure.subplots(2 * blocks, across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for i in range(n):
        row, column = divmod(i, across)
        for axes, image in ((grid[2 * row, column], before[i]), (grid[2 * row + 1, column], after[i])):
            axes.imshow(displayed(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        if names:
            name = names[i] if len(names[i]) <= 14 else f"{names[i][:13]}…"
            grid[2 * row, column].set_title(name.replace("$", r"\$"), fontsize=9)
    for row in range(blocks):
        for axes, text in ((grid[2 * row, 0], "stored"), (grid[2 * row + 1, 0], "seen")):
            axes.set_axis_on()
            axes.set(xticks=[], yticks=[])
            axes.set_ylabel(text, rotation=0, ha="right", va="center")
            for spine in axes.spines.values():
                spine.set_visible(False)
    return figure
