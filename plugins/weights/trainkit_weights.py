"""Weights for use elsewhere."""

import json
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainkit import Run
from trainkit.plugin import hookimpl, plugin
from trainkit.run import best_of

__all__ = ["Weights", "packed"]


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
        if run.epoch_ended and best_of(run).get(run.metric_key(self.best), {}).get("epoch") == run.history[-1]["epoch"]:
            self._write(run, "best")
        if run.finished:
            self._write(run, "last")

    def _write(self, run: Run, name: str) -> None:
        assert run.dir is not None
        evaluated = run.hooks.one("eval_model", (nn.Module, type(None)), default=lambda run: None)(run) or run.model
        run.dir.write(f"weights/{name}.safetensors", packed(evaluated, described(run)))


def described(run: Run) -> dict[str, Any]:
    """Return what a stranger needs to use a run's network: classes, and what was done to an image."""
    return {
        "recipe": run.recipe.name,
        "epoch": run.epoch,
        "step": run.step,
        "metrics": run.history[-1] if run.history else {},
        "data": {name: value for name, value in run.provenance["data"].items() if name != "splits"},
    }


def packed(model: nn.Module, description: dict[str, Any]) -> bytes:
    """Return a network's state dict as a safetensors file.

    Args:
        model: the network. Entries that share memory, such as a shared kernel, are stored under the first name; the
            file's metadata maps the other names to it in ``shared``.
        description: plain data for the metadata's ``trainkit``.
    """
    from safetensors.torch import save

    kept: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in kept:
            shared[name] = kept[place]
        else:
            kept[place] = name
            tensors[name] = tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
    metadata = {"format": "pt", "trainkit": json.dumps(description), "shared": json.dumps(shared)}
    return save(tensors, metadata)
