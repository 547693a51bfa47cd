"""From a recipe to a run: every part of it built in order, checked, and ready for its first step."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainkit import numerics, provenance
from trainkit.data import Batches, Data
from trainkit.errors import PluginError, RecipeError
from trainkit.hooks import CallWrapper, Hooks, Implementation, load_plugins
from trainkit.plugin import declared, is_observer, watches_in_every_process
from trainkit.processes import Processes
from trainkit.recipe import Recipe
from trainkit.registry import base_name
from trainkit.rng import torch_seed
from trainkit.run import Run, Schedule, count_parameters, epoch_order
from trainkit.transforms import Pipeline, Transform

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["build", "build_network", "build_with", "check_optimizer"]

# Networks draw their weights from torch's global generator, so two threads must not build at once.
_GENERATOR = threading.Lock()


def build(
    recipe: Recipe,
    *,
    plugins: Mapping[str, Any] | None = None,
    console: Console | None = None,
    wrap_call: CallWrapper | None = None,
    dry: bool = False,
) -> Run:
    """Build all that a recipe describes, ready for :func:`trainkit.fit`. Nothing is written.

    Args:
        recipe: from :func:`trainkit.load_recipe`.
        plugins: instances by name, as one writes them in a notebook: one that the recipe lists takes that place, any
            other comes last, or before the first that its class says it must precede. The record has the content of the
            module that defines it, where that is a file, and its options.
        console: where plugins print for people; by default the standard output.
        wrap_call: wraps every hook call, for profiling and tracing.
        dry: whether the run is only tried, so that nothing may be fetched.

    Raises:
        TrainkitError: the recipe, a plugin or the data are wrong.
    """
    recipe = _with_instances(recipe, plugins or {})
    return build_with(recipe, load_plugins(recipe, wrap_call, plugins), console, dry=dry)


def _with_instances(recipe: Recipe, plugins: Mapping[str, Any]) -> Recipe:
    """Return the recipe that lists instances with their options.

    Raises:
        PluginError: one is a class, or no plugin.
    """
    listed = dict(recipe.plugins)
    for name, instance in plugins.items():
        if isinstance(instance, type) or not attrs.has(type(instance)):
            raise PluginError(
                f"build(plugins={{{name!r}: ...}}): expected an instance of a class decorated with @plugin"
            )
        later = declared(type(instance), "before")
        place = next((n for n, other in enumerate(listed) if base_name(other) in later), len(listed))
        items = [item for item in listed.items() if item[0] != name]
        at = list(listed).index(name) if name in listed else place
        listed = dict([*items[:at], (name, provenance.options_of(instance)), *items[at:]])
    return attrs.evolve(recipe, plugins=listed)


def build_with(recipe: Recipe, hooks: Hooks, console: Console | None = None, *, dry: bool = False) -> Run:
    """Build a run from plugins that are already loaded, wherever they came from."""
    run = Run(recipe=recipe, hooks=hooks, device=torch.device("cpu"), console=console, dry=dry)
    with hooks.blaming(PluginError):
        run.processes = hooks.one("processes", Processes, default=_alone)(run)
    if run.rank > 0:  # who only watches does so in the first process, which alone prints
        hooks.absent = frozenset(name for name, plugin in hooks.plugins.items() if _watches_once(plugin.instance))
        run.silence()
    run.device = _device(recipe, run.processes)
    with hooks.blaming(PluginError):
        _build_data(run)
        _build_model(run)
        _check_shapes(run)
        _build_training(run)
        hooks.notify("built")(run)
        check_optimizer(run, hooks.named("built"))
    parts = {name: getattr(run, name) for name in provenance.PARTS}
    run.built = provenance.Built(parts, provenance.contents(run))  # what is replaced from here on is recorded
    return run


def _alone(run: Run) -> Processes:
    """Return this process alone.

    Raises:
        RecipeError: it was started as one of several.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and world.isdigit() and int(world) > 1:
        raise RecipeError(
            f"{run.recipe.where}: this is one of {world} processes (WORLD_SIZE), and the recipe lists no plugin that "
            "joins them, so each would train a run of its own; list one, such as plugins.ddp={}"
        )
    return Processes()


def _watches_once(instance: Any) -> bool:
    cls = type(instance)
    return is_observer(cls) and not watches_in_every_process(cls)


def build_network(recipe: Recipe, hooks: Hooks, data: Data, console: Console | None = None) -> Run:
    """Build what maps images to outputs, for images that are described instead of there: no data set is opened.

    Args:
        recipe: the recipe.
        hooks: its plugins. Their hooks ``data`` and ``transform_data`` are not called.
        data: classes and shape.
        console: where plugins print for people.

    Returns:
        A run with transforms, model and contexts, and nothing to train with.
    """
    run = Run(recipe=recipe, hooks=hooks, device=_device(recipe, Processes()), console=console, dry=True)
    with hooks.blaming(PluginError):
        run.data = data
        run.transforms = {name: _pipeline(run, name) for name in data.splits}
        _build_model(run)
        _build_contexts(run)
    return run


