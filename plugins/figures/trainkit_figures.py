"""Curves of a run."""

from __future__ import annotations

import csv
import io
import math
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

#: Rows with an epoch each, as in ``run.history``.
Rows = list[dict[str, float]]

COLOURS = {"train": "#0072B2", "test": "#D55E00"}  # told apart by the colour-blind, too (Okabe and Ito)
STYLE: dict[str, Any] = {
    "font.size": 15,
    "axes.titlesize": 19,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "trainkit",  # the same numbers give the same file
    "text.parse_math": False,
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
        """Draw, if it is time to."""
        if self.every and (run.epoch + 1) % self.every == 0:
            self._draw(run)

    @hookimpl
    def fit_end(self, run: Run) -> None:
        """Draw what there is, after a stop or a failure too."""
        if run.dir is not None and run.history:
            self._draw(run)

    def _draw(self, run: Run) -> None:
        # here, because it takes as long as a short epoch; no pyplot, whose figures are global
        import matplotlib.style

        assert run.dir is not None
        with matplotlib.style.context(["default", STYLE]):
            for metric, title, unit in (("loss", "Train vs Test Loss", ""), ("accuracy", "Model Accuracy", " (%)")):
                if not any(f"{split}_{metric}" in row for row in run.history for split in COLOURS):
                    continue
                figure = self._figure(run, metric, title, unit)
                for kind, metadata in (("png", {}), ("svg", {"Date": None})):
                    data = io.BytesIO()
                    figure.savefig(data, format=kind, metadata=metadata)
                    run.dir.write(f"figures/{metric}.{kind}", data.getvalue())

    def _figure(self, run: Run, metric: str, title: str, unit: str) -> Figure:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        published = [row for row in self._published if row["epoch"] <= run.epochs]
        for split, colour in COLOURS.items():
            _curve(axes, published, split, metric, colour, published=True)
            _curve(axes, run.history, split, metric, colour)
        if (expected := run.recipe.expect.get(f"test_{metric}")) is not None:
            axes.axhline(expected, color="#555555", linewidth=1, label=f"expected test {expected:g}")
        axes.set_title(f"{title}: {run.recipe.name}", loc="left", pad=14)
        axes.set_xlabel("epoch")
        axes.set_ylabel(metric + unit)
        last = max(row["epoch"] for row in [*run.history, *published])
        axes.set_xlim(1 - 0.02 * last, last * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper right" if metric == "loss" else "lower right")  # where such curves leave room
        return figure


def _curve(axes: Axes, rows: Rows, split: str, metric: str, colour: str, *, published: bool = False) -> None:
    key = f"{split}_{metric}"
    points = [(row["epoch"], row[key]) for row in rows if key in row]
    finite = [point for point in points if math.isfinite(point[1])]
    if not finite:
        return
    choose = min if metric == "loss" else max
    epoch, best = choose(finite, key=lambda point: point[1])
    label = f"{'published ' if published else ''}{split}, best {best:.4g} at epoch {epoch:g}"
    if published:
        axes.plot(*zip(*points, strict=True), color=colour, label=label, linestyle="--", linewidth=1.3, alpha=0.6)
        return
    few = len(points) <= 30
    axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o" if few else None, markersize=5)
    if split == "test":
        axes.plot(epoch, best, marker="*", color=colour, markersize=17, markeredgecolor="white", zorder=3)


def _read(path: Path) -> Rows:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file, strict=True)
            columns = list(table.fieldnames or ())
            known = [f"{split}_{metric}" for split in COLOURS for metric in ("loss", "accuracy")]
            wanted = [name for name in columns if name in known]
            if "epoch" not in columns or not wanted:
                raise RecipeError(
                    f"published: {path}: the first line must name the column epoch and at least one of "
                    f"{', '.join(known)}; it reads {','.join(columns)!r}"
                )
            rows = []
            for row in table:
                try:
                    rows.append({name: float(row[name]) for name in ("epoch", *wanted)})
                except (TypeError, ValueError) as error:
                    raise RecipeError(f"published: {path}, line {table.line_num}: not a row of numbers") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"published: {path}: cannot be read: {reason}; give a CSV file, or drop the option") from error
    return rows
