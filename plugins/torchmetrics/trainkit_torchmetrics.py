"""Metrics of torchmetrics."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import Attribute, field
from torch import Tensor

from trainkit import Batch, Metric, Run
from trainkit.data import describe
from trainkit.errors import RecipeError, did_you_mean
from trainkit.plugin import hookimpl, plugin
from trainkit.run import Better

if TYPE_CHECKING:
    import torchmetrics

__all__ = ["TorchMetrics"]

Task = Literal["multiclass", "multilabel", "regression"]

#: What the names of torchmetrics' classes begin with.
PREFIXES: dict[Task, str] = {"multiclass": "Multiclass", "multilabel": "Multilabel", "regression": ""}


def _check_compute(instance: object, attribute: Attribute[Any], value: dict[str, Any]) -> None:
    if not value:
        raise ValueError("'compute' must name a metric, such as {f1_score: {average: macro}}")
    for key, options in value.items():
        if not (options is None or isinstance(options, dict)):
            raise ValueError(f"'compute': the options of {key} must be a mapping, not {options}")


@plugin
class TorchMetrics:
    """Report metrics of torchmetrics over all images of each split (Detlefsen et al., JOSS 2022).

    They are computed on the device: of softmax probabilities and classes, of sigmoid probabilities and labels, or of
    outputs and numbers. A target of probabilities, which mixup and cutmix make of classes, counts as its most probable
    class.

    Args:
        compute: options by metric, which is named as torchmetrics' function is, such as ``f1_score``. What follows a
            ``/`` tells two of one kind apart: ``accuracy/top_5`` is reported as ``accuracy_top_5``.
        task: what a target is: ``multiclass`` is a class, ``multilabel`` a 0 or 1 for each label, ``regression`` one
            number or several.
    """

    compute: dict[str, Any] = field(validator=_check_compute)
    task: Task = "multiclass"
    _metrics: dict[str, dict[str, torchmetrics.Metric]] = field(init=False, factory=dict)  # by split, by key
    _partial: bool = field(init=False, default=False)  # whether the first images of this epoch are not counted

    @hookimpl
    def built(self, run: Run) -> None:
        """Make the metrics of the training split, after a trial of each.

        Raises:
            RecipeError: there is no such metric, it does not take its options, it does not give numbers, or the data's
                targets are of another task.
        """
        _check_targets(run, self.task)
        names: dict[str, str] = {}
        for key in self.compute:
            for name in _values(key, self._tried(run, key), run.data.classes):
                if name in names:
                    raise RecipeError(f"'compute': {names[name]} and {key} are both reported as {name!r}; rename one")
                names[name] = key
        self._metrics = {"train": self._made(run)}

    def _made(self, run: Run) -> dict[str, torchmetrics.Metric]:
        """Return new metrics. They do not check each batch, which would wait for the device."""
        return {key: self._metric(run, key, checked=False).to(run.device) for key in self.compute}

    def _metric(self, run: Run, key: str, *, checked: bool) -> torchmetrics.Metric:
        kinds = _kinds(self.task)
        kind = key.partition("/")[0]
        if kind not in kinds:
            near = did_you_mean(kind, kinds) or f"; it has {', '.join(kinds)}"
            raise RecipeError(f"'compute': torchmetrics has no {self.task} metric {kind!r}{near}")
        size = {"multiclass": "num_classes", "multilabel": "num_labels"}.get(self.task)
        sizes = {} if size is None else {size: len(run.data.classes), "validate_args": checked}
        try:
            metric: torchmetrics.Metric = kinds[kind](**sizes, **(self.compute[key] or {}))
        except (TypeError, ValueError) as error:
            raise RecipeError(f"'compute': {key}: {error}") from error
        metric.persistent(True)
        return metric

    def _tried(self, run: Run, key: str) -> Tensor:
        """Return what a metric gives for a few made outputs and targets, which it checks."""
        metric = self._metric(run, key, checked=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of values that so few images do not have
                metric.update(*_trial(run, self.task))
                value: Any = metric.compute()
        except Exception as error:  # metrics raise many kinds
            raise RecipeError(f"'compute': {key}: {' '.join(str(error).split())}") from error
        if not isinstance(value, Tensor) or value.dim() > 1:
            raise RecipeError(f"'compute': {key} gives neither one number nor one for each class: {describe(value)}")
        return value

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Drop what a checkpoint within an epoch brought, where it is the share of one of several processes."""
        self._partial = run.world > 1 and run.batch_index > 0
        if self._partial:
            self._forget()

    @hookimpl
    def epoch_start(self) -> None:
        """Begin the training split of an epoch."""
        self._partial = False
        self._forget()

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        """Forget the training split of a whole epoch, so that a checkpoint does not hold the outputs of all images."""
        if run.batch_index == run.batches_per_epoch:
            self._forget()

    def _forget(self) -> None:
        for metric in self._metrics["train"].values():
            metric.reset()

    @hookimpl
    def eval_start(self, run: Run) -> None:
        """Begin a split that is evaluated."""
        self._metrics[run.split] = self._made(run)

    @hookimpl
    def forward_end(self, run: Run, batch: Batch, output: Tensor) -> None:
        """Add a batch up, on the device."""
        outputs, targets = _prepared(output.detach(), batch.targets, self.task)
        for metric in self._metrics[run.split].values():
            metric.update(outputs, targets)

    @hookimpl
    def metrics(self, run: Run, split: str) -> dict[str, Metric] | None:
        """Report a split.

        Returns:
            Values as torchmetrics gives them, most from 0 to 1, or None if no batch was seen.
        """
        if split == "train" and self._partial:
            return None
        found = self._metrics.get(split, {})
        if not all(metric.update_called for metric in found.values()):
            return None
        reported = {}
        for key, metric in found.items():
            better: Better | None = None
            if metric.higher_is_better is not None:
                better = "more" if metric.higher_is_better else "less"
            for name, value in _values(key, metric.compute(), run.data.classes).items():
                reported[name] = Metric(value, better=better)
        return reported

    def state_dict(self) -> dict[str, Any]:
        """Return what the training split has added up to."""
        return {
            key: {"updates": metric.update_count, "state": dict(metric.state_dict())}
            for key, metric in self._metrics["train"].items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, whatever device its tensors are on."""
        for key, saved in state.items():
            metric = self._metrics["train"][key]
            device = metric.device
            metric.reset()
            metric.load_state_dict(copy.deepcopy(saved["state"]))  # a metric changes its state in place
            metric.to(device)
            metric._update_count = saved["updates"]  # torchmetrics 1.9 has no other way


def _kinds(task: Task) -> dict[str, Any]:
    """Return torchmetrics' classes for a task by the names of its functions: ``f1_score`` for ``MulticlassF1Score``."""
    from torchmetrics import classification, regression

    module = regression if task == "regression" else classification
    prefix = PREFIXES[task]
    return {
        re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removeprefix(prefix)).lower(): getattr(module, name)
        for name in module.__all__
        if name.startswith(prefix)
    }


