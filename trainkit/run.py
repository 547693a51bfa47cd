"""Run: the parts of a run, its position, and its log: everything that a hook may see."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import attrs
import numpy as np
import torch
from attrs import field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainkit import provenance
from trainkit.data import Batch, Batches, Data, describe, epoch_permutation
from trainkit.errors import CheckpointError, PluginError, RunError
from trainkit.hooks import Hooks
from trainkit.numerics import widest_float
from trainkit.processes import Processes
from trainkit.recipe import Recipe
from trainkit.rng import stream
from trainkit.transforms import Pipeline

if TYPE_CHECKING:
    from rich.console import Console

    from trainkit.provenance import Built
    from trainkit.rundir import RunDir

__all__ = [
    "Metric",
    "MetricInfo",
    "Run",
    "Schedule",
    "best_of",
    "count_parameters",
    "epoch_order",
    "is_best_epoch",
    "is_better",
    "scalar",
    "to_host",
]

FLUSH_EVERY = 50  # records that wait on the device before they are copied to the host together

Better = Literal["less", "more"]


class Schedule(NamedTuple):
    """A scheduler and when it steps: after every epoch or after every optimizer step.

    Args:
        scheduler: one of torch's, or a subclass.
        unit: ``epoch`` or ``step``.
        metric: what torch's ``ReduceLROnPlateau`` looks at, such as ``loss`` (of the validation or test split) or
            ``train_loss``; None for all others.
    """

    scheduler: LRScheduler
    unit: Literal["epoch", "step"]
    metric: str | None = None


class Metric(NamedTuple):
    """One value that the ``metrics`` hook reports.

    Args:
        value: a number, or a scalar tensor that may still be on the device.
        better: whether ``less`` or ``more`` is better; None where neither is, and then it never makes a best epoch.
        progress: whether the progress line shows it.
    """

    value: Tensor | float
    better: Better | None = None
    progress: bool = False


class MetricInfo(NamedTuple):
    """What a metric's plugin said of it: see :class:`Metric`."""

    better: Better | None
    progress: bool


