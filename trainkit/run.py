"""Run: everything that a hook may see, and how a recipe becomes one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import attrs
import numpy as np
import torch
from attrs import field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainkit.data import Batch, Batches, Data
from trainkit.errors import CheckpointError, PluginError, RecipeError
from trainkit.hooks import CallWrapper, Hooks, load_plugins
from trainkit.recipe import Recipe
from trainkit.rng import stream, torch_seed
from trainkit.transforms import Pipeline, Transform

if TYPE_CHECKING:
    from rich.console import Console

    from trainkit.rundir import RunDir

__all__ = ["Run", "Schedule", "best_of", "build", "count_parameters", "is_better", "to_host"]


class Schedule(NamedTuple):
    """A scheduler and when it steps: after every epoch or after every optimizer step."""

    scheduler: LRScheduler
    unit: Literal["epoch", "step"]


@attrs.define(eq=False, kw_only=True)
class Run:
    """One run. Plugins read it; what they may change is what hooks return, ``stop`` and ``log``.

    The attributes from `data` to `schedules` exist as soon as the hook that provides them was called.
    """

    recipe: Recipe
    hooks: Hooks
    device: torch.device
    dir: RunDir | None = None  #: where this run writes; exists from ``fit_start`` to ``fit_end``

    data: Data = field(init=False)
    batches: dict[str, Batches] = field(init=False)  #: by split
    transforms: dict[str, Pipeline] = field(init=False)  #: by split
    model: nn.Module = field(init=False)  #: the network that is trained, counted and saved
    forward: nn.Module = field(init=False)  #: what is called: the network, perhaps compiled or wrapped
    loss: Callable[[Tensor, Tensor], Tensor] = field(init=False)
    optimizer: Optimizer = field(init=False)
    schedules: list[Schedule] = field(init=False)
    context: AbstractContextManager[Any] = field(init=False)  #: surrounds every forward pass

    batches_per_step: int = 1  #: set by a plugin that accumulates gradients, before schedulers are built
    epoch: int = 0  #: epochs completed
    step: int = 0  #: optimizer steps completed
    batch_index: int = 0  #: training batches completed in this epoch
    split: Literal["train", "test"] = "train"  #: what the current batch belongs to
    batch: Batch | None = None  #: the current batch, after all transforms
    history: list[dict[str, float]] = field(factory=list)  #: the metrics of each completed epoch
    seconds: defaultdict[str, float] = field(factory=lambda: defaultdict(float))  #: wall time by part
    images: int = 0  #: training images seen
    provenance: dict[str, Any] = field(factory=dict)  #: plugins, environment and data, as in the run directory
    resumed: list[dict[str, Any]] = field(factory=list)  #: where the run was continued, and what was changed then
    stop_reason: str | None = None  #: why the run is about to stop at the next safe point
    exit_code: int = 0  #: of the command that trains, when the run was asked to stop
    pending: list[dict[str, Any]] = field(factory=list)  #: records not yet copied to the host
    _console: Console | None = field(default=None, alias="console")

    @property
    def epochs(self) -> int:
        """Epochs of the whole run."""
        return self.recipe.epochs

    @property
    def batches_per_epoch(self) -> int:
        """Training batches an epoch."""
        return len(self.batches["train"])

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; fewer than batches where gradients are accumulated."""
        return -(-self.batches_per_epoch // self.batches_per_step)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the network sees, after the training transforms."""
        return self.data.shape[0], *self.transforms["train"].sizes(self.data.shape[1:])[-1]

    @property
    def finished(self) -> bool:
        """Whether all epochs, or the recipe's ``max_steps``, are done."""
        limit = self.recipe.max_steps
        return self.epoch >= self.recipe.epochs or (limit is not None and self.step >= limit)

    @property
    def console(self) -> Console:
        """Where plugins print for people."""
        if self._console is None:
            from rich.console import Console

            self._console = Console()
        return self._console

    def rng(self, purpose: str) -> np.random.Generator:
        """Return the random stream of one purpose at the current training batch (see :mod:`trainkit.rng`)."""
        return stream(self.recipe.seed, purpose, self.epoch, self.batch_index)

    def compute_loss(self, batch: Batch, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Return logits and mean loss of a batch, within the run's contexts.

        Args:
            batch: float images and targets.
            model: what to call in place of ``run.forward``.
        """
        with self.context:
            output = (self.forward if model is None else model)(batch.images)
            return output, self.loss(output, batch.targets)

    def stop(self, reason: str, exit_code: int = 0) -> None:
        """Ask the run to stop at its next safe point; the first reason is kept.

        Args:
            reason: for people, and for ``result.json``.
            exit_code: of the command; other than 0 where the run should be continued: 143 is what a SIGTERM gives.
        """
        if self.stop_reason is None:
            self.stop_reason, self.exit_code = reason, exit_code

    def log(self, values: Mapping[str, Tensor | float]) -> None:
        """Record values at the current step; scalar tensors stay on the device until many are copied at once.

        Args:
            values: numbers or scalar tensors by name. A tensor must not be changed in place afterwards.
        """
        self.pending.append({"epoch": self.epoch + 1, "step": self.step, **values})

    def flush_log(self) -> None:
        """Hand pending records to the ``log`` hook, after one copy from the device for all of them."""
        pending, self.pending = self.pending, []
        fire = self.hooks.notify("log")
        if fire is not None:
            for record in to_host(pending):
                fire(self, record)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to continue exactly from a safe point: tensors and plain values only."""
        self.flush_log()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedules": [s.scheduler.state_dict() for s in self.schedules],
            "plugins": {
                name: {"version": active.version, "state": active.state_dict()}
                for name, active in self.hooks.plugins.items()
                if hasattr(active.instance, "state_dict")
            },
            "position": {"epoch": self.epoch, "step": self.step, "batch_index": self.batch_index},
            "history": self.history,
            "random": torch.get_rng_state(),
            "cost": {"images": self.images, "seconds": dict(self.seconds)},
            "recipe": self.recipe.to_dict(),
            "provenance": self.provenance,
            "resumed": self.resumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, on a run that was built from the same recipe.

        Raises:
            CheckpointError: the state is of another model, optimizer or set of plugins.
        """
        try:
            self._load(state)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint does not fit the recipe: {str(error).splitlines()[0]}") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for p, values in self.optimizer.state.items():  # fused kernels walk memory: its layout must be the parameter's
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                    values[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.scheduler.load_state_dict(saved)
        for name, saved in state["plugins"].items():
            if name in self.hooks.plugins:
                self.hooks.plugins[name].load_state_dict(saved["state"])
        self.epoch = state["position"]["epoch"]
        self.step = state["position"]["step"]
        self.batch_index = state["position"]["batch_index"]
        self.history = [dict(row) for row in state["history"]]
        self.images = state["cost"]["images"]
        self.seconds.update(state["cost"]["seconds"])
        self.resumed = list(state["resumed"])
        torch.set_rng_state(state["random"])


class _Nested(AbstractContextManager[None]):
    """Several context managers entered as one, again and again."""

    def __init__(self, contexts: list[AbstractContextManager[Any]]) -> None:
        self.contexts = contexts

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


def to_host(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the records with every scalar tensor as a number, after a single copy from the device."""
    tensors = [v.detach().double() for record in records for v in record.values() if isinstance(v, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return [{k: next(numbers) if isinstance(v, Tensor) else v for k, v in record.items()} for record in records]


def is_better(metric: str, new: float, old: float) -> bool:
    """Tell whether a metric's new value is better: less for losses and errors, greater for all others."""
    return new < old if metric.endswith(("loss", "error")) else new > old


def best_of(history: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the best value of each test metric and its epoch, as ``{name: {"value": ..., "epoch": ...}}``."""
    best: dict[str, dict[str, float]] = {}
    for row in history:
        for name, value in row.items():
            if not name.startswith("test_") or math.isnan(value):
                continue
            if name not in best or is_better(name, value, best[name]["value"]):
                best[name] = {"value": value, "epoch": row["epoch"]}
    return best


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable values, each shared one counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build(recipe: Recipe, *, console: Console | None = None, instrument: CallWrapper | None = None) -> Run:
    """Build all that a recipe describes, ready for :func:`trainkit.fit`. Nothing is written.

    Args:
        recipe: from :func:`trainkit.load_recipe`.
        console: where plugins print for people; by default the standard output.
        instrument: wraps every hook call, for profiling and tracing.

    Raises:
        TrainkitError: the recipe, a plugin or the data are wrong.
    """
    return build_with(recipe, load_plugins(recipe, instrument), console)


def build_with(recipe: Recipe, hooks: Hooks, console: Console | None = None) -> Run:
    """Build a run from plugins that are already active, wherever they came from."""
    run = Run(recipe=recipe, hooks=hooks, device=_device(recipe), console=console)

    run.data = hooks.required("data", Data)(run)
    sizes = {"train": recipe.batch_size, "test": recipe.test_batch_size or recipe.batch_size}
    run.batches = {
        split: Batches(getattr(run.data, split), size, run.device, run.data.workers) for split, size in sizes.items()
    }
    run.transforms = {split: _pipeline(run, split) for split in sizes}

    torch.manual_seed(torch_seed(recipe.seed, "model"))
    model = hooks.required("model", nn.Module)(run)
    if change := hooks.chain("transform_model", nn.Module):
        model = change(run, model)
    _expect_parameters(recipe, model)
    run.model = model.to(run.device)
    wrap = hooks.chain("wrap_model", nn.Module)
    run.forward = wrap(run, run.model) if wrap else run.model
    if strange := {*run.forward.parameters()} - {*run.model.parameters()}:
        raise PluginError(
            f"{hooks.named('wrap_model')}: what is called has {len(strange)} parameters that the network lacks; "
            "nothing would train or save them; add them in transform_model"
        )

    loss = hooks.required("loss", Callable)(run)  # type: ignore[arg-type]
    run.loss = hooks.implementations("loss")[0].guarded(loss)
    params = [p for p in run.model.parameters() if p.requires_grad]
    run.optimizer = hooks.required("optimizer", Optimizer)(run, params)
    check_optimizer(run, hooks.named("optimizer"))
    for impl in hooks.implementations("transform_optimizer"):
        run.optimizer = impl.checked(Optimizer, run, run.optimizer)
        check_optimizer(run, f"{impl.active}, transform_optimizer")
    run.schedules = [_schedule(impl, s) for impl, s in hooks.collect("scheduler", Schedule, run, run.optimizer)]
    contexts = [c for _, c in hooks.collect("contexts", AbstractContextManager, run)]
    run.context = nullcontext() if not contexts else contexts[0] if len(contexts) == 1 else _Nested(contexts)
    return run


def check_optimizer(run: Run, who: str) -> None:
    """Hold the optimizer's parameters against the network's trainable ones.

    Raises:
        PluginError: they are not the same; the message begins with `who`.
    """
    held = {p for group in run.optimizer.param_groups for p in group["params"]}
    trained = {p for p in run.model.parameters() if p.requires_grad}
    if held != trained:
        raise PluginError(
            f"{who}: the optimizer's parameters are not the network's: {len(trained - held)} trainable ones are "
            f"missing and {len(held - trained)} strange ones are there; give it exactly the parameters offered"
        )


def _device(recipe: Recipe) -> torch.device:
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        return torch.empty(0, device=device).device  # with its number: `cuda` is the current GPU
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"{recipe.where}: device: {name!r} cannot be used: {reason}; `auto` takes what there is"
        ) from error


def _pipeline(run: Run, split: str) -> Pipeline:
    steps: list[tuple[str, Transform]] = []
    for impl, result in run.hooks.collect("transforms", (Transform, list), run, split):
        for number, step in enumerate(result if isinstance(result, list) else [result]):
            if not isinstance(step, Transform):
                raise impl.wrong(step, Transform)
            purpose = f"{impl.active.name}/{split}" + (f"/{number}" if number else "")
            steps.append((purpose, step))

    def failed(purpose: str, error: Exception) -> Exception:
        return run.hooks.plugins[purpose.partition("/")[0]].failed("its transform", error, run.hooks.failure)

    pipeline = Pipeline(steps, failed)
    pipeline.sizes(run.data.shape[1:])  # a transform that does not fit says so now, not at the first batch
    return pipeline


def _schedule(impl: Any, schedule: Schedule) -> Schedule:
    if schedule.unit not in ("epoch", "step"):
        raise PluginError(f"{impl.active}, scheduler: unit must be 'epoch' or 'step', not {schedule.unit!r}")
    if isinstance(schedule.scheduler, ReduceLROnPlateau) or not isinstance(schedule.scheduler, LRScheduler):
        raise impl.wrong(schedule.scheduler, LRScheduler)
    return schedule


def _expect_parameters(recipe: Recipe, model: nn.Module) -> None:
    expected = recipe.expect.get("parameters")
    found = count_parameters(model)
    if expected is not None and found != expected:
        raise RecipeError(
            f"{recipe.where}: expect.parameters: the recipe expects {expected:,.0f} parameters and its model has "
            f"{found:,}; correct the model's options, or set expect.parameters={found}"
        )
