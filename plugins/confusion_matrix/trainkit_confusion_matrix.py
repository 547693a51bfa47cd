"""Which class is taken for which."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import field
from torch import Tensor

from trainkit import Batch, Run, numerics
from trainkit.cli.output import add_allow_local, error, picture_format, print_json, printable, terminal
from trainkit.errors import RecipeError, UsageError
from trainkit.inference import count_confusion
from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import load_recipe
from trainkit.run import is_best_epoch
from trainkit.rundir import RunDir, atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CONFUSION", "ConfusionMatrix", "draw"]

MANY = 30  # classes whose names and counts still fit into a picture


@plugin
class ConfusionMatrix:
    """Count which class is taken for which, and draw it: ``figures/confusion.png``, ``.svg`` and ``.json``.

    Counted are the images of the split that is evaluated after epochs, in the epoch where the metric was best. The
    counts stay on the device until the evaluation ends. An image whose output is not finite is counted for no class.

    Args:
        best: the metric whose best value so far makes an epoch the one that is drawn; named as for `checkpoint`.
    """

    observer: ClassVar = True
    every_process: ClassVar = True  # each counts its share

    best: str = "accuracy"
    _counts: Tensor | None = field(init=False, default=None)  # of the current evaluation, int64 [classes * classes]
    _kept: list[list[int]] = field(init=False, factory=list)
    _epoch: float = field(init=False, default=0.0)

    @hookimpl
    def built(self, run: Run) -> None:
        """Look at the targets of the data.

        Raises:
            RecipeError: they are no classes.
        """
        if not run.data.has_class_targets:
            raise RecipeError("a confusion matrix is one of classes, and the data's targets are none; drop the plugin")

    @hookimpl
    def eval_start(self, run: Run) -> None:
        """Begin to count, if the split is the one that is evaluated after epochs."""
        chosen = run.split == run.selection_split
        n = len(run.data.classes)
        self._counts = torch.zeros(n * n, dtype=torch.int64, device=run.device) if chosen else None

    @hookimpl
    def forward_end(self, run: Run, batch: Batch, output: Tensor) -> None:
        """Count a batch; nothing is read from the device."""
        if self._counts is not None and run.split == run.selection_split:
            count_confusion(self._counts, batch.targets, output)

    @hookimpl
    def safe_point(self, run: Run) -> None:
        """Keep the counts of an epoch that is the best so far; the epoch's record is on the host, so nothing waits."""
        if self._counts is None or not run.epoch_ended:
            return
        if is_best_epoch(run, self.best):
            n = len(run.data.classes)
            counts = run.processes.all_reduce(self._counts.clone())
            self._kept, self._epoch = counts.view(n, n).tolist(), run.history[-1]["epoch"]
        self._counts = None

    @hookimpl
    def fit_end(self, run: Run) -> None:
        """Write the counts and the picture."""
        if not self._kept or run.dir is None or run.rank > 0:
            return
        told = {"split": run.selection_split, "epoch": self._epoch, "classes": list(run.data.classes)}
        run.dir.write("figures/confusion.json", json.dumps({**told, "confusion_matrix": self._kept}) + "\n")
        title = f"{run.selection_split.capitalize()} images, epoch {self._epoch:g}: {run.recipe.name}"
        for kind in ("png", "svg"):
            run.dir.write(f"figures/confusion.{kind}", picture(self._kept, run.data.classes, title, kind))

    def state_dict(self) -> dict[str, Any]:
        """Return what is drawn at the end."""
        return {"counts": self._kept, "epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._kept, self._epoch = [list(row) for row in state["counts"]], state["epoch"]


def picture(matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str, kind: str) -> bytes:
    """Return a drawn confusion matrix as a file.

    Args:
        matrix: see :func:`draw`.
        classes: see :func:`draw`.
        title: see :func:`draw`.
        kind: ``png`` or ``svg``.
    """
    import matplotlib.style

    data = io.BytesIO()
    with matplotlib.style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": "trainkit"}]):
        draw(matrix, classes, title).savefig(data, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return data.getvalue()


def draw(matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix: the share of each true class, a row, that is taken for each class.

    Args:
        matrix: counts; rows are true classes.
        classes: their names. Above thirty they are numbered, and cells have no counts.
        title: stands above the picture.
    """
    from matplotlib.figure import Figure

    n = len(classes)
    few = n <= MANY
    shares = [[count / (sum(row) or 1) for count in row] for row in matrix]
    side = min(max(6.0, 0.62 * n + 2.5), 14.0) if few else 11.0
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(title, loc="left", pad=12)
    axes.set(xlabel="taken for", ylabel="true class")
    if few:
        axes.set_xticks(range(n), classes, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n), classes)
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                if count:
                    colour = "white" if shares[i][j] > 0.5 else "#222222"
                    axes.text(j, i, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    bar.outline.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


class _Confusion:
    """``trainkit runs confusion``."""

    HELP = "Draw which class a run's network takes for which, on a split of its data or on other images."
    EXAMPLES = """\
examples:
  trainkit runs confusion runs/photos/20260101-120000-0
  trainkit runs confusion runs/photos/20260101-120000-0 --images new -o new.svg
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the action's arguments."""
        parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a run")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of its recipe")
        parser.add_argument("--checkpoint", default="best", choices=["best", "last"], help="which (default: best)")
        parser.add_argument("--split", metavar="NAME", default="test", help="which images (default: test)")
        parser.add_argument("--images", metavar="DIR", type=Path, help="other images, in one folder a class")
        parser.add_argument(
            "-o", "--output", metavar="FILE", type=Path, default=Path("confusion.png"), help="a .png or .svg file"
        )
        parser.add_argument("--allow-changes", action="store_true", help="although classes or code have changed")
        parser.add_argument("--json", action="store_true", help="print the counts as JSON")
        add_allow_local(parser)

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Count, and write the picture; 1 where images could not be read."""
        kind = picture_format(args.output)
        numerics.prepare(load_recipe(RunDir(args.run_dir).recipe_path(), args.overrides))
        from trainkit.inference import confusion_matrix, count_images, load_model
        from trainkit.session import open_checkpoint

        console = terminal(stderr=args.json)
        bad: list[str] = []
        if args.images is not None:
            if args.overrides:
                raise UsageError("--images: takes no overrides: the run's data set is not opened")
            model = load_model(args.run_dir, args.checkpoint, console=console)
            matrix, classes, epoch = count_images(model, args.images, bad), model.classes, model.epoch
            name, images = model.recipe, args.images.name
        else:
            run = open_checkpoint(
                args.run_dir, args.checkpoint, args.overrides, allow_changes=args.allow_changes, console=console
            )
            if args.split not in run.data.splits or not run.data.has_class_targets:
                raise UsageError(f"--split: {args.split!r}: not one of {', '.join(run.data.splits)}, of classes")
            matrix, classes, epoch = confusion_matrix(run, args.split), run.data.classes, run.epoch
            name, images = run.recipe.name, args.split
        counts: list[list[int]] = matrix.tolist()
        for reason in bad:
            error(reason)
        title = f"{images[:1].upper()}{images[1:]} images, epoch {epoch}: {name}"
        atomic_write(args.output, picture(counts, classes, title, kind))
        if args.json:
            print_json({"epoch": epoch, "classes": list(classes), "confusion_matrix": counts, "not_counted": len(bad)})
        console.print(printable(args.output), markup=False, highlight=False, soft_wrap=True)
        return int(bool(bad))


CONFUSION = _Confusion