def _build_data(run: Run) -> None:
    """Data, batches, the length of an epoch, and the image transforms of every split."""
    recipe, hooks = run.recipe, run.hooks
    data = _make_one(hooks, "data", Data, run)
    run.data = _make_chain(hooks, "transform_data", Data, run, data)
    owner = hooks.implementations("data")[0].plugin
    owner.made.extend(("data", split) for split in run.data.splits.values())
    run.batches = {}
    for name, split in run.data.splits.items():
        training = name == "train"
        size = recipe.batch_size if training else recipe.test_batch_size or recipe.batch_size
        drop_last = training and recipe.drop_last
        batches = Batches(
            split,
            size,
            run.device,
            run.data.workers,
            name=name,
            seed=recipe.seed,
            drop_last=drop_last,
            processes=run.processes,
        )
        run.batches[name] = batches
        owner.made.append(("data", batches))
    images = len(epoch_order(run))
    run.images_per_epoch = images // recipe.batch_size * recipe.batch_size if recipe.drop_last else images
    if run.images_per_epoch == 0:
        raise RecipeError(
            f"{recipe.where}: batch_size: {recipe.batch_size} is more than the {images} training images of an epoch, "
            "and drop_last leaves nothing; lower it, or set drop_last: false"
        )
    last = run.images_per_epoch % recipe.batch_size or recipe.batch_size
    if min(last, recipe.batch_size) < run.world:
        raise RecipeError(
            f"{recipe.where}: batch_size: the last training batch has {last} images for {run.world} processes; set "
            "drop_last: true, or another batch_size, which counts the images of all processes"
        )
    run.batches_per_step = hooks.one("batches_per_step", int, default=lambda run: 1)(run)
    if run.batches_per_step < 1:
        raise PluginError(f"{hooks.named('batches_per_step')}: expected at least 1, got {run.batches_per_step}")
    run.transforms = {name: _pipeline(run, name) for name in run.data.splits}


def _pipeline(run: Run, split: str) -> Pipeline:
    steps: list[tuple[str, Transform]] = []
    for impl, result in run.hooks.collect("transforms", (Transform, list), run, split):
        for number, step in enumerate(result if isinstance(result, list) else [result]):
            if not isinstance(step, Transform):
                raise impl.wrong(step, Transform)
            impl.plugin.made.append(("transforms", step))
            steps.append((f"{impl.plugin.name}/{split}" + (f"/{number}" if number else ""), step))
    pipeline = Pipeline(steps)
    pipeline.sizes(run.data.shape[1:])  # a transform that does not fit the image size says so now
    return pipeline


def _build_model(run: Run) -> None:
    """The network, on its device, and what is called in its place."""
    hooks = run.hooks
    with _GENERATOR:
        torch.manual_seed(torch_seed(run.recipe.seed, "model"))
        model = _make_one(hooks, "model", nn.Module, run)
        model = _make_chain(hooks, "transform_model", nn.Module, run, model)
    run.parameters = count_parameters(model)
    expected = run.recipe.expect.get("parameters")
    if expected is not None and run.parameters != expected:
        raise RecipeError(
            f"{run.recipe.where}: expect.parameters: the recipe expects {expected:,.0f} parameters and its model has "
            f"{run.parameters:,}; correct the model's options, or set expect.parameters={run.parameters}"
        )
    run.model = model.to(run.device)
    run.forward = _make_chain(hooks, "wrap_model", nn.Module, run, run.model)
    if strange := {*run.forward.parameters()} - {*run.model.parameters()}:
        raise PluginError(
            f"{hooks.named('wrap_model')}: what is called has {len(strange)} parameters that the network lacks; "
            "nothing would train or save them; add them in transform_model"
        )


def _build_training(run: Run) -> None:
    """Loss, optimizer, schedulers and contexts."""
    hooks = run.hooks
    run.loss = _make_one(hooks, "loss", Callable, run)
    params = [p for p in run.model.parameters() if p.requires_grad]
    run.optimizer = _make_one(hooks, "optimizer", Optimizer, run, params)
    check_optimizer(run, hooks.named("optimizer"))
    for impl in hooks.implementations("transform_optimizer"):
        run.optimizer = impl.make(Optimizer, run, run.optimizer)
        check_optimizer(run, f"{impl.plugin}, transform_optimizer")
    run.schedules = []
    for impl, schedule in hooks.collect("scheduler", Schedule, run, run.optimizer):
        _check_schedule(impl, schedule)
        impl.plugin.made.append(("scheduler", schedule.scheduler))
        run.schedules.append(schedule)
    _build_contexts(run)


def _build_contexts(run: Run) -> None:
    contexts = [context for _, context in run.hooks.collect("contexts", AbstractContextManager, run)]
    for context in contexts:
        numerics.check_context(run.recipe, context)
    run.context = nullcontext() if not contexts else contexts[0] if len(contexts) == 1 else _Nested(contexts)


