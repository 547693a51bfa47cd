"""Test-time augmentation."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from attrs import field
from attrs.validators import ge
from torch import Tensor, nn

from trainkit import Batch, Metric, Run
from trainkit.errors import RecipeError
from trainkit.numerics import widest_float
from trainkit.plugin import hookimpl, plugin

__all__ = ["TTA"]


@plugin
class TTA:
    """Report the accuracy of mirrored and shifted views averaged, beside that of the single view.

    The metric is ``accuracy_tta`` of each split that is evaluated, in percent. Outputs are averaged, not probabilities.
    An output that is not finite is a wrong prediction.

    Args:
        flip: see each view mirrored left to right, too.
        shift: see the image shifted by so many pixels, once to the upper left and once to the lower right; at least 0,
            and 0 for no shifts. The shifted views together weigh as much as the others.
        every: in a run, after every so many epochs, at least 0, and after the last one; 0 for the last one alone. The
            test split that is evaluated once at the end, after a validation split, always has it. Where a plugin ends
            the run early, its last epoch was not known to be one and may lack it.
    """

    flip: bool = True
    shift: int = field(default=0, validator=ge(0))
    every: int = field(default=0, validator=ge(0))
    _fitting: bool = field(init=False, default=False)
    _model: nn.Module | None = field(init=False, default=None)  # of the split that is evaluated, if it is due
    _correct: Tensor | None = field(init=False, default=None)
    _images: int = field(init=False, default=0)

    @hookimpl
    def built(self, run: Run) -> None:
        """Look at the images and targets of the run.

        Raises:
            RecipeError: there is only one view, the images are too small to be shifted, or targets are no classes.
        """
        if not self.flip and not self.shift:
            raise RecipeError(
                "'flip', 'shift': one view alone is what is evaluated anyway; set one, or drop the plugin"
            )
        if not run.data.has_class_targets:
            raise RecipeError("the accuracy is that of classes, and the data's targets are none; drop the plugin")
        height, width = run.shape_of("test")[1:]
        if self.shift >= min(height, width):
            raise RecipeError(f"'shift': {self.shift} is not less than the sides of the images, {height}x{width}")

    @hookimpl
    def fit_start(self) -> None:
        """Evaluations are those of epochs from here on."""
        self._fitting = True

    @hookimpl
    def fit_end(self) -> None:
        """Evaluations are asked for by the user again."""
        self._fitting = False

    @hookimpl
    def eval_start(self, run: Run) -> None:
        """Begin a split, if it is due."""
        self._model = run.evaluated_model() if self._is_due(run) else None
        self._correct, self._images = torch.zeros((), dtype=torch.int64, device=run.device), 0

    @hookimpl
    def forward_end(self, run: Run, batch: Batch, output: Tensor) -> None:
        """Look at a batch of an evaluated split from the other sides; nothing is read from the device."""
        if run.split == "train" or self._model is None or self._correct is None:
            return
        with run.context:
            single = [output, *([self._model(batch.images.flip(3))] if self.flip else [])]
            shifted = [self._model(view) for view in self._shifted(batch.images)]
        averaged = _mean(single) if not shifted else (_mean(single) + _mean(shifted)) / 2
        finite = averaged.isfinite().all(1)
        self._correct += ((averaged.argmax(1) == batch.targets) & finite).sum()
        self._images += len(batch)

    @hookimpl
    def metrics(self, run: Run, split: str) -> dict[str, Metric] | None:
        """Report a split that was evaluated.

        Returns:
            ``accuracy_tta`` (0 to 100), a scalar on the device, or None if it was not due.
        """
        if split == "train" or self._model is None or self._correct is None:
            return None
        self._model = None
        images = torch.tensor(self._images, device=run.device)
        correct, images = run.processes.all_reduce(self._correct), run.processes.all_reduce(images)
        return {"accuracy_tta": Metric(correct.to(widest_float(run.device)) * 100 / images, better="more")}

    def _is_due(self, run: Run) -> bool:
        """Tell whether a split is looked at: in a run, at its end and after every so many epochs."""
        if not self._fitting or run.split != run.selection_split:  # the test split, once, on the selected weights
            return True
        epoch = run.epoch + 1
        is_last = epoch >= run.epochs or run.at_max_steps
        return is_last or (self.every > 0 and epoch % self.every == 0)

    def _shifted(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the shifted views, each mirrored, too."""
        if not self.shift:
            return
        height, width = images.shape[2:]
        framed = F.pad(images, (self.shift,) * 4, mode="reflect")
        for start in (0, 2 * self.shift):
            view = framed[..., start : start + height, start : start + width]
            yield view
            if self.flip:
                yield view.flip(3)


def _mean(outputs: list[Tensor]) -> Tensor:
    return torch.stack([output.float() for output in outputs]).mean(0)
