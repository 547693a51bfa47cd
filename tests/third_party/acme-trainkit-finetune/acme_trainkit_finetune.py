"""Fine-tuning."""

from pathlib import Path
from typing import ClassVar

import torch
from attrs import field
from attrs.validators import ge, min_len
from torch import nn

from trainkit import Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, matching_modules, plugin, recipe_file

__all__ = ["Finetune"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@plugin
class Finetune:
    """Fine-tune: train the head alone at first, with batch normalization frozen.

    Everything but the head is frozen for some epochs and trained afterwards. The batch normalizations outside of the
    head keep their running statistics, and normalize with them, for the whole run.

    Args:
        head: module paths of what is trained from the beginning, such as ``fc``: shell patterns, component by
            component.
        epochs: for so many epochs the rest is frozen.
        weights: start weights, a state dict or a checkpoint of trainkit in a file beside the recipe; the head's are not
            taken. By default the network starts as the recipe makes it.
    """

    conflicts: ClassVar = ("freeze",)

    head: tuple[str, ...] = field(validator=min_len(1))
    epochs: int = field(default=1, validator=ge(0))
    weights: Path | None = recipe_file(default=None)
    _frozen: list[nn.Parameter] = field(init=False, factory=list)
    _norms: list[nn.Module] = field(init=False, factory=list)

    @hookimpl
    def transform_model(self, model: nn.Module) -> nn.Module:
        """Take the start weights."""
        heads = matching_modules(model, self.head, "plugins.finetune.head")
        if self.weights is None:
            return model
        try:
            state = torch.load(self.weights, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever the bytes lead to
            raise RecipeError(f"plugins.finetune.weights: {self.weights}: cannot be read ({error})") from error
        of_heads = tuple(f"{path}." for path in heads)
        try:
            body = {k: v for k, v in state.get("model", state).items() if not k.startswith(of_heads)}
            model.load_state_dict(body | {k: v for k, v in model.state_dict().items() if k.startswith(of_heads)})
        except (RuntimeError, TypeError, AttributeError) as error:
            raise RecipeError(f"plugins.finetune.weights: {self.weights} does not fit the network ({error})") from error
        return model

    @hookimpl
    def built(self, run: Run) -> None:
        """Find what is to be frozen."""
        heads = matching_modules(run.model, self.head, "plugins.finetune.head").values()
        trained = {id(p) for module in heads for p in module.parameters()}
        inside = {id(m) for module in heads for m in module.modules()}
        self._frozen = [p for p in run.model.parameters() if p.requires_grad and id(p) not in trained]
        self._norms = [m for m in run.model.modules() if isinstance(m, BATCH_NORMS) and id(m) not in inside]

    @hookimpl
    def train_start(self, run: Run) -> None:
        """Freeze, or train again."""
        for module in self._norms:
            module.eval()
        for parameter in self._frozen:
            parameter.requires_grad_(run.epoch >= self.epochs)
