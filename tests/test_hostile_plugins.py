"""Hostile and clumsy plugins: each is named with its distribution, version and hook, and told what was expected."""

import json
import sys
import textwrap
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

from trainkit import Schedule, __version__, build, fit
from trainkit.build import build_with
from trainkit.errors import PluginError, RunError, TrainkitError
from trainkit.hooks import LoadedPlugin, register
from trainkit.hookspecs import PHASES, Build
from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import Recipe, from_dict
from trainkit.registry import Installed
from trainkit.testing import build_run

HOOKS = {name: spec.trainkit_kind for phase in PHASES for name, spec in vars(phase).items() if name[0] != "_"}
NAMED = "plugin 'hostile' (acme-hostile 1.2)"


each_hook = pytest.mark.parametrize("hook", HOOKS)


def installed(name, distribution, version):
    return Installed(name, distribution, version, "", "", EntryPoint(name, "", "trainkit.plugins"))


def plugin_with(**hooks):
    """Make a plugin that implements hooks by functions without arguments."""

    def method(name, function):
        def made(self):
            return function()

        made.__code__ = made.__code__.replace(co_name=name)
        return hookimpl(made)

    return plugin(type("Hostile", (), {name: method(name, function) for name, function in hooks.items()}))()


def build_hostile(instance, **recipe):
    """Build a tiny run with an instance as the plugin of an installed distribution."""
    parts = [a for name, a in build_run({}).hooks.plugins.items() if not hasattr(instance, name.partition("_")[2])]
    hostile = LoadedPlugin("hostile", instance, installed("hostile", "acme-hostile", "1.2"))
    keys = {"name": "tiny", "epochs": 1, "batch_size": 8, "device": "cpu", **recipe}
    return build_with(Recipe(**keys), register([*parts, hostile]))


def fail():
    raise ZeroDivisionError("by zero")


@each_hook
def test_a_hook_that_raises(hook, tmp_path):
    with pytest.raises(TrainkitError) as caught:
        fit(build_hostile(plugin_with(**{hook: fail})), tmp_path / "run")
    assert str(caught.value) == f"{NAMED} failed in {hook}: ZeroDivisionError: by zero"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    if hook in vars(Build) or hook == "fit_start":  # nothing has begun
        assert type(caught.value) is PluginError
        assert list(tmp_path.iterdir()) == []
    else:
        assert type(caught.value) is RunError
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        if hook == "result_written":  # too late to change it
            assert result["status"] == "completed"
            return
        assert (result["status"], result["reason"]) == ("failed", f"RunError: {caught.value}")


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def scheduler():
    return torch.optim.lr_scheduler.StepLR(optimizer(), 1)


@pytest.mark.parametrize(
    ("hook", "returned", "expected"),
    [
        ("data", lambda: "images", "expected Data, got str"),
        ("transforms", lambda: "flip", "expected Transform or list, got str"),
        ("transforms", lambda: ["flip"], "expected Transform, got str"),
        ("model", lambda: None, "expected Module, got NoneType"),
        ("transform_model", lambda: None, "expected Module, got NoneType"),
        ("wrap_model", lambda: torch.relu, "expected Module, got builtin_function_or_method"),
        ("loss", lambda: 0.5, "expected Callable, got float"),
        ("optimizer", lambda: [], "expected Optimizer, got list"),
        ("transform_optimizer", lambda: None, "expected Optimizer, got NoneType"),
        ("scheduler", scheduler, "expected Schedule, got StepLR"),
        ("scheduler", lambda: Schedule("step", "epoch"), "expected LRScheduler, got str"),
        ("scheduler", lambda: Schedule(scheduler(), "batch"), "unit must be 'epoch' or 'step', not 'batch'"),
        ("contexts", lambda: "autocast", "expected AbstractContextManager, got str"),
        ("transform_batch", lambda: None, "expected Batch, got NoneType"),
        ("transform_data", lambda: None, "expected Data, got NoneType"),
        ("transform_loss", lambda: 1.0, "expected Tensor, got float"),
        ("epoch_order", lambda: [0, 1], "expected Tensor, got list"),
        ("batches_per_step", lambda: 0.5, "expected int, got float"),
        ("provenance", lambda: "files", "expected dict, got str"),
        ("eval_model", lambda: "ema", "expected Module or None, got str"),
        ("metrics", lambda: 0.5, "expected dict, got float"),
        ("metrics", lambda: {"loss": "high"}, "expected a number or a scalar tensor as 'loss', got str"),
        (
            "metrics",
            lambda: {"loss": torch.zeros(2)},
            "expected a number or a scalar tensor as 'loss', got float32 [2]",
        ),
    ],
)
def test_a_hook_that_returns_the_wrong_type(hook, returned, expected, tmp_path):
    with pytest.raises(TrainkitError) as caught:
        fit(build_hostile(plugin_with(**{hook: returned})), tmp_path)
    assert str(caught.value) == f"{NAMED}, {hook}: {expected}"


