"""Curves of a run."""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field
from attrs.validators import ge

from trainkit import Run
from trainkit.cli.output import picture_format, printable, terminal
from trainkit.errors import RecipeError, TrainkitError, UsageError
from trainkit.plugin import hookimpl, plugin, recipe_file
from trainkit.rundir import RunDir, atomic_write, read_regular

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CURVES", "Figures", "overlay"]

Rows = list[dict[str, float]]  # as in run.history
Points = list[tuple[float, float]]  # epochs and values
MAX_BYTES = 1 << 24  # of a published curve: a hundred bytes for each of 100,000 epochs
COLUMNS = ("epoch", "train_loss", "test_loss", "train_accuracy", "test_accuracy")
# The run's curve and the published one of each split; the colour-blind can tell them apart (Okabe and Ito).
COLOURS = {"train": ("#0072B2", "#56B4E9"), "test": ("#D55E00", "#E69F00"), "validation": ("#009E73", "#009E73")}
# More than colour tells the run's curves apart: width and marker.
LINES: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 1.4, "marker": "s", "markerfacecolor": "none"},
    "test": {"linewidth": 2.4, "marker": "o"},
    "validation": {"linewidth": 2.4, "marker": "D"},
}
MARKERS = 25  # on a curve; among more, they would hide the line
# Colours of several runs (Okabe and Ito); from the ninth run on they come again, dashed.
SEVERAL = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5A2B", "#666666")
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
DARK: dict[str, Any] = {
    "figure.facecolor": "#12151a",
    "axes.facecolor": "#12151a",
    "savefig.facecolor": "#12151a",
    "legend.facecolor": "#12151a",
    "grid.color": "#30353d",
    "text.color": "#e6e6e6",
    "axes.labelcolor": "#e6e6e6",
    "axes.edgecolor": "#8b929c",
    "xtick.color": "#c8ccd2",
    "ytick.color": "#c8ccd2",
}


@plugin
class Figures:
    """Draw loss, accuracy and learning rate over the epochs, as PNG and SVG, with a published curve laid over.

    Args:
        published: a CSV file whose columns are ``epoch`` and any of ``train_loss``, ``test_loss``, ``train_accuracy``
            and ``test_accuracy``; relative to the recipe's own file.
        every: draw after every so many epochs, and at the end of the run; 0 for the end alone.
        dark: draw each picture a second time, on a dark background: ``accuracy.dark.png``.
    """

    observer: ClassVar = True

    published: Path | None = recipe_file(default=None)
    every: int = field(default=10, validator=ge(0))
    dark: bool = False
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

        for suffix, style in [("", STYLE), *([(".dark", {**STYLE, **DARK})] if self.dark else [])]:
            with matplotlib.style.context(["default", style]):
                for metric in TITLES:
                    if any(_points(run.history, split, metric) for split in COLOURS):
                        _write(run, metric + suffix, self._figure(run, metric))
                _write(run, f"learning_rate{suffix}", _rates(run))

    def _figure(self, run: Run, metric: str) -> Figure:
        """Draw one metric over the epochs."""
        from matplotlib.figure import Figure

        published = [row for row in self._published if row["epoch"] <= run.epochs]
        figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        for split in COLOURS:
            _plot_own(axes, run.history, split, metric)
            _plot_published(axes, published, self._published, split, metric)
        expected = run.recipe.expect.get(f"test_{metric}")
        if expected is not None:
            axes.axhline(expected, color="#808080", linewidth=1, linestyle="-.", label=f"expected {expected:g}")

        title, unit = TITLES[metric]
        _label_epochs(axes, max(row["epoch"] for row in [*run.history, *published]))
        axes.set_ylabel(unit)
        title = title.format(split=run.selection_split.capitalize())
        axes.set_title(f"{title}: {run.recipe.name}", loc="left", pad=14)
        axes.legend(loc="best")
        return figure


