"""A student that learns from a teacher."""

from pathlib import Path

import torch
from attrs import field
from attrs.validators import gt
from torch import Tensor
from torch.nn.functional import kl_div

from trainkit import LoadedModel, Run, load_model
from trainkit.errors import RecipeError, TrainkitError
from trainkit.inference import model_files
from trainkit.plugin import hookimpl, plugin, recipe_file
from trainkit.provenance import plugin_code

__all__ = ["Distillation", "distillation_loss"]

#: The hooks whose implementations make the teacher's outputs.
NETWORK = ("transforms", "model", "transform_model", "eval_model")


@plugin
class Distillation:
    """Train the network to give what an earlier run's network gives, too (Hinton et al., arXiv:1503.02531).

    To the loss of a training batch it adds ``alpha * temperature ** 2`` times the Kullback-Leibler divergence of the
    student's class probabilities from the teacher's, both of logits over the temperature. The teacher sees the same
    batch, as it is after all transforms, in evaluation mode. Nothing of it is trained, or saved with the student.

    Args:
        teacher: the directory of an earlier run: its network as it was evaluated, of its best epoch. Relative to the
            recipe's own file; the run directory keeps a copy of what is needed.
        temperature: softens both distributions; greater than 0. At 1 they are the networks' own.
        alpha: weight of the added term; greater than 0.
    """

    teacher: Path = recipe_file(files=model_files)
    temperature: float = field(default=4.0, validator=gt(0))
    alpha: float = field(default=1.0, validator=gt(0))
    _teacher: LoadedModel = field(init=False)

    @hookimpl
    def built(self, run: Run) -> None:
        """Load the teacher and hold it against the student.

        Raises:
            RecipeError: it cannot be loaded, or has other classes, images or preprocessing.
        """
        try:
            self._teacher = load_model(self.teacher, device=str(run.device))
        except TrainkitError as error:
            raise RecipeError(f"'teacher': {error}") from error
        self._teacher.model.requires_grad_(False)
        if why := _misfit(self._teacher, run):
            raise RecipeError(f"'teacher': {self.teacher}: {why}")

    @hookimpl
    def provenance(self) -> dict[str, Path | str | float]:
        """Record the code of the plugins that make the teacher's outputs; its files are recorded with the options."""
        hooks = self._teacher.run.hooks
        plugins = {impl.plugin.name: impl.plugin for hook in NETWORK for impl in hooks.implementations(hook)}
        return {f"teacher.{name}": plugin_code(plugin) or "" for name, plugin in plugins.items()}

    @hookimpl
    def transform_loss(self, run: Run, loss: Tensor) -> Tensor:
        """Add the divergence from the teacher's outputs for the same batch."""
        assert run.batch is not None
        assert run.output is not None
        with torch.no_grad(), run.context:
            wanted = self._teacher.model(run.batch.images)
        return loss + self.alpha * distillation_loss(run.output, wanted, self.temperature)


def distillation_loss(output: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Return the squared temperature times the divergence of the student from the teacher, a scalar, in float32.

    The square keeps the size of its gradients, which otherwise fall with the temperature.

    Args:
        output: the student's logits [N, classes].
        wanted: the teacher's.
        temperature: divides both.
    """
    student, teacher = ((logits.float() / temperature).log_softmax(1) for logits in (output, wanted))
    return temperature**2 * kl_div(student, teacher, reduction="batchmean", log_target=True)


def _misfit(teacher: LoadedModel, run: Run) -> str | None:
    """Return why a teacher cannot teach the network of a run, or None where it can."""
    if not (teacher.has_class_targets and run.data.has_class_targets):
        return "both networks must tell which class an image is of, and the targets of one of them are no classes"
    if teacher.classes != run.data.classes:
        pairs = zip(teacher.classes, run.data.classes, strict=False)
        unlike = [f"{theirs!r} in place of {ours!r}" for theirs, ours in pairs if theirs != ours]
        how = unlike[0] if unlike else f"{len(teacher.classes)} in place of {len(run.data.classes)}"
        return f"its classes are not those of this run: it has {how}; train it on the same classes, in the same order"
    if teacher.shape != run.data.shape:
        return (
            f"it takes images {list(teacher.shape)}, and these are {list(run.data.shape)}; channels, height and width "
            "must be the same"
        )
    levels = torch.arange(torch.Size(run.data.shape).numel(), device=run.device) * 37 % 256
    probe = levels.to(torch.uint8).view(1, *run.data.shape)  # most levels, neighbours unlike each other
    ours, theirs = run.transforms["test"](probe, run.rng), teacher.preprocess(probe)
    if not torch.equal(ours, theirs):
        return (
            "its preprocessing of test images gives other values than this run's; list the same transforms, such as "
            "normalize, with the same options, in the recipes of both"
        )
    try:
        with torch.no_grad(), run.context:
            teacher.model(torch.zeros(1, *run.image_shape, device=run.device))
    except Exception as error:  # layers raise many kinds
        size = "x".join(map(str, run.image_shape))
        return f"it does not take the training images, {size} after the transforms: {type(error).__name__}: {error}"
    return None