@each_hook
def test_a_misspelt_hook(hook):
    with pytest.raises(PluginError) as caught:
        build_hostile(plugin_with(**{hook[:-1]: fail}))
    assert str(caught.value) == f"{NAMED}: {hook[:-1]!r} is not a hook; did you mean {hook!r}?"


@pytest.mark.parametrize("hook", [name for name, kind in HOOKS.items() if kind == "one"])
def test_a_second_provider(hook):
    pair = [("hostile", "acme-hostile", "1.2"), ("other", "acme-other", "2.0")]
    with pytest.raises(PluginError) as caught:
        register([LoadedPlugin(origin[0], plugin_with(**{hook: fail}), installed(*origin)) for origin in pair])
    assert str(caught.value) == (
        f"hook {hook!r} takes one provider, and {NAMED} and plugin 'other' (acme-other 2.0) both provide it; "
        "drop one: `other: false`"
    )


@plugin
class Optimizer:
    """Gives an optimizer over other parameters than those it was asked for."""

    change: Any

    @hookimpl
    def optimizer(self, params):
        return torch.optim.SGD(self.change(params), lr=0.1)


@plugin
class Drops:
    """Takes a parameter away from the optimizer in one of its hooks."""

    hook: str

    def drop(self, hook, optimizer):
        if hook == self.hook:
            optimizer.param_groups[0]["params"].pop()
        return optimizer

    @hookimpl
    def transform_optimizer(self, optimizer):
        return self.drop("transform_optimizer", optimizer)

    @hookimpl
    def fit_start(self, run):
        self.drop("fit_start", run.optimizer)


@plugin
class Replaces:
    """Puts new layers into the network when the optimizer has the old ones."""

    @hookimpl
    def fit_start(self, run):
        run.model[-1] = torch.nn.Linear(8, 4)


@plugin
class Wraps:
    """Calls a network with parameters of its own."""

    @hookimpl
    def wrap_model(self, model):
        return torch.nn.Sequential(model, torch.nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("instance", "hook"),
    [
        (Optimizer(change=lambda params: params[1:]), "optimizer"),
        (Optimizer(change=lambda params: [torch.nn.Parameter(p.clone()) for p in params]), "optimizer"),
        (Optimizer(change=lambda params: [*params, torch.nn.Parameter(torch.zeros(1))]), "optimizer"),
        (Drops(hook="transform_optimizer"), "transform_optimizer"),
        (Drops(hook="fit_start"), "fit_start"),
        (Replaces(), "fit_start"),
        (Wraps(), "wrap_model"),
    ],
    ids=["drops", "copies", "adds", "transform", "fit_start", "network", "wrapped"],
)
def test_parameters_changed_behind_the_core(instance, hook, tmp_path):
    with pytest.raises((PluginError, RunError)) as caught:
        fit(build_hostile(instance), tmp_path)
    message = str(caught.value)
    assert NAMED in message
    assert hook in message
    assert "parameters" in message


@pytest.mark.parametrize("hook", ["model", "step_end"])
def test_a_hook_that_exits(hook, tmp_path):
    with pytest.raises(TrainkitError) as caught:
        fit(build_hostile(plugin_with(**{hook: sys.exit})), tmp_path)
    assert NAMED in str(caught.value)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Installs a distribution with one plugin, `hostile`."""

    def install(module, requires="trainkit>=0.1"):
        info = tmp_path / "acme_hostile-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: acme-hostile\nVersion: 1.2\nRequires-Dist: {requires}\n"
        )
        (info / "entry_points.txt").write_text(f"[trainkit.plugins]\nhostile = {tmp_path.name}:Hostile\n")
        (tmp_path / f"{tmp_path.name}.py").write_text(textwrap.dedent(module))
        monkeypatch.syspath_prepend(tmp_path)
        return from_dict({"name": "r", "epochs": 1, "batch_size": 8, "plugins": {"hostile": None}})

    return install


def test_a_plugin_that_needs_a_newer_trainkit(site):
    recipe = site("from trainkit.plugin import what_is_not_there_yet", requires="trainkit>=9,<10")
    with pytest.raises(PluginError) as caught:
        build(recipe)
    message = str(caught.value)
    assert NAMED in message
    assert ">=9" in message
    assert f"trainkit {__version__}" in message


def test_a_plugin_that_cannot_be_made(site):
    recipe = site("""
        from trainkit.plugin import plugin

        @plugin
        class Hostile:
            def __attrs_post_init__(self):
                1 / 0
    """)
    with pytest.raises(TrainkitError) as caught:
        build(recipe)
    assert NAMED in str(caught.value)