def _rates(run: Run) -> Figure:
    """Draw the learning rate of each epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    points = [(row["epoch"], row["lr"]) for row in run.history]
    _plot(axes, points, "-", color=COLOURS["train"][0], marker="o")
    _label_epochs(axes, points[-1][0])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate")
    axes.set_title(f"Learning Rate: {run.recipe.name}", loc="left", pad=14)
    return figure


def _label_epochs(axes: Axes, last: float) -> None:
    """Set the range of the epochs and their ticks, one of them at the last epoch."""
    from matplotlib.ticker import MaxNLocator

    margin = max(0.5, 0.02 * last)
    axes.set(xlim=(1 - margin, last + margin), xlabel="epoch")
    ticks = [tick for tick in MaxNLocator(integer=True, min_n_ticks=1).tick_values(1, last) if 1 <= tick < last]
    apart = [tick for tick in ticks if last - tick > 0.04 * last]  # else two labels would touch
    axes.set_xticks(sorted({1.0, *apart, last}) if last < 10 else sorted({*apart, last}))
    axes.xaxis.set_major_formatter("{x:g}")


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
    _plot(axes, points, "-", color=colour, label=split, **LINES[split])
    if split != "train":
        epoch, value = _best(points, metric)
        label = f"best {split} {value:#.4g} (epoch {epoch:g})"
        axes.scatter(epoch, value, 320, marker="*", color=colour, edgecolor="white", zorder=4, label=label)


def _plot_published(axes: Axes, published: Rows, whole: Rows, split: str, metric: str) -> None:
    """Plot the published curve, dashed, with the best value of the whole test curve, shown or not, in its label."""
    points = _points(published, split, metric)
    if not points:
        return
    label = f"published {split}"
    if split == "test":
        epoch, value = _best(_points(whole, split, metric), metric)
        label += f", best {value:#.4g} (epoch {epoch:g})"
    _, colour = COLOURS[split]
    _plot(axes, points, "--", color=colour, linewidth=1.5, zorder=3, label=label)


def _plot(axes: Axes, points: Points, line: str, **style: Any) -> None:
    epochs, values = zip(*points, strict=True)
    axes.plot(epochs, values, line, markersize=5, markevery=max(1, len(points) // MARKERS), **style)


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


def overlay(histories: Mapping[str, Rows], metric: str, best: Mapping[str, tuple[float, float]]) -> Figure:
    """Draw one metric of several runs over each other.

    Args:
        histories: the epochs of each run, by the name that the legend gives it.
        metric: such as ``test_accuracy`` or ``lr``.
        best: epoch and value of the best point, of runs whose metric says what is better.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    last = 1.0
    for n, (name, rows) in enumerate(histories.items()):
        points = [(row["epoch"], row[metric]) for row in rows if math.isfinite(row.get(metric, math.nan))]
        if not points:
            continue
        label = f"{name}: last {points[-1][1]:#.4g}"
        if name in best:
            epoch, value = best[name]
            label += f", best {value:#.4g} (epoch {epoch:g})"
        line = "--" if n // len(SEVERAL) % 2 else "-"
        _plot(
            axes, points, line, color=SEVERAL[n % len(SEVERAL)], marker="osD^v"[n % 5], label=label.replace("$", r"\$")
        )
        last = max(last, points[-1][0])
    _label_epochs(axes, last)
    axes.set_ylabel(metric)
    axes.set_title(f"{metric} of {len(histories)} runs", loc="left", pad=14)
    axes.legend(loc="best", fontsize=12)
    return figure


class _Curves:
    """``trainkit runs curves``."""

    HELP = "Draw the curves of several runs over each other."
    EXAMPLES = """\
examples:
  trainkit runs curves runs/basic_se/*
  trainkit runs curves runs/a/20260101-120000-0 runs/b/20260101-130000-0 --metric test_loss -o loss.svg
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the action's arguments."""
        parser.add_argument("folders", metavar="RUN_DIR", nargs="+", type=Path, help="the directory of a run")
        parser.add_argument("--metric", metavar="NAME", default="test_accuracy", help="default: test_accuracy")
        parser.add_argument("--dark", action="store_true", help="on a dark background")
        parser.add_argument(
            "-o", "--output", metavar="FILE", type=Path, default=Path("curves.png"), help="a .png or .svg file"
        )

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Read the runs' tables of epochs and write the picture."""
        kind = picture_format(args.output)
        histories = {str(folder): _epochs(folder) for folder in args.folders}
        known = list(dict.fromkeys(name for rows in histories.values() for row in rows for name in row))
        if args.metric not in known:
            raise UsageError(f"--metric: no run has {args.metric!r}; there are {', '.join(known[:20])}")
        best = {str(folder): found for folder in args.folders if (found := _recorded_best(folder, args.metric))}
        import matplotlib.style

        data = io.BytesIO()
        with matplotlib.style.context(["default", {**STYLE, **(DARK if args.dark else {})}]):
            metadata = {"Date": None} if kind == "svg" else None
            overlay(histories, args.metric, best).savefig(data, format=kind, metadata=metadata)
        atomic_write(args.output, data.getvalue())
        terminal().print(printable(args.output), markup=False, highlight=False, soft_wrap=True)
        return 0


def _recorded_best(folder: Path, metric: str) -> tuple[float, float] | None:
    """Return epoch and value of the best point that a run's result names; None where it names none."""
    try:
        found = RunDir(folder).read_json("result.json")["best"][metric]
        return float(found["epoch"]), float(found["value"])
    except (TrainkitError, KeyError, TypeError, ValueError):
        return None


def _epochs(folder: Path) -> Rows:
    """Return the rows of a run's table of epochs, without empty cells."""
    path = folder / "metrics.csv"
    try:
        text = RunDir(folder).read_log("metrics.csv").decode()
        rows = csv.DictReader(io.StringIO(text, newline=""))
        found = [{name: float(cell) for name, cell in row.items() if cell} for row in rows]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; the plugin metric_log writes it") from error
    except (ValueError, TypeError, csv.Error) as error:
        raise UsageError(f"{path}: no table of numbers: {error}") from error
    if not found or not all("epoch" in row for row in found):
        raise UsageError(f"{path}: no rows with a column `epoch`")
    return found


CURVES = _Curves
