"""Which class is taken for which."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import field
from torch import Tensor

from trainkit import Batch, Run
from trainkit.errors import RecipeError
from trainkit.inference import count_confusion
from trainkit.plugin import hookimpl, plugin
from trainkit.run import best_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ConfusionMatrix", "draw"]

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
        epoch = run.history[-1]["epoch"]
        if best_of(run).get(run.metric_key(self.best), {}).get("epoch") == epoch:
            n = len(run.data.classes)
            self._kept, self._epoch = self._counts.view(n, n).tolist(), epoch
        self._counts = None

    @hookimpl
    def fit_end(self, run: Run) -> None:
        """Write the counts and the picture."""
        if not self._kept or run.dir is None:
            return
        import matplotlib.style

        told = {"split": run.selection_split, "epoch": self._epoch, "classes": list(run.data.classes)}
        run.dir.write("figures/confusion.json", json.dumps({**told, "confusion_matrix": self._kept}) + "\n")
        title = f"{run.selection_split.capitalize()} images, epoch {self._epoch:g}: {run.recipe.name}"
        with matplotlib.style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": "trainkit"}]):
            figure = draw(self._kept, run.data.classes, title)
            for kind, metadata in (("png", None), ("svg", {"Date": None})):
                data = io.BytesIO()
                figure.savefig(data, format=kind, metadata=metadata)
                run.dir.write(f"figures/confusion.{kind}", data.getvalue())

    def state_dict(self) -> dict[str, Any]:
        """Return what is drawn at the end."""
        return {"counts": self._kept, "epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._kept, self._epoch = [list(row) for row in state["counts"]], state["epoch"]


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
