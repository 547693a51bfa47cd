"""Tiny real runs on fake data, for authors' tests. None of it needs a recipe file or an installed package."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.build import build_with
from trainkit.data import Data, TensorSplit
from trainkit.errors import RecipeError
from trainkit.hooks import CallWrapper, LoadedPlugin, register
from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import Recipe, from_dict, make_options
from trainkit.run import Run
from trainkit.session import fit

__all__ = [
    "assert_refuses",
    "build_from",
    "build_run",
    "fake_data",
    "from_recipe",
    "parameters_of",
    "record_hooks",
    "run_steps",
    "watch",
]


def fake_data(n: int = 32, classes: int = 4, size: int = 8) -> Data:
    """Return random uint8 images [n, 3, size, size] whose class shows in their brightness; half as many for testing."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> TensorSplit:
        targets = torch.arange(count) % classes
        noise = torch.randint(0, 64, (count, 3, size, size), generator=generator)
        return TensorSplit((noise + targets.view(-1, 1, 1, 1) * 40).to(torch.uint8), targets)

    names = tuple(f"class {i}" for i in range(classes))
    return Data(train=split(n), test=split(n // 2), classes=names, shape=(3, size, size))


@plugin
class _Defaults:
    """Fills the hooks that every run needs and that the plugins under test do not provide."""

    @hookimpl
    def data(self) -> Data:
        return fake_data()

    @hookimpl
    def model(self, run: Run) -> nn.Module:
        channels, _, _ = run.data.shape
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, len(run.data.classes)),
        )

    @hookimpl
    def loss(self) -> Any:
        return nn.functional.cross_entropy

    @hookimpl
    def optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)


def _part(hook: str) -> Any:
    """Return a plugin that implements one hook of the defaults."""
    return plugin(type(f"_Default{hook.title()}", (), {hook: vars(_Defaults)[hook]}))()


def build_from(plugins: Mapping[str, Any], recipe: Mapping[str, Any], wrap_call: CallWrapper | None = None) -> Run:
    """Build a run of plugin instances as :func:`build_run` does; `wrap_call` wraps every hook call."""
    needed = ("data", "model", "loss", "optimizer")
    found = {h for p in plugins.values() for h in needed if hasattr(getattr(p, h, None), "trainkit_impl")}
    defaults = {f"default_{h}": _part(h) for h in needed if h not in found}
    loaded = [LoadedPlugin(name, instance) for name, instance in {**defaults, **plugins}.items()]
    keys = {"name": "test", "epochs": 1, "batch_size": 8, "device": "cpu", **recipe}
    return build_with(Recipe(**keys), register(loaded, wrap_call=wrap_call))


def _fit(run: Run, run_dir: Path | None) -> Run:
    if run_dir is not None:
        fit(run, run_dir)
        return run
    with tempfile.TemporaryDirectory() as folder:
        fit(run, folder)
    return run


def build_run(plugins: Mapping[str, Any], **recipe: Any) -> Run:
    """Build a run of plugin instances; fake data, a small network, cross-entropy and SGD stand in for what is missing.

    Args:
        plugins: instances by name, in call order.
        recipe: keys of the recipe; one epoch with batches of 8 by default.
    """
    return build_from(plugins, recipe)


def run_steps(plugins: Mapping[str, Any], steps: int = 2, run_dir: Path | None = None, **recipe: Any) -> Run:
    """Train a tiny run for some steps, then evaluate it, and return it.

    Args:
        plugins: instances by name, in call order.
        steps: optimizer steps; the fake data give four an epoch.
        run_dir: where its files go; by default to a folder that is removed again.
        recipe: keys of the recipe, as for :func:`build_run`.
    """
    return _fit(build_from(plugins, {"max_steps": steps, "epochs": 1000, **recipe}), run_dir)


def record_hooks(plugins: Mapping[str, Any], steps: int = 2, **recipe: Any) -> list[tuple[str, str]]:
    """Train a tiny run as :func:`run_steps` does and return what fired, in order, as (hook, name of the plugin)."""
    fired: list[tuple[str, str]] = []

    def wrap_call(call: Any, name: str, hook: str) -> Any:
        def recorded(*args: Any) -> Any:
            fired.append((hook, name))
            return call(*args)

        return recorded if name in plugins else call

    _fit(build_from(plugins, {"max_steps": steps, "epochs": 1000, **recipe}, wrap_call), None)
    return fired


def parameters_of(run: Run) -> list[Tensor]:
    """Return copies of a run's parameters, for comparison."""
    return [p.detach().clone() for p in run.model.parameters()]


def watch(**functions: Callable[..., Any]) -> Any:
    """Return a plugin that calls a function in each of some hooks, to note what happens or to take part in it.

    ``seen = []; run_steps({"mine": Mine(), "watch": watch(step_end=lambda run: seen.append(run.step))})``. What a
    function raises reaches the test as it is.

    Args:
        functions: by the name of a hook; each takes those of the hook's arguments that it needs, without ``self``.
    """
    return plugin(type("Watch", (), {hook: staticmethod(hookimpl(f)) for hook, f in functions.items()}))()


def from_recipe(cls: type, /, **options: Any) -> Any:
    """Return an instance of a plugin's class as a recipe with these options makes it.

    Args:
        cls: the plugin's class.
        options: its options, as a recipe gives them.

    Raises:
        RecipeError: an option is unknown or wrong.
    """
    name = _name(cls)
    recipe = from_dict({"name": "test", "epochs": 1, "batch_size": 8, "plugins": {name: options}})
    return make_options(recipe, name, cls)


def assert_refuses(cls: type, key: str, /, *values: Any, **options: Any) -> None:
    """Check that a plugin refuses values of an option, each with an error that names the option as recipes do.

    Args:
        cls: the plugin's class.
        key: the option.
        values: what is refused, one at a time; without any, that the option is left out.
        options: the other options that it needs, as a recipe gives them.
    """
    for given in [{**options, key: value} for value in values] or [options]:
        try:
            from_recipe(cls, **given)
        except RecipeError as error:
            if f"plugins.{_name(cls)}.{key}" not in str(error):
                raise AssertionError(f"{cls.__name__} with {given}: the error does not name it: {error}") from error
        else:
            raise AssertionError(f"{cls.__name__} takes {given}")


def _name(cls: type) -> str:
    return cls.__module__.removeprefix("trainkit_")