@attrs.define(eq=False, kw_only=True, repr=False)
class Run:
    """One run. Plugins read it; what they may change is what hooks return, ``stop`` and ``log``.

    The attributes from `data` to `context` exist as soon as the hook that provides them was called.
    """

    recipe: Recipe
    hooks: Hooks
    device: torch.device
    dry: bool = False  #: whether the run is only tried: nothing may be fetched or changed outside of its directory
    dir: RunDir | None = None  #: where this run writes; exists from ``fit_start`` on
    processes: Processes = field(factory=Processes)  #: those that train the run together

    data: Data = field(init=False)
    batches: dict[str, Batches] = field(init=False)  #: by split
    images_per_epoch: int = field(init=False)  #: training images of an epoch, without a last batch that is dropped
    batches_per_step: int = 1  #: training batches whose gradients make one optimizer step
    transforms: dict[str, Pipeline] = field(init=False)  #: by split
    model: nn.Module = field(init=False)  #: the network that is trained, counted and saved
    parameters: int = field(init=False)  #: trainable values of the network when it was built, each shared one once
    forward: nn.Module = field(init=False)  #: what is called: the network, perhaps compiled or wrapped
    loss: Callable[[Tensor, Tensor], Tensor] = field(init=False)
    optimizer: Optimizer = field(init=False)
    schedules: list[Schedule] = field(init=False)
    context: AbstractContextManager[Any] = field(init=False)  #: surrounds every forward pass
    built: Built = field(init=False)  #: all of these as trainkit made or loaded them: what is replaced is recorded

    epoch: int = 0  #: epochs completed
    step: int = 0  #: optimizer steps completed
    batch_index: int = 0  #: training batches completed in this epoch
    images: int = 0  #: training images seen
    split: str = "train"  #: what the current batch belongs to
    batch: Batch | None = None  #: the current batch, after all transforms
    output: Tensor | None = None  #: what the network made of it
    history: list[dict[str, float]] = field(factory=list)  #: the metrics of each completed epoch
    metric_info: dict[str, MetricInfo] = field(factory=dict)  #: by ``<split>_<name>``, once it was reported
    non_finite: list[float] = field(factory=list)  #: epochs that ended with weights or metrics that are not finite
    tested: dict[str, float] = field(factory=dict)  #: the test split's metrics on the selected weights, at the end
    seconds: dict[str, float] = field(factory=lambda: {"train": 0.0, "evaluation": 0.0, "total": 0.0})  #: wall time
    provenance: dict[str, Any] = field(factory=dict)  #: plugins, environment and data, as in the run directory
    evidence: dict[str, Any] = field(factory=dict)  #: what plugins add to ``result.json``, by plugin
    resumed: list[dict[str, Any]] = field(factory=list)  #: where the run was continued, and what was changed then
    stop_reason: str | None = None  #: why the run is about to stop at the next safe point
    ended: str | None = None  #: why a plugin ended the run early
    exit_code: int = 0  #: of the command that trains, when the run was asked to stop
    reopened: bool = False  #: whether a checkpoint was loaded to continue the run, and it has not gone on yet
    failed: bool = False  #: whether a session failed, so that the parts may lie between two safe points
    pending: list[dict[str, Any]] = field(factory=list)  #: records not yet copied to the host
    _asked: tuple[str, int, bool] | None = field(init=False, default=None)  # to stop; other processes do not know yet
    _sharing: bool = field(init=False, default=False)  # whether a batch is prepared that processes share
    _console: Console | None = field(default=None, alias="console")
    _transform_batch: Callable[[Any, Any], Any] | None = field(init=False, default=None)

    def __repr__(self) -> str:
        place = f"epoch {self.epoch} of {self.recipe.epochs}, step {self.step}"
        return f"<Run {self.recipe.name!r} on {self.device}: {place}>"

    # Processes

    @property
    def rank(self) -> int:
        """This process among those that train the run, from 0; the first alone writes and prints."""
        return self.processes.rank

    @property
    def world(self) -> int:
        """How many processes train the run."""
        return self.processes.world

    # Length and position

    @property
    def epochs(self) -> int:
        """Epochs of the whole run, as the recipe has them."""
        return self.recipe.epochs

    @property
    def batches_per_epoch(self) -> int:
        """Training batches an epoch."""
        return self.batches["train"].count(self.images_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; fewer than batches where gradients are accumulated."""
        return -(-self.batches_per_epoch // self.batches_per_step)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run: of all its epochs, or the recipe's ``max_steps`` where that is less."""
        steps = self.epochs * self.steps_per_epoch
        return min(steps, self.recipe.max_steps or steps)

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, one that ``max_steps`` cuts short included."""
        return -(-self.total_steps // self.steps_per_epoch)

    @property
    def completes_step(self) -> bool:
        """Whether the gradients of the current training batch complete those of an optimizer step."""
        done = self.batch_index + 1
        return done % self.batches_per_step == 0 or done == self.batches_per_epoch

    @property
    def selection_split(self) -> str:
        """The split that is evaluated after epochs and selects the best one: ``validation`` if there is one."""
        return "validation" if self.data.validation is not None else "test"

    @property
    def at_max_steps(self) -> bool:
        """Whether the recipe's ``max_steps`` are taken."""
        return self.recipe.max_steps is not None and self.step >= self.recipe.max_steps

    @property
    def epoch_ended(self) -> bool:
        """Whether the last record of an epoch belongs to the current position."""
        return bool(self.history) and self.history[-1]["step"] == self.step

    @property
    def finished(self) -> bool:
        """Whether all epochs, or the recipe's ``max_steps``, are done and recorded, or a plugin ended the run early."""
        done = self.epoch >= self.recipe.epochs or (self.at_max_steps and self.epoch_ended)
        return done or self.ended is not None

    def is_stopping(self) -> bool:
        """Tell whether the run was asked to stop, and every process of it knows."""
        return self.stop_reason is not None

    @property
    def images_in_batch(self) -> int:
        """Images of the current training batch, over all processes."""
        size = self.recipe.batch_size
        return min(size, self.images_per_epoch - self.batch_index * size)

    def count_batch(self) -> None:
        """Count a training batch whose gradients are computed."""
        self.images += self.images_in_batch
        self.batch_index += 1

    def advance_step(self) -> None:
        """Count an optimizer step, and step the schedulers that follow steps."""
        self.step += 1
        for schedule in self.schedules:
            if schedule.unit == "step":
                schedule.scheduler.step()

    def stop(self, reason: str, exit_code: int = 0) -> None:
        """Ask the run to stop at its next safe point; the first reason is kept.

        Args:
            reason: for people, and for ``result.json``.
            exit_code: of the command; other than 0 where the run should be continued: 143 is what a SIGTERM gives.
        """
        self._ask((reason, exit_code, False))

    def end(self, reason: str) -> None:
        """End the run for good at its next safe point: that is part of its state, and a resumed run does not go on.

        Args:
            reason: for people, and for ``result.json``.
        """
        self._ask((reason, 0, True))

    def _ask(self, asked: tuple[str, int, bool]) -> None:
        if self.world == 1:
            self._stop(*asked)
        elif self._asked is None:
            self._asked = asked

    def _stop(self, reason: str, exit_code: int, for_good: bool) -> None:
        if self.stop_reason is None:
            self.stop_reason, self.exit_code = reason, exit_code
            if for_good:
                self.ended = reason

    def agree(self) -> None:
        """Let every process know whether one of them was asked to stop, so that all stop at the same safe point."""
        if self.world == 1 or not self.processes.any(self._asked is not None):
            return
        for asked in self.processes.all_gather(self._asked):
            if asked is not None:
                self._stop(*asked)
        self._asked = None

    # What plugins use

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the network sees, after the training transforms."""
        return self.shape_of("train")

    def shape_of(self, split: str) -> tuple[int, int, int]:
        """Return channels, height and width of a split's images after its transforms."""
        return self.data.shape[0], *self.transforms[split].sizes(self.data.shape[1:])[-1]

    @property
    def console(self) -> Console:
        """Where plugins print for people."""
        if self._console is None:
            from rich.console import Console

            self._console = Console()
        return self._console

    def silence(self) -> None:
        """Print nothing from here on."""
        from rich.console import Console

        self._console = Console(quiet=True)

    def rng(self, purpose: str) -> np.random.Generator:
        """Return the random stream of one purpose at the current training batch (see :mod:`trainkit.rng`).

        It is the same in every process, but for ``transform_batch``, where each has other images of a batch.
        """
        if self._sharing:
            purpose = f"{purpose}/{self.rank} of {self.world}"
        return stream(self.recipe.seed, purpose, self.epoch, self.batch_index)

    def prepare(self, batch: Batch) -> Batch:
        """Apply the image transforms of the current split, then what plugins do to the batch."""
        if self._transform_batch is None:
            self._transform_batch = self.hooks.chain("transform_batch", Batch)
        batch.images = self.transforms[self.split](batch.images, self.rng, batch.indices, self.epoch, share=batch.share)
        self._sharing = batch.share is not None
        try:
            self.batch = self._transform_batch(self, batch)
        finally:
            self._sharing = False
        return self.batch

    def iterate(self, split: str) -> Iterator[Batch]:
        """Yield the batches of a split exactly as the network sees them, outside the run's counters.

        For batch-norm statistics, nearest neighbours, calibration. Nothing else of the run changes: neither its
        position, nor any plugin's counters, nor random numbers of later batches. Every process gets whole batches.

        Args:
            split: a split's name; training images come in the order, and with the transforms, of the current epoch.
        """
        order = epoch_order(self) if split == "train" else None
        for number, batch in enumerate(self.batches[split].iterate(order, epoch=self.epoch, whole=True)):
            before = self.split, self.batch_index, self.batch
            self.split, self.batch_index = split, number
            try:
                prepared = self.prepare(batch)
            finally:
                self.split, self.batch_index, self.batch = before
            yield prepared

    def compute_loss(self, batch: Batch, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Return the network's output and the mean loss of a batch, within the run's contexts.

        Args:
            batch: float images and targets.
            model: what to call in place of ``run.forward``.
        """
        with self.context:
            output = (self.forward if model is None else model)(batch.images)
            return output, self.loss(output, batch.targets)

    def evaluated_model(self) -> nn.Module:
        """Return the network that the run evaluates: the one that a plugin gives in its place, else its own."""
        given = self.hooks.one("eval_model", (nn.Module, type(None)), default=lambda run: None)(self)
        return self.forward if given is None else given

    def metric_key(self, name: str) -> str:
        """Return the key of a metric in records: ``accuracy`` is that of the validation or test split.

        Args:
            name: a key such as ``train_loss``, or a metric's name alone.
        """
        known = {*self.metric_info, *(key for row in self.history for key in row)}
        split = name.partition("_")[0]
        return name if name in known or split in self.data.splits else f"{self.selection_split}_{name}"

    def log(self, values: Mapping[str, Tensor | float]) -> None:
        """Record values at the current step; scalar tensors stay on the device until many are copied at once.

        Args:
            values: numbers or scalar tensors by name. A tensor must not be changed in place afterwards.

        Raises:
            PluginError: a value is something else.
        """
        checked = {name: scalar(name, value) for name, value in values.items()}
        self.pending.append({"epoch": self.epoch + 1, "step": self.step, **checked})
        if len(self.pending) >= FLUSH_EVERY:
            self.flush_log()

    def flush_log(self) -> None:
        """Hand pending records to the ``log`` hook, after one copy from the device for all of them."""
        pending, self.pending = self.pending, []
        fire = self.hooks.notify("log")
        for record in to_host(pending):
            fire(self, record)

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add the time that the block takes to a part of the run; a GPU is waited for at both ends."""
        self._synchronize()
        start = perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            self.seconds[part] += perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to continue exactly from a safe point: tensors and plain values only.

        Raises:
            RunError: a plugin's state, the optimizer's or a record holds what a checkpoint cannot hold.
        """
        self.flush_log()
        plugins = {}
        for name, plugin in self.hooks.plugins.items():
            if hasattr(plugin.instance, "state_dict"):
                state = _plain(plugin.instance.state_dict(), f"{plugin}, state_dict", "")
                plugins[name] = {"version": plugin.version, "state": state}
        providers = self.hooks.named("optimizer")
        return {
            "model": _plain(self.model.state_dict(), self.hooks.named("model"), ""),
            "optimizer": _plain(self.optimizer.state_dict(), f"{providers}, the optimizer's state", ""),
            "schedules": [
                _plain(schedule.scheduler.state_dict(), self.hooks.named("scheduler"), "")
                for schedule in self.schedules
            ],
            "plugins": plugins,
            "position": {
                "epoch": self.epoch,
                "step": self.step,
                "batch_index": self.batch_index,
                "batch_size": self.recipe.batch_size,
                "images_per_epoch": self.images_per_epoch,
            },
            "history": self.history,
            "metric_info": {name: tuple(info) for name, info in self.metric_info.items()},
            "non_finite": self.non_finite,
            "tested": self.tested,
            "ended": self.ended,
            "random": torch.get_rng_state(),
            "cost": {"images": self.images, "seconds": dict(self.seconds)},
            "provenance": self.provenance,
            "resumed": self.resumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, on a run that was built from the same recipe.

        Raises:
            CheckpointError: the state is of another model, optimizer, set of plugins or batch size.
        """
        try:
            self._load(state)
            self.built = attrs.evolve(self.built, contents=provenance.contents(self))
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            said = (
                f"it lacks {error}"
                if isinstance(error, KeyError)
                else " ".join(f"{error}".split())[:300] or repr(error)
            )
            raise CheckpointError(f"the checkpoint does not fit the recipe: {said}") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        position = state["position"]
        self._check_position(position)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for p, values in self.optimizer.state.items():  # fused kernels walk memory: its layout must be the parameter's
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                    values[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.scheduler.load_state_dict(saved)
            if position["step"]:  # torch (2.0 to 2.15) would warn that the optimizer has not stepped in this process
                schedule.scheduler.optimizer._opt_called = True  # type: ignore[attr-defined]
        with self.hooks.blaming(CheckpointError):
            for name, saved in state["plugins"].items():
                if name in self.hooks.plugins:
                    self.hooks.plugins[name].instance.load_state_dict(saved["state"])
        self.epoch, self.step, self.batch_index = position["epoch"], position["step"], position["batch_index"]
        self.history = [dict(row) for row in state["history"]]
        self.metric_info = {name: MetricInfo(*info) for name, info in state["metric_info"].items()}
        self.non_finite = list(state["non_finite"])
        self.tested = dict(state["tested"])
        self.ended = state["ended"]
        self.images = state["cost"]["images"]
        self.seconds.update(state["cost"]["seconds"])
        self.resumed = list(state["resumed"])
        torch.set_rng_state(state["random"])

    def _check_position(self, position: Mapping[str, Any]) -> None:
        """Refuse a place within an epoch that other batches lead to: images would be seen twice, or never."""
        if position["batch_index"] == 0:
            return
        for name, now in (("batch_size", self.recipe.batch_size), ("images_per_epoch", self.images_per_epoch)):
            if position[name] != now:
                raise CheckpointError(
                    f"the checkpoint lies within an epoch, after {position['batch_index']} batches with {name} "
                    f"{position[name]}, and it is {now} now: images would be seen twice or never; set it back, or "
                    "continue from the end of an epoch"
                )


def epoch_order(run: Run) -> Tensor:
    """Return the training images of the current epoch in their order, int64 [n].

    Raises:
        PluginError: a plugin's order is not int64 [n] of indices into the training split, or changes its length.
    """
    impl = run.hooks.only("epoch_order")
    size = len(run.data.train)
    if impl is None:
        return epoch_permutation(run.recipe.seed, run.epoch, size)
    before, run.batch_index = run.batch_index, 0  # the order is the epoch's, wherever in it a run resumes
    try:
        order: Tensor = impl.checked(Tensor, run)
    finally:
        run.batch_index = before
    if order.dim() != 1 or order.dtype != torch.int64 or not len(order):
        raise PluginError(f"{impl.plugin}, epoch_order: expected int64 [n] with n > 0, got {describe(order)}")
    if not (int(order.min()) >= 0 and int(order.max()) < size):
        raise PluginError(
            f"{impl.plugin}, epoch_order: indices go from {int(order.min())} to {int(order.max())}, and the training "
            f"split has the images 0 to {size - 1}"
        )
    length = getattr(run, "images_per_epoch", None)
    batches = run.batches["train"]
    kept = min(len(order), batches.count(len(order)) * batches.batch_size)  # less where drop_last leaves some out
    if length is not None and kept != length:
        raise PluginError(
            f"{impl.plugin}, epoch_order: epoch {run.epoch + 1} has {len(order)} images, and the run was built for "
            f"epochs of {length}; return as many in every epoch"
        )
    return order


def _plain(value: Any, owner: str, key: str) -> Any:
    """Return state as tensors and plain values; numpy's scalars become Python's.

    Raises:
        RunError: a value would make a checkpoint that cannot be loaded.
    """
    if type(value) in (type(None), bool, int, float, complex, str, Tensor, nn.Parameter, torch.Size):
        return value
    if isinstance(value, np.generic) and not isinstance(value, np.void):
        return value.item()
    if isinstance(value, Mapping):
        if any(type(k) not in (str, int, float, bool, tuple, type(None)) for k in value):
            raise RunError(f"{owner}: {key or 'it'} has a key that is no text or number; a checkpoint cannot hold it")
        items = {_plain(k, owner, key): _plain(v, owner, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
        if isinstance(value, OrderedDict):  # a module's state dict carries versions of its layers in `_metadata`
            ordered = OrderedDict(items)
            ordered.__dict__.update(vars(value))
            return ordered
        return items
    if isinstance(value, list | tuple | set):
        elements = [_plain(v, owner, f"{key}.{n}" if key else str(n)) for n, v in enumerate(value)]
        return elements if isinstance(value, list) else tuple(elements) if isinstance(value, tuple) else set(elements)
    if isinstance(value, torch.dtype | torch.device):
        return value
    kind = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
    raise RunError(
        f"{owner}: {key!r} is a {kind}, which a checkpoint cannot hold: it would be saved and never loaded; return "
        "tensors and plain values (numbers, text, lists, dicts)"
    )


def to_host(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the records with every scalar tensor as a number, after a single copy from the device."""
    checked = [{name: scalar(name, value) for name, value in record.items()} for record in records]
    tensors = [
        v.detach().to(widest_float(v.device)) for record in checked for v in record.values() if isinstance(v, Tensor)
    ]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return [{name: next(numbers) if isinstance(v, Tensor) else v for name, v in record.items()} for record in checked]


def scalar(name: str, value: Any) -> Any:
    """Return a number (one of numpy's as Python's) or a scalar tensor.

    Raises:
        PluginError: it is neither.
    """
    if isinstance(value, np.number):
        return value.item()
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0):
        return value
    raise PluginError(f"expected a number or a scalar tensor as {name!r}, got {describe(value)}")


def is_better(better: Better, new: float, old: float) -> bool:
    """Tell whether a metric's new value is better than the old one; what is not a number never is."""
    return new < old if better == "less" else new > old


def best_of(run: Run) -> dict[str, dict[str, float]]:
    """Return the best value of each metric and its epoch, as ``{name: {"value": ..., "epoch": ...}}``.

    Metrics that do not say what is better, and epochs that ended with weights or metrics that are not finite, are left
    out.
    """
    best: dict[str, dict[str, float]] = {}
    for row in run.history:
        if row["epoch"] in run.non_finite:
            continue
        for name, value in row.items():
            info = run.metric_info.get(name)
            if info is None or info.better is None or math.isnan(value):
                continue
            if name not in best or is_better(info.better, value, best[name]["value"]):
                best[name] = {"value": value, "epoch": row["epoch"]}
    return best


def is_best_epoch(run: Run, metric: str) -> bool:
    """Tell whether an epoch has just ended whose value of a metric is the best so far.

    Args:
        run: at a safe point.
        metric: a name as :meth:`Run.metric_key` takes it.
    """
    found = best_of(run).get(run.metric_key(metric), {}) if run.epoch_ended else {}
    return bool(found) and found["epoch"] == run.history[-1]["epoch"]


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable values, each shared one counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
