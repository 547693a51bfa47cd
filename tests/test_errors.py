"""Blame: an exception names the plugin that it came through, wherever it was raised, and no other."""

import sys
from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from trainkit import Data, Gather, Map, Schedule, fit
from trainkit.build import build_with
from trainkit.errors import RunError, TrainkitError, blame, did_you_mean
from trainkit.hooks import LoadedPlugin, register
from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import Recipe
from trainkit.registry import Installed
from trainkit.testing import build_run, fake_data


def loaded(name, instance):
    """Return a plugin of an installed distribution, ``acme-<name> 1.2``."""
    entry = EntryPoint(name, "", "trainkit.plugins")
    return LoadedPlugin(name, instance, Installed(name, f"acme-{name.partition('@')[0]}", "1.2", "", "", entry))


def build_of(**plugins):
    instances = {name.replace("_at_", "@"): instance for name, instance in plugins.items()}
    provided = {hook for p in instances.values() for hook in ("data", "model", "loss", "optimizer") if hasattr(p, hook)}
    parts = [p for name, p in build_run({}).hooks.plugins.items() if name.removeprefix("default_") not in provided]
    plugins = [*parts, *(loaded(name, instance) for name, instance in instances.items())]
    return build_with(Recipe(name="tiny", epochs=2, batch_size=8, device="cpu"), register(plugins))


def failure(folder, **plugins):
    """Fit a tiny run of these plugins and return what the error says."""
    with pytest.raises(TrainkitError) as caught:
        fit(build_of(**plugins), folder / "run")
    return str(caught.value)


@plugin
class Bystander:
    """Is of the same package as what fails, is called all the time and has no part in the failure."""

    @hookimpl
    def transform_batch(self, batch):
        return batch

    @hookimpl
    def forward_end(self): ...


def fails(*_, **__):
    raise ValueError("no")


@plugin
class OwnScheduler:
    @hookimpl
    def scheduler(self, optimizer):
        class Fails(LRScheduler):
            def get_lr(self):
                return [0.1] if self.last_epoch < 1 else fails()

        return Schedule(Fails(optimizer), "step")


@plugin
class TorchScheduler:
    @hookimpl
    def scheduler(self, optimizer):
        return Schedule(OneCycleLR(optimizer, 0.1, total_steps=2), "step")


class Enters(AbstractContextManager):
    def __init__(self, enter=None, leave=None):
        self.enter, self.leave = enter, leave

    def __enter__(self):
        if self.enter:
            self.enter()

    def __exit__(self, *error):
        if self.leave:
            self.leave()


@plugin
class ContextEnter:
    @hookimpl
    def contexts(self):
        return Enters(enter=fails)


@plugin
class ContextExit:
    @hookimpl
    def contexts(self):
        return Enters(leave=fails)


@plugin
class TorchOptimizer:
    @hookimpl
    def optimizer(self, params):
        return torch.optim.LBFGS(params)  # its step needs a closure


@plugin
class Forward:
    @hookimpl
    def model(self):
        class Fails(nn.Sequential):
            def forward(self, images):
                return fails()

        return Fails(nn.Flatten(), nn.Linear(192, 4))


@plugin
class TorchForward:
    @hookimpl
    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(5, 4))


@plugin
class Draw:
    @hookimpl
    def transforms(self):
        class Draws(Gather):
            def draw(self, rng, n, size):
                fails()

            def source(self, params, y, x, size):
                return y, x

        return Draws()


@plugin
class Apply:
    @hookimpl
    def transforms(self):
        class Applies(Map):
            def apply(self, images, params):
                fails()

        return Applies()


@plugin
class Loss:
    @hookimpl
    def loss(self):
        return lambda output, targets: fails()


@plugin
class TorchLoss:
    @hookimpl
    def loss(self):
        return partial(F.cross_entropy, label_smoothing=2.0)


