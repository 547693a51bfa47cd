"""Curves of a run."""

from __future__ import annotations

import csv
import io
import math
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field
from attrs.validators import ge

from trainkit import Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin, recipe_file
from trainkit.rundir import read_regular

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Figures"]

Rows = list[dict[str, float]]  # as in run.history
Points = list[tuple[float, float]]  # epochs and values
MAX_BYTES = 1 << 24  # of a published curve: a hundred bytes for each of 100,000 epochs
COLUMNS = ("epoch", "train_loss", "test_loss", "train_accuracy", "test_accuracy")
# The run's curve and the published one of each split; the colour-blind can tell them apart (Okabe and Ito).
COLOURS = {"train": ("#0072B2", "#56B4E9"), "test": ("#D55E00", "#E69F00"), "validation": ("#009E73", "#009E73")}
# The title of each metric's figure, and the label of its y axis.
TITLES = {"loss": ("Train vs {split} Loss", "loss"), "accuracy": ("Model Accuracy", "accuracy (%)")}
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
    "svg.fonttype": "none",  # write text as text, not as outlines
    "svg.hashsalt": "trainkit",  # name elements by their content, so that the same numbers give the same file
}


@plugin
class Figures:
    """Draw loss and accuracy over the epochs, as PNG and SVG, with a published curve laid over.

    Args:
        published: a CSV file whose columns are ``epoch`` and any of ``train_loss``, ``test_loss``, ``train_accuracy``
            and ``test_accuracy``; relative to the recipe's own file.
        every: draw after every so many epochs, and at the end of the run; 0 for the end alone.
    """

    observer: ClassVar = True

    published: Path | None = recipe_file(default=None)
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
        """Draw after every so many epochs, except after the last one, which `fit_end` draws."""
        if not self.every:
            return
        epochs_done = run.epoch + 1
        if epochs_done % self.every == 0 and epochs_done < run.epochs:
            self._draw(run)

    @hookimpl
    def fit_end(self, run: Run) -> None:
        """Draw all epochs so far, also after a stop or a failure."""
        if run.history:
            self._draw(run)

    def _draw(self, run: Run) -> None:
        """Write the figure of each metric that the run has values of."""
        # Imported here, because it takes as long as a short epoch. pyplot is not used: its figures are global.
        import matplotlib.style

        with matplotlib.style.context(["default", STYLE]):
            for metric in TITLES:
                if any(_points(run.history, split, metric) for split in COLOURS):
                    _write(run, metric, self._figure(run, metric))

    def _figure(self, run: Run, metric: str) -> Figure:
        """Draw one metric over the epochs."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        published = [row for row in self._published if row["epoch"] <= run.epochs]
        figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        for split in COLOURS:
            _plot_own(axes, run.history, split, metric)
            _plot_published(axes, published, split, metric)
        expected = run.recipe.expect.get(f"test_{metric}")
        if expected is not None:
            axes.axhline(expected, color="#555555", linewidth=1, label=f"expected {expected:g}")

        title, unit = TITLES[metric]
        last = max(row["epoch"] for row in [*run.history, *published])
        margin = max(0.5, 0.02 * last)
        axes.set(xlim=(1 - margin, last + margin), xlabel="epoch", ylabel=unit)
        title = title.format(split=run.selection_split.capitalize())
        axes.set_title(f"{title}: {run.recipe.name}", loc="left", pad=14)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(loc="best")
        return figure


def _write(run: Run, metric: str, figure: Figure) -> None:
    """Write a figure into the run directory, as PNG and as SVG."""
    assert run.dir is not None
    for kind, metadata in (("png", None), ("svg", {"Date": None})):  # without the date, which differs each time
        data = io.BytesIO()
        figure.savefig(data, format=kind, metadata=metadata)
        run.dir.write(f"figures/{metric}.{kind}", data.getvalue())


def _plot_own(axes: Axes, history: Rows, split: str, metric: str) -> None:
    """Plot the run's own curve, with a star at the best epoch of the split that is evaluated after epochs."""
    points = _points(history, split, metric)
    if not points:
        return
    colour, _ = COLOURS[split]
    _plot(axes, points, "-", color=colour, label=split)
    if split != "train":
        epoch, value = _best(points, metric)
        label = f"best {split} {value:#.4g} (epoch {epoch:g})"
        axes.scatter(epoch, value, 320, marker="*", color=colour, edgecolor="white", zorder=4, label=label)


def _plot_published(axes: Axes, published: Rows, split: str, metric: str) -> None:
    """Plot the published curve, dashed, with the best value of the test split in its label."""
    points = _points(published, split, metric)
    if not points:
        return
    label = f"published {split}"
    if split == "test":
        _, value = _best(points, metric)
        label += f", best {value:#.4g}"
    _, colour = COLOURS[split]
    _plot(axes, points, "--", color=colour, linewidth=1.5, zorder=3, label=label)


def _plot(axes: Axes, points: Points, line: str, **style: Any) -> None:
    epochs, values = zip(*points, strict=True)
    marker = "o" if len(points) <= 30 else None  # among more points, markers would hide the line
    axes.plot(epochs, values, line, marker=marker, markersize=5, **style)


def _best(points: Points, metric: str) -> tuple[float, float]:
    """Return the epoch and the value of the best point, the first of equals."""
    choose = min if metric == "loss" else max
    return choose(points, key=itemgetter(1))


def _points(rows: Rows, split: str, metric: str) -> Points:
    """Return the points of one curve, without epochs that have no value or one that is not finite."""
    points = []
    for row in rows:
        value = row.get(f"{split}_{metric}", math.nan)
        if math.isfinite(value):
            points.append((row["epoch"], value))
    return points


def _read(path: Path) -> Rows:
    """Read the known columns of a CSV file."""
    try:
        text = read_regular(path, MAX_BYTES).decode()
        table = csv.DictReader(io.StringIO(text, newline=""))
        names = [name for name in table.fieldnames or () if name in COLUMNS]
        rows = [{name: float(row[name]) for name in names} for row in table]
    except UnicodeDecodeError as error:
        raise RecipeError(f"published: {path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise RecipeError(f"published: {path}: cannot be read: {error.strerror}; or drop the option") from error
    except (TypeError, ValueError, csv.Error) as error:
        raise RecipeError(f"published: {path}, line {table.line_num}: not a row of numbers: {error}") from error
    if "epoch" not in names or len(names) == 1 or not rows:
        raise RecipeError(f"published: {path}: expected rows under a line that names some of {', '.join(COLUMNS)}")
    return rows
