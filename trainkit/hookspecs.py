"""The lifecycle contract: every hook that the core fires, one class a phase of life.

A plugin implements a hook by giving a method its name and :data:`trainkit.hookimpl`; it may leave out arguments that
it does not need. Order is the order of the recipe: the plugin listed first is called first, in teardown last. The kind
of a hook says what becomes of the results:

* ``one``: exactly one plugin may implement it; a second is an error that names both;
* ``chain``: each implementation gets what the one before it returned, and must return what the next one gets;
* ``list``: the results are collected;
* ``notify``: what is returned is ignored.

The loop that fires them, as pseudocode::

    data, transforms, model, transform_model, wrap_model, loss, optimizer, transform_optimizer, scheduler, contexts,
    provenance
    fit_start
    for each epoch:
        epoch_start
        for each training batch:
            transform_batch, [forward], forward_end, backward, gradients_ready, optimizer_step, step_end, safe_point
        metrics(split="train")
        eval_model, for each test batch: transform_batch, [forward], forward_end
        metrics(split="test")
        epoch_end, log, safe_point
    fit_end
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from trainkit.data import Batch, Data
    from trainkit.run import Run, Schedule
    from trainkit.transforms import Transform

__all__ = ["PHASES", "Build", "Evaluation", "Kind", "Life", "Step", "hookspec"]

Kind = Literal["one", "chain", "list", "notify"]
Split = Literal["train", "test"]
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
    def data(self, run: Run) -> Data:
        """Provide the data set.

        Args:
            run: the run; ``run.recipe`` and ``run.device`` exist.

        Returns:
            Training and test split, class names and image shape.
        """

    @hookspec("list")
    def transforms(self, run: Run, split: Split) -> Transform | list[Transform] | None:
        """Provide image transforms of one split; called once for each split.

        Args:
            run: the run; ``run.data`` exists.
            split: ``"train"`` or ``"test"``.

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
        """Change the network before it moves to the device: surgery, shared kernels, memory format.

        Args:
            run: the run; ``run.data`` exists.
            model: the network so far; changing it in place and returning it is fine.

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
            run: the run; ``run.model`` exists.

        Returns:
            A function from logits [N, classes] and targets ([N] classes, or [N, classes] probabilities) to the mean
            loss, a scalar.
        """

    @hookspec("one")
    def optimizer(self, run: Run, params: list[nn.Parameter]) -> Optimizer:
        """Provide the optimizer.

        Args:
            run: the run; ``run.model`` is on its device.
            params: the trainable parameters, each shared one once.

        Returns:
            An optimizer over exactly these parameters.
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
            run: the run; ``run.epochs`` and ``run.steps_per_epoch`` tell its length.
            optimizer: the optimizer that the run steps.

        Returns:
            The scheduler and its unit, ``"epoch"`` or ``"step"``; there is no default unit.
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
        """Declare what else the numbers depend on: files, which are recorded by their content, and versions.

        Args:
            run: the run; everything is built.

        Returns:
            Values by name, or None. A path stands for the content of the file.
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
    def epoch_start(self, run: Run) -> None:
        """Begin an epoch; not fired again when a run resumes inside one.

        Args:
            run: the run; ``run.epoch`` counts from 0.
        """

    @hookspec("notify")
    def epoch_end(self, run: Run, metrics: dict[str, float]) -> None:
        """End an epoch, after its evaluation.

        Args:
            run: the run; ``run.epoch`` is still the epoch that ends, ``run.history[-1]`` is `metrics`.
            metrics: ``epoch`` (from 1), ``step``, ``lr`` and each metric as ``train_<name>`` or ``test_<name>``; what a
                plugin amends here is what later plugins, the history and the log see.
        """

    @hookspec("notify")
    def safe_point(self, run: Run) -> None:
        """Counters, schedulers and data position agree: the only place to save or to stop.

        Fired after every step whose gradients are used up, and again after every epoch's end.

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
    """One batch. These are bound once at the start of a fit; a hook that nobody implements costs nothing."""

    @hookspec("chain")
    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        """Change a batch on the device, after the image transforms: mixup, cutmix, memory format.

        Args:
            run: the run; ``run.split`` tells whether the batch is for training or for testing.
            batch: float images [N, C, H, W] and targets [N]; targets may become probabilities [N, classes].

        Returns:
            The batch, changed in place or new.
        """

    @hookspec("notify")
    def forward_end(self, run: Run, batch: Batch, output: Tensor, loss: Tensor) -> None:
        """See what a forward pass gave, in training and in testing; ``run.split`` tells which.

        Nothing is to be changed in place: other plugins may keep it for a while.

        Args:
            run: the run.
            batch: the batch as the network saw it.
            output: logits [N, classes].
            loss: the mean loss of the batch, a scalar on the device; reading it with ``.item()`` stalls a GPU.
        """

    @hookspec("one")
    def backward(self, run: Run, loss: Tensor) -> bool | None:
        """Compute gradients; the default is ``loss.backward()``.

        Args:
            run: the run; ``run.batch`` is the current batch.
            loss: the mean loss of the batch.

        Returns:
            False while gradients are still being accumulated: no optimizer step follows then.
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

        Args:
            run: the run.

        Returns:
            A module to call in place of the trained one, or None for that one.
        """

    @hookspec("list")
    def metrics(self, run: Run, split: Split) -> dict[str, Tensor | float] | None:
        """Report, and forget, what was gathered over a split; called once at its end.

        Args:
            run: the run.
            split: ``"train"`` or ``"test"``.

        Returns:
            Named values: numbers, or scalar tensors that may still be on the device. A duplicate name is an error.
        """


#: The phases of life in order; ``trainkit plugins order`` prints hooks in this order.
PHASES: tuple[type, ...] = (Build, Life, Step, Evaluation)