def _values(key: str, value: Tensor, classes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the scalars of a metric's value by the names under which they are reported."""
    name = key.replace("/", "_")
    if value.dim() == 0:
        return {name: value}
    parts = classes if len(classes) == len(value) else tuple(map(str, range(len(value))))
    return {f"{name}_{part}": number for part, number in zip(parts, value, strict=True)}


def _prepared(output: Tensor, targets: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Return what a metric is given of a batch.

    Probabilities are of float64, in which those of different logits differ and few are 0.
    """
    if task == "multiclass":
        return output.double().softmax(1), targets if targets.dim() == 1 else targets.argmax(1)
    if task == "multilabel":
        return output.double().sigmoid(), targets.long()
    return output.float().reshape(targets.shape), targets.float()


def _trial(run: Run, task: Task) -> tuple[Tensor, Tensor]:
    """Return made outputs and targets in which every class, or label, occurs and is mostly recognized."""
    classes = len(run.data.classes)
    if task == "multiclass":
        targets = torch.arange(classes)
        return torch.eye(classes, dtype=torch.float64).softmax(1), targets
    if task == "multilabel":
        targets = (torch.arange(4)[:, None] + torch.arange(classes)) % 2
        return 0.25 + 0.5 * targets.double(), targets
    shape = torch.as_tensor(run.data.first_target).shape
    targets = torch.linspace(1, 2, 4).view(-1, *[1] * len(shape)).expand(4, *shape).contiguous()
    return targets**2, targets


def _check_targets(run: Run, task: Task) -> None:
    """Hold the data's targets against the task.

    Raises:
        RecipeError: they are others.
    """
    target = run.data.first_target
    classes = len(run.data.classes)
    if task == "multiclass":
        fits, wanted = run.data.has_class_targets, "classes"
    elif task == "multilabel":
        is_vector = isinstance(target, Tensor) and tuple(target.shape) == (classes,)
        fits, wanted = (
            is_vector and bool(((target == 0) | (target == 1)).all()),
            f"a 0 or 1 for each of {classes} labels",
        )
    else:
        fits, wanted = not run.data.has_class_targets and not isinstance(target, bool), "numbers"
    if not fits:
        found = "classes" if run.data.has_class_targets else describe(target)
        raise RecipeError(
            f"'task': the targets of {task} are {wanted}, and the data's are {found}; set plugins.torchmetrics.task to "
            f"another of {', '.join(PREFIXES)}"
        )