class Decoded:
    """Decodes images but the tenth."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return (torch.zeros(3, 8, 8, dtype=torch.uint8), index % 4) if index != 9 else fails()


@plugin
class DataSet:
    workers: int = 0

    @hookimpl
    def data(self):
        names = ("a", "b", "c", "d")
        return Data(train=Decoded(), test=fake_data().test, classes=names, shape=(3, 8, 8), workers=self.workers)


@pytest.mark.parametrize(
    ("cls", "hook", "said"),
    [
        (OwnScheduler, "scheduler", "ValueError: no"),
        (TorchScheduler, "scheduler", "ValueError: Tried to step 3 times"),
        (ContextEnter, "contexts", "ValueError: no"),
        (ContextExit, "contexts", "ValueError: no"),
        (TorchOptimizer, "optimizer", "TypeError: LBFGS.step()"),
        (Draw, "transforms", "ValueError: no"),
        (Apply, "transforms", "ValueError: no"),
        (Loss, "loss", "ValueError: no"),
        (TorchLoss, "loss", "RuntimeError: label_smoothing must be between 0.0 and 1.0"),
        (DataSet, "data", "ValueError: no"),
    ],
)
def test_what_a_hook_returned_is_its_plugins(tmp_path, cls, hook, said):
    found = failure(tmp_path, x=cls(), bystander=Bystander())
    assert found.startswith(f"plugin 'x' (acme-x 1.2) failed in {hook}: {said}")
    assert "bystander" not in found


@pytest.mark.parametrize(("cls", "said"), [(Forward, "ValueError: no"), (TorchForward, "RuntimeError: mat1 and mat2")])
def test_a_networks_forward_is_its_plugins(tmp_path, cls, said, monkeypatch):
    monkeypatch.setattr(
        import_module("trainkit.build"), "_check_shapes", lambda run: None
    )  # it would refuse the network at build
    assert failure(tmp_path, x=cls(), bystander=Bystander()).startswith(
        f"plugin 'x' (acme-x 1.2) failed in model: {said}"
    )


@pytest.mark.slow
def test_an_image_that_a_worker_cannot_decode_is_its_plugins(tmp_path):
    found = failure(tmp_path, x=DataSet(workers=2), bystander=Bystander())
    assert found == "plugin 'x' (acme-x 1.2), data: reading images failed: ValueError: no"


@plugin
class HooksIn:
    """Hooks into what another plugin made."""

    into: str

    def fails(self, *_):
        raise ValueError("no")

    @hookimpl
    def fit_start(self, run):
        if self.into == "optimizer":
            run.optimizer.register_step_pre_hook(self.fails)
        else:
            run.model.register_forward_hook(self.fails)


@plugin
class Model:
    @hookimpl
    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

    @hookimpl
    def optimizer(self, params):
        return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize("into", ["optimizer", "model"])
def test_a_callback_in_anothers_part_names_both(tmp_path, into):
    found = failure(tmp_path, x=Model(), y=HooksIn(into=into), bystander=Bystander())
    assert (
        found == f"plugin 'y' (acme-y 1.2) failed in fails, called by plugin 'x' (acme-x 1.2), {into}: ValueError: no"
    )


@plugin
class Inner:
    @hookimpl
    def optimizer(self, params):
        class Fails(torch.optim.SGD):
            def step(self, closure=None):
                fails()

        return Fails(params, lr=0.1)


@plugin
class Outer:
    at_once: bool = False

    @hookimpl
    def transform_optimizer(self, optimizer):
        at_once = self.at_once

        class Wraps(torch.optim.Optimizer):
            def __init__(self):
                super().__init__(optimizer.param_groups, {})

            def step(self, closure=None):
                fails() if at_once else optimizer.step()

        return Wraps()


def test_a_wrapped_optimizer_names_the_inner_one_and_the_wrapper(tmp_path):
    found = failure(tmp_path, x=Inner(), y=Outer())
    expected = "plugin 'x' (acme-x 1.2) failed in optimizer, called by plugin 'y' (acme-y 1.2), transform_optimizer"
    assert found == f"{expected}: ValueError: no"
    assert failure(tmp_path / "other", x=Inner(), y=Outer(at_once=True)) == (
        "plugin 'y' (acme-y 1.2) failed in transform_optimizer: ValueError: no"
    )


@plugin
class Twice:
    """Fails at a step, in a closure that it made."""

    fails: bool

    @hookimpl
    def step_end(self):
        def helper():
            if self.fails:
                raise ValueError("no")

        helper()


@pytest.mark.parametrize("which", ["x", "x@b"])
def test_the_right_one_of_two_instances_is_named(tmp_path, which):
    found = failure(tmp_path, x=Twice(fails=which == "x"), x_at_b=Twice(fails=which == "x@b"))
    assert found == f"plugin {which!r} (acme-x 1.2) failed in step_end: ValueError: no"


def test_trainkits_own_errors_keep_their_class_and_words(tmp_path):
    @plugin
    class Refuses:
        @hookimpl
        def step_end(self):
            raise RunError("the loss is not finite")

    assert failure(tmp_path, x=Refuses()) == "plugin 'x' (acme-x 1.2), step_end: the loss is not finite"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package of two modules, the plugin in one and a helper in the other."""
    folder = tmp_path / "acme_blamed"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from threading import Thread\n"
        "from trainkit.plugin import hookimpl, plugin\n"
        "from acme_blamed.helpers import callback\n\n"
        "@plugin\nclass Acme:\n"
        "    @hookimpl\n    def fit_start(self, run):\n        run.model.register_forward_hook(callback)\n"
    )
    (folder / "helpers.py").write_text("def callback(module, inputs, output):\n    raise ValueError('no')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield import_module("acme_blamed")
    for name in ("acme_blamed", "acme_blamed.helpers"):
        sys.modules.pop(name)


def test_a_helper_of_the_plugins_package_is_the_plugins(tmp_path, package):
    """Nothing of the plugin's instance is in the traceback: the function's module tells whose it is."""
    found = failure(tmp_path, x=package.Acme(), bystander=Bystander())
    called = "called by plugin 'default_model', model"
    assert found == f"plugin 'x' (acme-x 1.2) failed in callback, {called}: ValueError: no"


def test_no_plugin_is_named_where_none_was_involved(tmp_path, monkeypatch):
    def seed(run):
        torch.zeros(2) + torch.zeros(3)

    monkeypatch.setattr("trainkit.trainer.seed_torch", seed)
    run = build_run({})
    with pytest.raises(RuntimeError, match="size of tensor") as caught:
        fit(run, tmp_path / "run")
    assert blame(caught.value, run.hooks.plugins.values()) == []
    assert run.failed


def test_a_full_disk_is_no_plugins_failure(tmp_path, monkeypatch):
    def full(self, name, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainkit.rundir.RunDir.write", full)
    with pytest.raises(OSError, match="No space left"):
        fit(build_run({}), tmp_path / "run")


def test_did_you_mean_names_the_nearest_or_nothing():
    assert did_you_mean("epoch", ["epochs", "seed"]) == "; did you mean 'epochs'?"
    assert did_you_mean("xyz", ["epochs", "seed"]) == ""