def _make_one(hooks: Hooks, hook: str, returns: Any, *args: Any) -> Any:
    hooks.one(hook)  # complains where no plugin provides it
    impl = hooks.only(hook)
    assert impl is not None
    return impl.make(returns, *args)


def _make_chain(hooks: Hooks, hook: str, returns: type, run: Run, value: Any) -> Any:
    for impl in hooks.implementations(hook):
        value = impl.make(returns, run, value)
    return value


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


def check_optimizer(run: Run, who: str) -> None:
    """Hold the optimizer's parameters against the network's; it may hold frozen ones.

    Raises:
        PluginError: a trainable parameter is missing, or one is not the network's; the message begins with `who`.
    """
    held = {p for group in run.optimizer.param_groups for p in group["params"]}
    network = {*run.model.parameters()}
    missing = {p for p in network if p.requires_grad} - held
    strange = held - network
    if missing or strange:
        raise PluginError(
            f"{who}: the optimizer's parameters are not the network's: {len(missing)} trainable ones are missing and "
            f"{len(strange)} strange ones are there; give it exactly the parameters offered"
        )


def _device(recipe: Recipe, processes: Processes) -> torch.device:
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and recipe.numerics == "native" else "cpu"
    if name == "cuda" and processes.world > 1:
        name = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(name)
        device = torch.empty(0, device=device).device  # with its number: `cuda` is the current GPU
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"{recipe.where}: device: {name!r} cannot be used: {reason}; `auto` takes the first GPU, or the CPU"
        ) from error
    numerics.check(recipe, device)
    return device


def _check_schedule(impl: Implementation, schedule: Schedule) -> None:
    if schedule.unit not in ("epoch", "step"):
        raise PluginError(f"{impl.plugin}, scheduler: unit must be 'epoch' or 'step', not {schedule.unit!r}")
    if not isinstance(schedule.scheduler, LRScheduler):
        raise impl.wrong(schedule.scheduler, LRScheduler)
    looks = isinstance(schedule.scheduler, ReduceLROnPlateau)
    if looks and (schedule.metric is None or schedule.unit != "epoch"):
        raise PluginError(
            f"{impl.plugin}, scheduler: ReduceLROnPlateau follows a metric after epochs: "
            "Schedule(scheduler, 'epoch', metric='loss')"
        )


def _check_shapes(run: Run) -> None:
    """Pass every shape that the run will meet through the network, on torch's meta device, where nothing is computed.

    Raises:
        RecipeError: image sizes differ between splits, or the network cannot take a batch that will come.
    """
    recipe = run.recipe
    shapes = {name: run.shape_of(name) for name in run.data.splits}
    for name, shape in shapes.items():
        if shape != shapes["train"] and not recipe.mixed_sizes:
            raise RecipeError(
                f"{recipe.where}: images of the {name} split reach the network with {_size(shape)} pixels, and those "
                f"of the training split with {_size(shapes['train'])}; resize both to one size, or set "
                "mixed_sizes: true if that is meant"
            )
    try:
        trial = copy.deepcopy(run.model).to("meta")
    except Exception:  # a network that cannot be copied is met by its first batch
        return
    last = run.images_per_epoch % recipe.batch_size
    for name, shape in shapes.items():
        training = name == "train"
        size = recipe.batch_size if training else recipe.test_batch_size or recipe.batch_size
        count = run.images_per_epoch if training else len(run.data.splits[name])
        for n in dict.fromkeys([min(size, count), last if training and last else min(size, count)]):
            # Of what processes share, the least part is what fails first.
            error = _trial_error(trial, run.model, (max(1, n // run.world), *shape), training=training)
            if error is None:
                continue
            which = f"a {'training' if training else name} batch of {n} images of {_size(shape)} pixels"
            cure = "check the sizes that the transforms make"
            if training and n == last:
                which, cure = f"the last training batch, of {n} images,", "set drop_last: true, or another batch_size"
            elif not training and shape != shapes["train"]:
                cure = f"give the {name} split the size of the training split"
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise RecipeError(f"{recipe.where}: the network cannot take {which}: {said}; {cure}") from error


def _trial_error(trial: nn.Module, model: nn.Module, shape: tuple[int, ...], *, training: bool) -> Exception | None:
    """Return what a forward pass of this shape raises, or None where it works or cannot be told without real data."""
    trial.train(training)
    try:
        with torch.no_grad():
            trial(torch.empty(shape, device="meta"))
    except Exception:  # perhaps only because the network reads its data, which the meta device has not
        real = copy.deepcopy(model).train(training)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        try:
            devices = [device] if device.type == "cuda" else []
            with _GENERATOR, torch.no_grad(), torch.random.fork_rng(devices=devices):
                real(torch.zeros(shape, device=device))
        except Exception as error:
            return error
    return None


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]}x{shape[2]}"
