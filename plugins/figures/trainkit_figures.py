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
    from matplotlib.figure import Figure

__all__ = ["Figures"]

#: Rows with an epoch each, as in ``run.history``.
Rows = list[dict[str, float]]

# told apart by the colour-blind, too (Okabe and Ito): of the run, of what was published
COLOURS = {"train": ("#0072B2", "#56B4E9"), "test": ("#D55E00", "#E69F00")}
STYLE: dict[str, Any] = {
    "font.size": 15,
    "axes.titlesize": 19,
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
        """Draw, if it is time to; the last epoch is drawn at the end."""
        done = run.epoch + 1
        if self.every and done % self.every == 0 and done < run.epochs:
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
            for metric, title in (("loss", "Train vs Test Loss"), ("accuracy", "Model Accuracy")):
                if not any(_points(run.history, split, metric) for split in COLOURS):
                    continue
                figure = self._figure(run, metric, title)
                for kind, metadata in (("png", {}), ("svg", {"Date": None})):
                    data = io.BytesIO()
                    figure.savefig(data, format=kind, metadata=metadata)
                    run.dir.write(f"figures/{metric}.{kind}", data.getvalue())

    def _figure(self, run: Run, metric: str, title: str) -> Figure:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        published = [row for row in self._published if row["epoch"] <= run.epochs]
        for split, (colour, _) in COLOURS.items():
            if points := _points(run.history, split, metric):
                marker = "o" if len(points) <= 30 else None
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=split)
        if points := _points(run.history, "test", metric):
            best = _best(points, metric)
            label = f"best test {best[1]:.4g} (epoch {best[0]:g})"
            axes.plot(
                *best, "*", color=COLOURS["test"][0], markersize=18, markeredgecolor="white", zorder=4, label=label
            )
        for split, (_, colour) in COLOURS.items():
            if points := _points(published, split, metric):
                label = f"published {split}" + (f", best {_best(points, metric)[1]:.4g}" if split == "test" else "")
                axes.plot(*zip(*points, strict=True), "--", color=colour, linewidth=1.5, zorder=3, label=label)
        if (expected := run.recipe.expect.get(f"test_{metric}")) is not None:
            axes.axhline(expected, color="#555555", linewidth=1, label=f"expected {expected:g}")
        axes.set_title(f"{title}: {run.recipe.name}", loc="left", pad=14)
        axes.set_xlabel("epoch")
        axes.set_ylabel("accuracy (%)" if metric == "accuracy" else metric)
        last = max(row["epoch"] for row in [*run.history, *published])
        margin = max(0.5, 0.02 * last)
        axes.set_xlim(1 - margin, last + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(loc="best")
        return figure


def _points(rows: Rows, split: str, metric: str) -> list[tuple[float, float]]:
    points = [(row["epoch"], row.get(f"{split}_{metric}", math.nan)) for row in rows]
    return [point for point in points if math.isfinite(point[1])]


def _best(points: list[tuple[float, float]], metric: str) -> tuple[float, float]:
    return (min if metric == "loss" else max)(points, key=lambda point: point[1])


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
        raise RecipeError(
            f"published: {path}: cannot be read: {reason}; give a CSV file, or drop the option"
        ) from error
    return rows
