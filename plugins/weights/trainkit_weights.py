"""Weights for use elsewhere."""

from typing import Any, ClassVar

from trainkit import Run
from trainkit.inference import pack_safetensors
from trainkit.plugin import hookimpl, plugin
from trainkit.run import is_best_epoch

__all__ = ["Weights"]


@plugin
class Weights:
    """Write the network as it is evaluated to ``weights/best.safetensors``, with classes and preprocessing.

    Under a plugin that evaluates averaged weights these are the averaged ones, where a checkpoint's ``model`` is the
    network that is trained. Tensors that share memory are stored once. ``weights/last.safetensors`` is written when the
    run ends. It is listed before `checkpoint`: a run that is killed between the two files repeats the epoch.

    Args:
        best: the metric whose best value so far makes an epoch's weights ``best.safetensors``; named as for
            `checkpoint`.
    """

    before: ClassVar = ("checkpoint",)
    observer: ClassVar = True

    best: str = "accuracy"

    @hookimpl
    def safe_point(self, run: Run) -> None:
        """Write what is due."""
        if is_best_epoch(run, self.best):
            self._write(run, "best")
        if run.finished:
            self._write(run, "last")

    def _write(self, run: Run, name: str) -> None:
        assert run.dir is not None
        evaluated = run.evaluated_model()
        evaluated = run.model if evaluated is run.forward else evaluated  # not compiled
        run.dir.write(f"weights/{name}.safetensors", pack_safetensors(evaluated, described(run)))


def described(run: Run) -> dict[str, Any]:
    """Return what a stranger needs to use a run's network: classes, and what was done to an image."""
    return {
        "recipe": run.recipe.name,
        "epoch": run.epoch,
        "step": run.step,
        "metrics": run.history[-1] if run.history else {},
        "data": {name: value for name, value in run.provenance["data"].items() if name != "splits"},
    }
