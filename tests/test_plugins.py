"""Every first-party plugin has one shape and keeps the promises of a plugin; tests/test_packaging.py has the wheels."""

import inspect
import re
import tomllib
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml

from trainkit import hookspecs
from trainkit.cli import main
from trainkit.recipe import from_dict, make_options
from trainkit.testing import assert_conforms, assert_light_imports

ROOT = Path(__file__).parents[1]
PROJECTS = {
    p.parent.name: tomllib.loads(p.read_text())["project"] for p in sorted(ROOT.glob("plugins/*/pyproject.toml"))
}
PLUGINS = [name for name, project in PROJECTS.items() if "trainkit.plugins" in project["entry-points"]]
HOOKS = {name for phase in hookspecs.PHASES for name in vars(phase)}

SMALL = {"stem": 4, "blocks": [1], "channels": [4]}
# Options for images of 8x8 pixels, where those of the README are for larger ones or name files.
OPTIONS = {
    "balanced_sampler": {"images": 24},
    "conv_groups": {"widths": [4, 6]},
    "dirac": {"modules": ["stages.0"]},
    "figures": {"every": 2},
    "freeze": {"modules": ["stages.0"], "epoch": 1},
    "hold_out": {"count": 8, "per_class": False, "seed": 1},
    "kernel_sharing": {"within": ["stages.0"]},
    "parameter_groups": {"groups": [{"parameters": ["*.bias"], "lr_scale": 4.0}]},
    "random_crop": {"size": 8, "padding": 1},
    "random_resized_crop": {"size": 8},
    "reduce_lr_on_plateau": {"patience": 0, "threshold": 9.0, "threshold_mode": "abs"},
    "repeated_augmentation": {"times": 3},
    "resnet": {**SMALL, "dropout": 0.1},
    "se": {"after": ["stages.*.*.bn2"], "reduction": 2},
    "torchvision_model": {"name": "shufflenet_v2_x0_5"},
    "weight_decay_groups": {},
    "whitening": {"images": 8},
}
# What they need beside them, with its options.
BESIDE = {
    "checkpoint": {"metrics": {}},
    "dirac": {"resnet": SMALL},
    "early_stopping": {"metrics": {}},
    "figures": {"metrics": {}},
    "freeze": {"resnet": SMALL},
    "kernel_sharing": {"resnet": {**SMALL, "blocks": [2]}},
    "metric_log": {"metrics": {"every": 1}},
    "reduce_lr_on_plateau": {"metrics": {}},
    "parameter_groups": {"sgd": {}},
    "se": {"resnet": SMALL},
    "weight_decay_groups": {"sgd": {"weight_decay": 0.1}},
}
NOT_HERE = {
    "binary_cross_entropy_with_logits": "the fake data have one label an image; its own test has others",
    "cifar10": "its data are files",
    "compile": "torch's compiler keeps processes and threads for as long as Python runs",
    "distillation": "it needs an earlier run; its own test has one",
    "image_folder": "its data are files",
    "mlflow": "its store lies beside the run directory; its own test names another one",
    "start_weights": "it needs a file",
    "timm_model": "its networks are large",
}

HEAVY = {
    "cifar10": "torchvision's data sets",
    "compile": "torch's compiler",
    "image_folder": "torchvision's images",
}  # what these import is what a run that lists them starts with

every_plugin = pytest.mark.parametrize("name", PLUGINS)


def load(name):
    module, _, cls = PROJECTS[name]["entry-points"]["trainkit.plugins"][name].partition(":")
    return getattr(import_module(module), cls)


def readme(name):
    return (ROOT / "plugins" / name / "README.md").read_text()


def recipe_lines(name):
    """Return the plugins of the README's recipe lines, with their options."""
    tree = yaml.safe_load(re.search(r"```yaml\n(.*?)```", readme(name), re.DOTALL)[1])
    return {plugin: options or {} for plugin, options in tree["plugins"].items()}


@pytest.mark.parametrize("name", PROJECTS)
def test_folder_distribution_module_and_entry_point_have_one_name(name):
    project = PROJECTS[name]
    assert project["name"] == f"trainkit-{name.replace('_', '-')}"
    assert distribution(project["name"]).version == project["version"]
    for group, entries in project["entry-points"].items():
        assert group in ("trainkit.plugins", "trainkit.commands", "trainkit.executors", "trainkit.resumable")
        assert {value.partition(":")[0] for value in entries.values()} == {f"trainkit_{name}"}
        if group == "trainkit.plugins":
            assert list(entries) == [name]
    assert readme(name).startswith(f"# {project['name']}\n")


def test_its_summary_and_options_are_said_once(monkeypatch):
    """Its class has them; what its README, its pyproject.toml and the list of all say is generated."""
    monkeypatch.chdir(ROOT)
    assert main(["plugins", "docs", "--check"]) == 0


@every_plugin
def test_its_module_names_its_class(name):
    cls = load(name)
    module = import_module(cls.__module__)
    assert cls.__name__ in module.__all__
    assert cls.__name__.lower() == name.replace("_", "")


@every_plugin
def test_its_hooks_are_hooks_with_documentation(name):
    cls = load(name)
    own = {hook for spec in getattr(cls, "hookspecs", ()) for hook in vars(spec)}
    marked = {n: m for n, m in inspect.getmembers(cls) if hasattr(m, "trainkit_impl")}
    assert set(marked) <= HOOKS | own
    assert [n for n, method in marked.items() if not inspect.getdoc(method)] == []


@every_plugin
def test_the_recipe_lines_of_its_readme_are_valid(name):
    lines = recipe_lines(name)
    assert name in lines
    recipe = from_dict({"name": "r", "epochs": 1, "batch_size": 1, "plugins": lines})
    for plugin in lines:
        make_options(recipe, plugin, load(plugin))


def test_they_import_nothing_heavy():
    assert_light_imports(*(f"trainkit_{name}" for name in PLUGINS if name not in HEAVY))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PLUGINS if name not in NOT_HERE])
def test_it_keeps_the_promises_of_every_plugin(name, monkeypatch):
    monkeypatch.setattr("trainkit.testing.conformance.assert_light_imports", lambda *modules: None)  # above
    given = OPTIONS.get(name, recipe_lines(name)[name])
    beside = {other: load(other)(**options) for other, options in BESIDE.get(name, {}).items()}
    assert_conforms(load(name), beside=beside, **given)
