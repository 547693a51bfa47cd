"""A picture of what groups of runs reach against what they cost: parameters, time, or another number."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from trainkit.cli.output import error, picture_format, printable, terminal
from trainkit.errors import UsageError, did_you_mean
from trainkit.rundir import atomic_write, is_number
from trainkit_studies import Group, Summary, groups_in, summarize  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCATTER", "Point", "draw", "points_of"]

COLOUR = "#0072B2"


@attrs.frozen
class Point:
    """A group of runs.

    Args:
        name: of the group.
        x: over its seeds.
        y: over its seeds.
    """

    name: str
    x: Summary
    y: Summary


def values_of(group: Group, name: str) -> list[float]:
    """Return a number of each completed run: ``parameters``, ``seconds`` (of training) or a metric's last value."""
    if name == "parameters":
        found = [result.get("parameters") for result in group.results.values()]
        return [float(value) for value in found if is_number(value)]
    return list((group.seconds() if name == "seconds" else group.values(name)).values())


def points_of(groups: Sequence[Group], x: str, y: str) -> list[Point]:
    """Return a point for each group whose runs report both numbers.

    Args:
        groups: of runs that differ by their seed alone.
        x: see :func:`values_of`.
        y: see :func:`values_of`.

    Raises:
        UsageError: no group reports both.
    """
    points = [
        Point(group.name, summarize(across), summarize(up))
        for group in groups
        if (across := values_of(group, x)) and (up := values_of(group, y))
    ]
    if not points:
        if not any(group.results for group in groups):
            raise UsageError(f"{groups[0].folder}: no run of it is completed")
        known = list(dict.fromkeys(["parameters", "seconds", *(name for group in groups for name in group.metrics())]))
        for option, name in (("--x", x), ("--y", y)):
            if name not in known:
                hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
                raise UsageError(f"{option}: no run reports {name!r}{hint}")
        raise UsageError(f"no group has completed runs that report {x} and {y}")
    return points


def draw(points: Sequence[Point], x: str, y: str) -> Figure:
    """Draw a point for each group, with the interval of its mean where it has several seeds.

    Args:
        points: what is drawn.
        x: what the axis to the right is called.
        y: what the axis up is called.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for point in points:
        low, high = point.y.interval or (point.y.mean, point.y.mean)
        axes.plot([point.x.mean, point.x.mean], [low, high], color=COLOUR, linewidth=2, solid_capstyle="butt")
        axes.plot(point.x.mean, point.y.mean, "o", color=COLOUR, markersize=7)
        seeds = f" (n = {point.y.n})" if point.y.n > 1 else ""
        axes.annotate(
            f"{point.name}{seeds}",
            (point.x.mean, point.y.mean),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            parse_math=False,
        )
    axes.margins(x=0.2, y=0.15)
    several = any(point.y.interval for point in points)
    axes.set_xlabel(x)
    axes.set_ylabel(f"{y} (mean, 95 % interval)" if several else y)
    axes.xaxis.set_major_formatter("{x:,g}" if x != "parameters" else "{x:,.0f}")
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


class _Scatter:
    """``trainkit runs scatter``."""

    HELP = "Draw what the groups of a study reach against their parameters, time, or another number."
    EXAMPLES = """\
examples:
  trainkit runs scatter runs/sharing -o sharing.png
  trainkit runs scatter runs/sharing --x seconds --y test_loss -o loss.svg
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the action's arguments."""
        parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="of a group, a study or an ablation")
        parser.add_argument("--x", default="parameters", metavar="NAME", help="default: parameters")
        parser.add_argument("--y", default="test_accuracy", metavar="NAME", help="default: test_accuracy")
        parser.add_argument(
            "-o", "--output", metavar="FILE", type=Path, default=Path("scatter.png"), help="a .png or .svg file"
        )

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Read the groups and write the picture; name those that are left out."""
        kind = picture_format(args.output)
        groups: dict[Path, Group] = {}
        for folder in args.folders:
            found = groups_in(folder)
            if not found:
                raise UsageError(f"{folder}: neither a group of runs nor a study: no group.json and no study.json")
            groups |= {group.folder.resolve(): group for group in found}
        points = points_of(list(groups.values()), args.x, args.y)
        drawn = {point.name for point in points}
        for group in groups.values():
            if group.name not in drawn:
                error(f"{group.folder}: left out: no completed run of it reports {args.x} and {args.y}")
        import matplotlib.style

        data = io.BytesIO()
        with matplotlib.style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": "trainkit"}]):
            metadata = {"Date": None} if kind == "svg" else None
            draw(points, args.x, args.y).savefig(data, format=kind, metadata=metadata)
        try:
            atomic_write(args.output, data.getvalue())
        except OSError as problem:
            raise UsageError(f"{args.output}: cannot be written: {problem.strerror}") from problem
        terminal().print(printable(args.output), markup=False, highlight=False, soft_wrap=True)
        return 0


SCATTER = _Scatter
