"""What the network takes images for."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import attrs
import torch
from attrs import field
from attrs.validators import and_, ge, le
from torch import Tensor

from trainkit import Batch, Run
from trainkit.errors import PluginError, RecipeError
from trainkit.images import displayed
from trainkit.plugin import hookimpl, plugin
from trainkit.run import is_best_epoch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Prediction", "SamplePredictions", "draw"]

ACROSS = 3  # images beside each other: their captions are readable on a phone
MOST = 64  # images of a kind
LONGEST = 18  # characters of a class name in a caption
LEGEND = "class \u2192 what it is taken for, probability of that"


class Prediction(NamedTuple):
    """What one image is taken for.

    Args:
        image: its's place in its split.
        target: the number of its class.
        predicted: the number of the class that it is taken for; -1 where the output is not finite.
        probability: of that class; not a number where the output is not finite.
    """

    image: int
    target: int
    predicted: int
    probability: float


@attrs.define(eq=False)
class _Kept:
    """What is kept of the current evaluation, on the device: of so many images, however many there are.

    Args:
        most: mistakes that are kept.
        chosen: int64 [R], the images that are kept in any case.
    """

    most: int
    chosen: Tensor
    wrong: Tensor = field(init=False)  # int64: how many images are taken for another class
    mistakes: Tensor = field(init=False)  # int64 [<= most, 3]: image, class, class that it is taken for
    sureness: Tensor = field(init=False)  # float32 [<= most], in decreasing order; -1 where there is no mistake
    sample: Tensor = field(init=False)  # int64 [R, 3], as `mistakes`
    probabilities: Tensor = field(init=False)  # float32 [R]; -1 where the image was not met

    def __attrs_post_init__(self) -> None:
        device, n = self.chosen.device, len(self.chosen)
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)
        self.mistakes = torch.zeros(0, 3, dtype=torch.int64, device=device)
        self.sureness = torch.zeros(0, device=device)
        self.sample = torch.zeros(n, 3, dtype=torch.int64, device=device)
        self.probabilities = torch.full((n,), -1.0, device=device)

    def add(self, indices: Tensor, targets: Tensor, output: Tensor) -> None:
        """Look at a batch; nothing is read from the device."""
        finite = output.isfinite().all(1)
        probability, predicted = output.float().softmax(1).max(1)
        rows = torch.stack([indices, targets, torch.where(finite, predicted, -1)], 1)
        wrong = finite & (predicted != targets)
        self.wrong += wrong.sum()
        sureness = torch.cat([self.sureness, torch.where(wrong, probability, -1.0)])
        # Stable: of equally sure mistakes the first image stays, on every device.
        sureness, order = sureness.sort(descending=True, stable=True)
        self.sureness = sureness[: self.most]
        self.mistakes = torch.cat([self.mistakes, rows])[order[: self.most]]
        here = self.chosen[:, None] == indices
        found, place = here.any(1), here.to(torch.int32).argmax(1)
        self.sample = torch.where(found[:, None], rows[place], self.sample)
        self.probabilities = torch.where(found, probability[place], self.probabilities)

    def read(self) -> tuple[int, list[Prediction], list[Prediction]]:
        """Return the number of mistakes, the surest ones, and what the chosen images are taken for."""
        return (
            int(self.wrong),
            _predictions(self.mistakes, self.sureness),
            _predictions(self.sample, self.probabilities),
        )


def _predictions(rows: Tensor, probabilities: Tensor) -> list[Prediction]:
    pairs = zip(rows.tolist(), probabilities.tolist(), strict=True)
    return [Prediction(image, target, given, p) for (image, target, given), p in pairs if not p < 0]


@plugin
class SamplePredictions:
    """Draw what test images are taken for: ``figures/predictions.png`` and ``.json``.

    They are images of the split that is evaluated after epochs, in the epoch where the metric was best: the mistakes
    that the network is surest of, and images that are chosen at random by the run's seed.

    Args:
        mistakes: how many images that are taken for another class, the surest ones; 0 to 64.
        random: how many images at random, 0 to 64; not more than the split has.
        best: the metric whose best value so far makes an epoch the one that is drawn; named as for `checkpoint`.
    """

    observer: ClassVar = True
    every_process: ClassVar = True  # each looks at its share

    mistakes: int = field(default=9, validator=and_(ge(0), le(MOST)))
    random: int = field(default=6, validator=and_(ge(0), le(MOST)))
    best: str = "accuracy"
    _chosen: Tensor | None = field(init=False, default=None)  # int64 [random], on the device
    _current: _Kept | None = field(init=False, default=None)  # of the current evaluation
    _epoch: float = field(init=False, default=0.0)  # what is drawn is of it; 0 before there is a best one
    _wrong: int = field(init=False, default=0)
    _surest: list[Prediction] = field(init=False, factory=list)
    _sample: list[Prediction] = field(init=False, factory=list)

    @hookimpl
    def built(self, run: Run) -> None:
        """Choose the images that are looked at in every epoch.

        Raises:
            RecipeError: the data's targets are no classes.
        """
        if not run.data.has_class_targets:
            raise RecipeError("predictions are drawn of classes, and the data's targets are none; drop the plugin")
        size = len(run.data.splits[run.selection_split])
        chosen = run.rng("sample_predictions").permutation(size)[: self.random]
        self._chosen = torch.from_numpy(chosen).sort().values.to(run.device)

    @hookimpl
    def eval_start(self, run: Run) -> None:
        """Begin anew, if the split is the one that is evaluated after epochs."""
        assert self._chosen is not None
        self._current = _Kept(self.mistakes, self._chosen) if run.split == run.selection_split else None

    @hookimpl
    def forward_end(self, run: Run, batch: Batch, output: Tensor) -> None:
        """Look at a batch.

        Raises:
            PluginError: another plugin made the batch and does not say which images it holds.
        """
        if self._current is None or run.split != run.selection_split:
            return
        if batch.indices is None:
            raise PluginError(
                f"a plugin made a batch of the {run.split} split without `indices`, which tell the images apart; "
                "keep them in transform_batch, or drop sample_predictions"
            )
        self._current.add(batch.indices, batch.targets, output.detach())

    @hookimpl
    def safe_point(self, run: Run) -> None:
        """Keep an epoch that is the best so far; its record is on the host, so nothing waits."""
        if self._current is None or not run.epoch_ended:
            return
        if is_best_epoch(run, self.best):
            found = run.processes.all_gather(self._current.read())
            self._epoch = run.history[-1]["epoch"]
            self._wrong = sum(wrong for wrong, _, _ in found)
            mistakes = [prediction for _, predictions, _ in found for prediction in predictions]
            self._surest = sorted(mistakes, key=lambda p: (-p.probability, p.image))[: self.mistakes]
            self._sample = sorted(prediction for _, _, predictions in found for prediction in predictions)
        self._current = None

    @hookimpl
    def fit_end(self, run: Run, error: BaseException | None) -> None:
        """Write the picture and the table; not after a failure, for the images are on a device that may be lost."""
        if not self._epoch or run.dir is None or run.rank > 0 or error is not None:
            return
        classes = run.data.classes
        told = {
            "split": run.selection_split,
            "epoch": self._epoch,
            "wrong": self._wrong,
            "mistakes": [_told(prediction, classes) for prediction in self._surest],
            "random": [_told(prediction, classes) for prediction in self._sample],
        }
        run.dir.write_json("figures/predictions.json", told)
        images = stored_images(run, {p.image for p in (*self._surest, *self._sample)})
        title = f"{run.selection_split.capitalize()} images, epoch {self._epoch:g}: {run.recipe.name}\n{LEGEND}"
        parts = {
            _heading(len(self._surest), self._wrong): self._surest,
            "Chosen at random": self._sample,
        }
        run.dir.write("figures/predictions.png", picture(title, parts, images, classes))

    def state_dict(self) -> dict[str, Any]:
        """Return what is drawn at the end."""
        return {"epoch": self._epoch, "wrong": self._wrong, "mistakes": self._surest, "sample": self._sample}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._epoch, self._wrong = state["epoch"], state["wrong"]
        self._surest = [Prediction(*row) for row in state["mistakes"]]
        self._sample = [Prediction(*row) for row in state["sample"]]


def _told(prediction: Prediction, classes: Sequence[str]) -> dict[str, Any]:
    """Return a prediction as JSON has it; null where the output was not finite."""
    given = classes[prediction.predicted] if prediction.predicted >= 0 else None
    facts = {"image": prediction.image, "class": classes[prediction.target], "taken_for": given}
    return {**facts, "probability": prediction.probability}


def _heading(shown: int, wrong: int) -> str:
    if not wrong:
        return "No image is taken for another class"
    if shown == wrong:
        return f"All {wrong:,} mistakes, the surest first" if wrong > 1 else "The only mistake"
    return f"Mistakes: the {shown} surest of {wrong:,}"


def stored_images(run: Run, wanted: set[int]) -> dict[int, Tensor]:
    """Return images of the selection split as they are stored, uint8 [C, H, W] on the CPU, by their place in it."""
    found: dict[int, Tensor] = {}
    order = torch.tensor(sorted(wanted), dtype=torch.int64)
    for batch in run.batches[run.selection_split].iterate(order, whole=True):
        assert batch.indices is not None
        found.update(zip(batch.indices.tolist(), batch.images.cpu(), strict=True))
    return found


def picture(
    title: str, parts: Mapping[str, Sequence[Prediction]], images: Mapping[int, Tensor], classes: Sequence[str]
) -> bytes:
    """Return drawn predictions as a PNG file; arguments are those of :func:`draw`."""
    import matplotlib.style

    data = io.BytesIO()
    with matplotlib.style.context("default"):
        draw(title, parts, images, classes).savefig(data, format="png")
    return data.getvalue()


def draw(
    title: str, parts: Mapping[str, Sequence[Prediction]], images: Mapping[int, Tensor], classes: Sequence[str]
) -> Figure:
    """Draw images, each with its class and the class that it is taken for.

    Args:
        title: stands above the picture.
        parts: predictions by the heading that they stand under.
        images: uint8 [C, H, W] by their place in the split.
        classes: their names.
    """
    from matplotlib.figure import Figure

    rows = {heading: max(1, -(-len(predictions) // ACROSS)) for heading, predictions in parts.items()}
    heights = [0.4 + (2.2 * rows[heading] if predictions else 0.0) for heading, predictions in parts.items()]
    figure = Figure(figsize=(1.6 * ACROSS, 0.6 + sum(heights)), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)
    blocks = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for block, (heading, predictions) in zip(blocks, parts.items(), strict=True):
        block.suptitle(heading, x=0.01, ha="left", fontsize=10, fontweight="bold")
        grid = list(block.subplots(rows[heading], ACROSS, squeeze=False).flat) if predictions else []
        for axes in grid:
            axes.set_axis_off()
        for axes, prediction in zip(grid, predictions, strict=False):
            axes.imshow(displayed(images[prediction.image]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            right = prediction.predicted == prediction.target
            colour = "#1a6b34" if right else "#a3261a"
            axes.set_title(_caption(prediction, classes), fontsize=9, color=colour, parse_math=False)
    return figure


def _caption(prediction: Prediction, classes: Sequence[str]) -> str:
    """Return three lines: the class, what the image is taken for, and the probability."""
    name = _short(classes[prediction.target])
    if math.isnan(prediction.probability):
        return f"{name}\noutput is not finite\n"
    right = prediction.predicted == prediction.target
    given = "right" if right else f"\u2192 {_short(classes[prediction.predicted])}"
    return f"{name}\n{given}\n{_percent(prediction.probability)}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _percent(probability: float) -> str:
    """Return a probability in percent; one that is not quite 1 is not said to be."""
    return f"{min(100 * probability, 99.9):.1f} %" if probability < 1 else "100 %"
