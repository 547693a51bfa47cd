"""Weights to start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainkit import Run
from trainkit.errors import CheckpointError, RecipeError
from trainkit.inference import read_safetensors
from trainkit.plugin import hookimpl, plugin, recipe_file
from trainkit.rundir import MAX_CHECKPOINT, read_regular, unpack_state

__all__ = ["StartWeights", "read_state_dict"]

PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # what wrappers put before the names
NAMED = 5  # tensors that a message names


def _find(value: Path) -> Path:
    """Return the file of an earlier run's directory: the network as it was evaluated, else as it was trained."""
    if not value.is_dir():
        return value
    places = [value / "weights" / "best.safetensors", *(value / "checkpoints" / f"{n}.pt" for n in ("best", "last"))]
    return next((place for place in places if place.is_file()), value)


@plugin
class StartWeights:
    """Start from the weights of a file or of an earlier run, in any network whose tensors have the same names.

    List it behind the plugin that provides the network, and before those that change it. A head for other classes
    differs from the network's in its first dimension alone. It keeps its initial values, and that is said. Whatever
    else does not fit is an error.

    Args:
        file: a state dict that ``torch.save`` wrote, or that lies under ``model`` or ``state_dict`` there; a
            safetensors file; or the directory of an earlier run: the network as it was evaluated, which is its
            ``weights/best.safetensors``, else the trained one of its best or last checkpoint. Relative to the recipe's
            own file; the run directory keeps a copy.
        strict: whether every tensor of the network, but for a head of other classes, must be in the file, and every
            tensor of the file in the network. False takes those that fit.
    """

    file: Path = recipe_file()
    strict: bool = True

    def __attrs_post_init__(self) -> None:
        self.file = _find(self.file)

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Load what fits, and print what was loaded and what was not.

        Raises:
            RecipeError: the file cannot be read, or tensors do not fit.
        """
        given = read_state_dict(self.file)
        own = model.state_dict()
        given = _without_prefix(given, own)
        fitting = {name: tensor for name, tensor in given.items() if name in own and tensor.shape == own[name].shape}
        head = [name for name in own if name in given and name not in fitting and _is_head(given[name], own[name], run)]
        other = [name for name in own if name in given and name not in fitting and name not in head]
        missing = [name for name in own if name not in given]
        unknown = [name for name in given if name not in own]
        if not fitting or (self.strict and (other or missing or unknown)):
            raise RecipeError(f"'file': {self.file}: {_misfit(given, own, other, missing, unknown)}")
        model.load_state_dict(fitting, strict=False)
        left = [*head, *other, *missing]
        rest = f"; {_some(left)} keep their initial values" if left else ""
        rest += f"; {_some(unknown)} of the file are not used" if unknown else ""
        said = f"start_weights: {self.file.name}: {len(fitting)} of {len(own)} tensors loaded{rest}"
        run.console.print(said, markup=False, highlight=False, soft_wrap=True)
        return model


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name. Nothing in it can run code.

    Raises:
        RecipeError: it cannot be read, or holds no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            found: Any = read_safetensors(path)[0]
        else:
            found = unpack_state(path, read_regular(path, MAX_CHECKPOINT))
    except CheckpointError as error:
        raise RecipeError(f"'file': {error}") from error
    except OSError as error:
        cure = "; name a file, or the directory of a run that saved checkpoints" if path.is_dir() else ""
        raise RecipeError(f"'file': {path}: cannot be read: {error.strerror}{cure}") from error
    if not isinstance(found, Mapping):
        raise RecipeError(
            f"'file': {path}: a {type(found).__name__} instead of a state dict; save one with "
            "`torch.save(model.state_dict(), FILE)`"
        )
    for key in ("model", "state_dict", "model_state_dict"):
        inner = found.get(key)
        if isinstance(inner, Mapping):
            found = inner
    tensors = {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise RecipeError(f"'file': {path}: holds no tensors by name")
    return tensors


def _without_prefix(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what a wrapper put before all names, unless the network has it, too."""
    names = dict(given)
    while True:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in names)), None)
        if prefix is None or any(name.startswith(prefix) for name in own):
            return names
        names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}


def _is_head(given: Tensor, own: Tensor, run: Run) -> bool:
    """Tell whether two tensors are those of the last layer for different numbers of classes."""
    same = given.dim() == own.dim() > 0 and given.shape[1:] == own.shape[1:]
    return same and own.shape[0] == len(run.data.classes)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _misfit(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], other: list[str], missing: list[str], unknown: list[str]
) -> str:
    """Return why weights cannot be loaded."""
    parts = []
    if other:
        name = other[0]
        parts.append(f"{name} is {list(given[name].shape)} there and {list(own[name].shape)} in the network")
    if missing:
        parts.append(f"it lacks {_some(missing)}")
    if unknown:
        parts.append(f"the network lacks {_some(unknown)}")
    return f"{'; '.join(parts)}; list the network that they are of, or set plugins.start_weights.strict=false"
