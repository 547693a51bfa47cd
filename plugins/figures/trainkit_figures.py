"""Curves of a run."""

from __future__ import annotations

import csv
import io
import math
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field
from attrs.validators import ge

from trainkit import Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Figures"]

Rows = list[dict[str, float]]  # as in run.history
Points = list[tuple[float, float]]  # epochs and values
COLUMNS = ("epoch", "train_loss", "test_loss", "train_accuracy", "test_accuracy")
# of the run and of what was published; told apart by the colour-blind, too (Okabe and Ito)
COLOURS = {"train": ("#0072B2", "#56B4E9"), "test": ("#D55E00", "#E69F00")}
TITLES = {"loss": ("Train vs Test Loss", "loss"), "accuracy": ("Model Accuracy", "accuracy (%)")}  # and of the y axis
STYLE: dict[str, Any] = {
    "font.size": 15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.edgecolor": "none",
    "figure.constrained_layout.w_pad": 0.15,
    "figure.constrained_layout.h_pad": 0.15,
    "lines.linewidth": 2,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "trainkit",  # the same numbers give the same file
}


@plugin
class Figures:
    """Draw loss and accuracy over the epochs, as PNG and SVG, with a published curve laid over.

    Args:
        published: a CSV file whose columns are ``epoch`` and any of ``train_loss``, ``test_loss``, ``train_accuracy``
            and ``test_accuracy``; relative to the current directory.
        every: draw after every so many epochs, and at the end of the run; 0 for the end alone.
    """

    published: Path | None = None
    every: int = field(default=10, validator=ge(0))
    _published: Rows = field(init=False, factory=list)

    @hookimpl
    def fit_start(self) -> None:
        """Read the published curve, before the first step; only training needs it, so building a run does not.

        Raises:
            RecipeError: the file is missing or not such a table.
        """
        if self.published is not None:
            self._published = _read(self.published)

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        """Draw, if it is time to; the last epoch is drawn at the end."""
        if self.every and (run.epoch + 1) % self.every == 0 and run.epoch + 1 < run.epochs:
            self._draw(run)

    @hookimpl
    def fit_end(self, run: Run) -> None:
        """Draw what there is, after a stop or a failure too."""
        if run.history:
            self._draw(run)

    def _draw(self, run: Run) -> None:
        # here, because it takes as long as a short epoch; no pyplot, whose figures are global
        import matplotlib.style

        assert run.dir is not None
        with matplotlib.style.context(["default", STYLE]):
            for metric in TITLES:
                if not any(_points(run.history, split, metric) for split in COLOURS):
                    continue
                figure = self._figure(run, metric)
                for kind, metadata in (("png", None), ("svg", {"Date": None})):
                    data = io.BytesIO()
                    figure.savefig(data, format=kind, metadata=metadata)
                    run.dir.write(f"figures/{metric}.{kind}", data.getvalue())

    def _figure(self, run: Run, metric: str) -> Figure:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        title, unit = TITLES[metric]
        figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        published = [row for row in self._published if row["epoch"] <= run.epochs]
        best = min if metric == "loss" else max
        for split, (colour, light) in COLOURS.items():
            if points := _points(run.history, split, metric):
                _plot(axes, points, "-", color=colour, label=split)
                if split == "test":
                    epoch, value = best(points, key=itemgetter(1))
                    label = f"best test {value:#.4g} (epoch {epoch:g})"
                    axes.scatter(epoch, value, 320, marker="*", color=colour, edgecolor="white", zorder=4, label=label)
            if points := _points(published, split, metric):
                label = f"published {split}" + (
                    f", best {best(points, key=itemgetter(1))[1]:#.4g}" if split == "test" else ""
                )
                _plot(axes, points, "--", color=light, linewidth=1.5, zorder=3, label=label)
        if (expected := run.recipe.expect.get(f"test_{metric}")) is not None:
            axes.axhline(expected, color="#555555", linewidth=1, label=f"expected {expected:g}")
        last = max(row["epoch"] for row in [*run.history, *published])
        margin = max(0.5, 0.02 * last)
        axes.set(xlim=(1 - margin, last + margin), xlabel="epoch", ylabel=unit)
        axes.set_title(f"{title}: {run.recipe.name}", loc="left", pad=14)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(loc="best")
        return figure


def _plot(axes: Axes, points: Points, line: str, **style: Any) -> None:
    axes.plot(*zip(*points, strict=True), line, marker="o" if len(points) <= 30 else None, markersize=5, **style)


def _points(rows: Rows, split: str, metric: str) -> Points:
    points = [(row["epoch"], row.get(f"{split}_{metric}", math.nan)) for row in rows]
    return [point for point in points if math.isfinite(point[1])]


def _read(path: Path) -> Rows:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            names = [name for name in table.fieldnames or () if name in COLUMNS]
            rows = [{name: float(row[name]) for name in names} for row in table]
    except OSError as error:
        raise RecipeError(f"published: {path}: cannot be read: {error.strerror}; or drop the option") from error
    except (TypeError, ValueError, csv.Error) as error:
        raise RecipeError(f"published: {path}, line {table.line_num}: not a row of numbers: {error}") from error
    if "epoch" not in names or len(names) == 1 or not rows:
        raise RecipeError(f"published: {path}: expected rows under a line that names some of {', '.join(COLUMNS)}")
    return rows
