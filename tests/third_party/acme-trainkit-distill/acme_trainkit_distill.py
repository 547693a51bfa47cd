"""Knowledge distillation."""

import copy
from pathlib import Path
from typing import ClassVar

import torch
from attrs import field
from attrs.validators import and_, ge, gt, le
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from trainkit import Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin, recipe_file

__all__ = ["Distill"]


@plugin
class Distill:
    """Learn from a teacher's softened outputs, too (Hinton et al., 2015).

    The loss becomes ``(1 - weight) * loss + weight * T**2 * KL(teacher || student)``, outputs divided by ``T``. The
    teacher is a network of the recipe's own architecture (Furlanello et al., ICML 2018); it sees the student's images.

    Args:
        teacher: its weights: a state dict, or a checkpoint of trainkit, in a file beside the recipe.
        temperature: the ``T`` by which outputs are divided; greater than 0.
        weight: the share of the teacher in the loss, from 0 to 1.
    """

    before: ClassVar = ("accumulate",)

    teacher: Path = recipe_file()
    temperature: float = field(default=4.0, validator=gt(0))
    weight: float = field(default=0.5, validator=and_(ge(0), le(1)))
    _teacher: nn.Module = field(init=False)

    @hookimpl
    def provenance(self) -> dict[str, Path]:
        """The teacher's weights."""
        return {"teacher": self.teacher}

    @hookimpl
    def built(self, run: Run) -> None:
        """Make the teacher."""
        try:
            state = torch.load(self.teacher, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever the bytes lead to
            raise RecipeError(f"plugins.distill.teacher: {self.teacher}: cannot be read ({error})") from error
        model = copy.deepcopy(run.model).eval().requires_grad_(False)
        try:
            model.load_state_dict(state.get("model", state))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"plugins.distill.teacher: {self.teacher} is not a state dict of the recipe's network ({error})"
            ) from error
        self._teacher = model

    @hookimpl
    def transform_loss(self, run: Run, loss: Tensor) -> Tensor:
        """Add the teacher's term."""
        assert run.batch is not None
        assert run.output is not None
        student = run.output
        with torch.no_grad():
            teacher, _ = run.compute_loss(run.batch, self._teacher)
        t = self.temperature
        student, teacher = log_softmax(student.float() / t, dim=1), log_softmax(teacher.float() / t, dim=1)
        divergence = kl_div(student, teacher, reduction="batchmean", log_target=True)
        return (1 - self.weight) * loss + self.weight * t**2 * divergence
