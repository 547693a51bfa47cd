"""The lifecycle contract: every hook that the core fires, one class a phase of life.

A plugin implements a hook by giving a method its name and :data:`trainkit.plugin.hookimpl`; it may leave out arguments
that it does not need. Order is the order of the recipe: the plugin listed first is called first, in teardown last. The
kind of a hook says what becomes of the results:

* ``one``: exactly one plugin may implement it; a second is an error that names both;
* ``chain``: each implementation gets what the one before it returned, and must return what the next one gets;
* ``list``: the results are collected;
* ``notify``: what is returned is ignored.

The loop that fires them, as pseudocode::

    processes, data, transform_data, epoch_order, batches_per_step, transforms
    model, transform_model, wrap_model, loss, optimizer, transform_optimizer, scheduler, contexts, provenance, built
    fit_start
    for each epoch:
        epoch_start                                         (not when a run resumes inside the epoch)
        epoch_order, train_start
        for each training batch:
            transform_batch, [forward], forward_end, transform_loss, backward
            once the gradients of a step are complete:
                gradients_ready, optimizer_step, step_end, safe_point
        metrics(split="train")
        eval_model, eval_start, for each batch of the validation or test split: transform_batch, [forward], forward_end
        metrics(split="validation" or "test")
        epoch_end, log, safe_point
    (with a validation split, the test split is evaluated here, once, as above)
    fit_end
    [result.json], result_written
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from trainkit.data import Batch, Data
    from trainkit.processes import Processes
    from trainkit.run import Metric, Run, Schedule
    from trainkit.session import Result
    from trainkit.transforms import Transform

__all__ = ["PHASES", "Build", "Evaluation", "Kind", "Life", "Step", "hookspec"]

Kind = Literal["one", "chain", "list", "notify"]
F = TypeVar("F", bound=Callable[..., Any])

_pluggy_hookspec = pluggy.HookspecMarker("trainkit")


def hookspec(kind: Kind) -> Callable[[F], F]:
    """Mark a method as the specification of a hook of this kind. Plugins use it too, for hooks of their own."""

    def mark(function: F) -> F:
        function.trainkit_kind = kind  # type: ignore[attr-defined]
        return _pluggy_hookspec(function)

    return mark


class Build:
    """Everything that exists before the first step, in this order. A failure here leaves nothing behind."""

    @hookspec("one")
    def processes(self, run: Run) -> Processes:
        """Join the processes that train the run together; without a plugin this process trains it alone.

        Args:
            run: the run; ``run.recipe`` alone exists.

        Returns:
            How they speak with each other: see :mod:`trainkit.processes`.
        """

    @hookspec("one")
    def data(self, run: Run) -> Data:
        """Provide the data set.

        Args:
            run: the run; ``run.recipe`` and ``run.device`` exist.

        Returns:
            Training and test split (and others, such as ``validation``), class names and image shape.
        """

    @hookspec("chain")
    def transform_data(self, run: Run, data: Data) -> Data:
        """Change the data set: hold out a validation split, fold, take a subset, balance, relabel.

        Args:
            run: the run; ``run.recipe`` and ``run.device`` exist.
            data: the data set so far.

        Returns:
            The data set that the run uses; :meth:`trainkit.Data.replace` makes one with other splits.
        """

    @hookspec("one")
    def epoch_order(self, run: Run) -> Tensor:
        """Choose the training images of an epoch and their order: samplers, repeated augmentation.

        Called once at build for the number of images, and at the start of each epoch (again on a resume inside one).
        Draw random numbers from ``run.rng`` alone, so that an epoch has the same order whenever it is asked for: here
        it is the stream of the epoch's start, wherever in the epoch a run resumes. The default is a permutation of all
        training images.

        Args:
            run: the run; ``run.data`` exists, ``run.epoch`` counts from 0, ``run.batch_index`` is 0.

        Returns:
            int64 [n], indices into the training split; an index may repeat. Every epoch has the same n.
        """

    @hookspec("one")
    def batches_per_step(self, run: Run) -> int:
        """Say how many training batches make one optimizer step; the default is 1.

        Args:
            run: the run; ``run.data`` and ``run.batches`` exist.

        Returns:
            At least 1. The last step of an epoch takes the batches that are left.
        """

    @hookspec("list")
    def transforms(self, run: Run, split: str) -> Transform | list[Transform] | None:
        """Provide image transforms of one split; called once for each split.

        Args:
            run: the run; ``run.data`` exists.
            split: name of the split, such as ``"train"``, ``"validation"`` or ``"test"``.

        Returns:
            One transform, several in order, or None for no part in this split.
        """

    @hookspec("one")
    def model(self, run: Run) -> nn.Module:
        """Build the network, on the CPU; torch's global generator has just been seeded for it.

        Args:
            run: the run; ``run.data.shape`` and ``run.data.classes`` give its input and output size.

        Returns:
            A module from float images [N, C, H, W] to logits [N, classes].
        """

    @hookspec("chain")
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Change the network before the optimizer exists: start weights, surgery, shared kernels, memory format.

        Args:
            run: the run; ``run.data`` exists.
            model: the network so far, on the CPU; it may be changed in place and returned.

        Returns:
            The network that the run trains, counts and saves.
        """

    @hookspec("chain")
    def wrap_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Wrap the forward pass on the device: compilation, data parallelism.

        Args:
            run: the run; ``run.model`` is the network itself, whose weights are saved.
            model: what would be called so far.

        Returns:
            What is called in place of the network. It must use the same parameters.
        """

    @hookspec("one")
    def loss(self, run: Run) -> Callable[[Tensor, Tensor], Tensor]:
        """Provide the loss function.

        Args:
            run: the run; ``run.model`` exists. When the function is called, ``run.batch`` holds the images.

        Returns:
            A function from the network's output ([N, classes] logits) and targets (int64 [N] classes, or what the data
            and ``transform_batch`` make of them) to the mean loss, a scalar.
        """

    @hookspec("one")
    def optimizer(self, run: Run, params: list[nn.Parameter]) -> Optimizer:
        """Provide the optimizer.

        Args:
            run: the run; ``run.model`` is on its device.
            params: the trainable parameters, each shared one once.

        Returns:
            An optimizer over these parameters.
        """

    @hookspec("chain")
    def transform_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        """Wrap or change the optimizer before schedulers see it.

        Args:
            run: the run.
            optimizer: the optimizer so far.

        Returns:
            The optimizer that the run steps and saves.
        """

    @hookspec("list")
    def scheduler(self, run: Run, optimizer: Optimizer) -> Schedule | None:
        """Provide a learning-rate scheduler.

        Args:
            run: the run; ``run.total_epochs``, ``run.total_steps`` and ``run.steps_per_epoch`` tell its length.
            optimizer: the optimizer that the run steps.

        Returns:
            The scheduler and its unit, ``"epoch"`` or ``"step"`` (there is no default unit); for torch's
            ``ReduceLROnPlateau`` also the metric that it looks at.
        """

    @hookspec("list")
    def contexts(self, run: Run) -> AbstractContextManager[Any] | None:
        """Provide a context manager that surrounds every forward pass and loss; it is made once and entered often.

        Args:
            run: the run.

        Returns:
            A re-enterable context manager, such as ``torch.autocast("cpu", torch.bfloat16)``, or None.
        """

    @hookspec("list")
    def provenance(self, run: Run) -> dict[str, Path | str | float] | None:
        """Say what else the run's numbers depend on, beyond recipe, code, data, packages and machine.

        Args:
            run: the run; everything but ``built`` has happened.

        Returns:
            Values by name. A path stands for a file, which is recorded by its content's hash.
        """

    @hookspec("notify")
    def built(self, run: Run) -> None:
        """Everything is built, nothing is loaded from a checkpoint yet: copy the network, hook into the optimizer.

        Args:
            run: the run; all parts exist.
        """


class Life:
    """The whole of a run and its epochs."""

    @hookspec("notify")
    def fit_start(self, run: Run) -> None:
        """Begin: everything is built (and, when resuming, loaded), no step is taken yet.

        Args:
            run: the run; ``run.dir`` exists.
        """

    @hookspec("notify")
    def fit_end(self, run: Run, error: BaseException | None) -> None:
        """End, always, in reverse order: after the last epoch, after a stop and after a failure.

        Args:
            run: the run.
            error: what ended the run early, or None.
        """

    @hookspec("notify")
    def result_written(self, run: Run, result: Result) -> None:
        """Hand on what the run left behind: every plugin has ended, and ``result.json`` is written.

        Fired after every session, one that stopped or failed included. An exception fails the command and no longer
        changes the result.

        Args:
            run: the run; nothing more is written to ``run.dir`` but by this hook.
            result: how the run ended, as ``result.json`` has it.
        """

    @hookspec("notify")
    def epoch_start(self, run: Run) -> None:
        """Begin an epoch; not fired again when a run resumes inside one.

        Args:
            run: the run; ``run.epoch`` counts from 0.
        """

    @hookspec("notify")
    def train_start(self, run: Run) -> None:
        """Begin to train on an epoch's batches, also on what is left of them when a run resumes inside the epoch.

        The network has just been put into training mode, all of it: the place to put a part of it back into evaluation
        mode, or to freeze parameters with ``requires_grad_(False)``. Frozen parameters may stay in the optimizer.

        Args:
            run: the run; ``run.epoch`` and ``run.batch_index`` count from 0.
        """

    @hookspec("notify")
    def epoch_end(self, run: Run, metrics: dict[str, float]) -> None:
        """End an epoch, after its evaluation; also where ``max_steps`` cuts an epoch short.

        Args:
            run: the run; ``run.epoch`` is still the epoch that ends, ``run.history[-1]`` is `metrics`.
            metrics: ``epoch`` (from 1; with a fraction where it was cut short), ``step``, ``lr`` and each metric as
                ``<split>_<name>``; what a plugin amends here is what later plugins, the history and the log see.
        """

    @hookspec("notify")
    def safe_point(self, run: Run) -> None:
        """Counters, schedulers and data position agree: the only place to save or to stop.

        Fired after every step, and again after every epoch's end. ``run.stop`` is called before it, in ``step_end`` or
        ``epoch_end``: here, plugins listed earlier may have decided already not to save.

        Args:
            run: the run; ``run.stop_reason`` is set when it is about to stop. Saving calls ``state_dict`` of every
                plugin, which may raise ``RunError`` to refuse.
        """

    @hookspec("notify")
    def log(self, run: Run, record: dict[str, float]) -> None:
        """Receive one record of plain numbers, already on the host.

        Args:
            run: the run.
            record: ``epoch``, ``step`` and the values; of a whole epoch, or what a plugin gave to ``run.log``.
        """


class Step:
    """One batch. These are bound once, at the start of a fit."""

    @hookspec("chain")
    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        """Change a batch on the device, after the image transforms: mixup, cutmix, memory format.

        Args:
            run: the run; ``run.split`` tells which split the batch is of.
            batch: float images [N, C, H, W], targets [N, ...] and indices [N]; targets may become probabilities
                [N, classes].

        Returns:
            The batch, changed in place or new.
        """

    @hookspec("notify")
    def forward_end(self, run: Run, batch: Batch, output: Tensor, loss: Tensor) -> None:
        """See what a forward pass gave, in training and in evaluation; ``run.split`` tells which.

        Nothing is to be changed in place: other plugins may keep it for a while.

        Args:
            run: the run.
            batch: the batch as the network saw it.
            output: logits [N, classes].
            loss: the mean loss of the batch, a scalar on the device (an image's own is to be computed from `output` and
                ``batch.targets``); reading it with ``.item()`` stalls a GPU.
        """

    @hookspec("chain")
    def transform_loss(self, run: Run, loss: Tensor) -> Tensor:
        """Change the loss of a training batch before the backward pass: add a term, scale it.

        A plugin that scales the loss is listed after those that add terms to it.

        Args:
            run: the run; ``run.batch`` is the current batch, ``run.output`` what the network made of it.
            loss: the loss so far, a scalar.

        Returns:
            The loss whose gradients are computed.
        """

    @hookspec("one")
    def backward(self, run: Run, loss: Tensor) -> None:
        """Compute gradients; the default is ``loss.backward()``.

        Args:
            run: the run; ``run.completes_step`` tells whether a step follows this batch.
            loss: what ``transform_loss`` made of the batch's mean loss.
        """

    @hookspec("notify")
    def gradients_ready(self, run: Run) -> None:
        """See or change gradients, once, between the last backward and the optimizer's step.

        Args:
            run: the run; gradients are in ``run.model.parameters()``. Change them in place: fused optimizers rely on
                a gradient having the memory layout of its parameter.
        """

    @hookspec("one")
    def optimizer_step(self, run: Run) -> None:
        """Update the parameters; the default is ``run.optimizer.step()``. Gradients are cleared after it.

        Args:
            run: the run; ``run.batch`` and ``run.compute_loss`` allow a second forward pass.
        """

    @hookspec("notify")
    def step_end(self, run: Run) -> None:
        """End a step: the parameters are updated and the counters and step-wise schedulers advanced.

        Args:
            run: the run; ``run.step`` counts the steps taken.
        """


class Evaluation:
    """From outputs to named numbers."""

    @hookspec("one")
    def eval_model(self, run: Run) -> nn.Module | None:
        """Choose the network that is evaluated, before each evaluation; the default is the trained one.

        An average of an epoch must be made before, in ``step_end``: ``epoch_end`` follows the evaluation. Where
        the test split is evaluated once, at the end, that is on the best epoch's state: weights, and plugins' states.

        Args:
            run: the run; in that last evaluation ``run.epoch`` is the number of epochs that the state has seen.

        Returns:
            A module to call in place of the trained one, or None for that one.
        """

    @hookspec("notify")
    def eval_start(self, run: Run) -> None:
        """Begin to evaluate a split: counters of that split begin anew. The network is in evaluation mode.

        Args:
            run: the run; ``run.split`` is the split's name.
        """

    @hookspec("list")
    def metrics(self, run: Run, split: str) -> dict[str, Metric | Tensor | float] | None:
        """Report what was gathered over a split; called at its end.

        Args:
            run: the run.
            split: name of the split, such as ``"train"``, ``"validation"`` or ``"test"``.

        Returns:
            Values by name: a :class:`trainkit.Metric` says whether less or more is better and whether progress shows
            it; a plain number or scalar tensor (which may still be on the device) says neither. A name that another
            plugin reports too is an error.
        """


#: The phases of life in order; ``trainkit plugins order`` prints hooks in this order.
PHASES: tuple[type, ...] = (Build, Life, Step, Evaluation)
