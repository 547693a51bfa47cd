"""Each plugin is a package of its own: it builds, installs and works alone, and leaves nothing when it goes."""

import ast
import configparser
import json
import re
import sys
import tomllib
import zipfile
from email.parser import Parser
from functools import cache
from importlib.metadata import packages_distributions

import pytest
import yaml
from PIL import Image

from trainkit import __version__

from .environments import PLUGINS, ROOT, Environment, distribution, environment, wheel

GROUPS = {"trainkit.plugins", "trainkit.commands", "trainkit.executors", "trainkit.resumable"}
SAMPLE = ("sgd", "runs")  # a provider and a command

ON_DEMAND = {
    "read_safetensors": "safetensors",
    "pack_safetensors": "safetensors",
}  # what needs a package that trainkit itself does not require

BEHIND = {"mlflow": {"sqlalchemy", "alembic", "cryptography"}}  # what a plugin's library imports and does not require

SLOW_IMPORTS = ("compile", "mlflow", "timm_model")  # five seconds each, which their own tests spend, too

each_plugin = pytest.mark.parametrize("plugin", PLUGINS)


def project(folder):
    """Return the metadata that a project's file declares."""
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


@pytest.fixture
def contents(plugin):
    """The files of a plugin's wheel, by name."""
    with zipfile.ZipFile(wheel(PLUGINS[plugin])) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def imported(source):
    """Return the top-level names of the packages that a module imports when it runs, wherever in it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names


@cache
def distributions():
    """Return the names of the distributions that provide each top-level package; finding out takes half a second."""
    return packages_distributions()


def normal(name):
    return re.sub("[-_.]+", "-", name).lower()


@each_plugin
def test_its_folder_holds_four_files(plugin):
    home = PLUGINS[plugin]
    kept = {p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert kept == {"pyproject.toml", "README.md", f"trainkit_{plugin}.py", f"tests/test_{plugin}.py"}


@each_plugin
def test_its_wheel_holds_one_module_and_metadata(plugin, contents):
    info = f"trainkit_{plugin}-{__version__}.dist-info"
    assert set(contents) == {
        f"trainkit_{plugin}.py",
        *(f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")),
    }
    metadata = Parser().parsestr(contents[f"{info}/METADATA"])
    assert metadata["Name"] == distribution(plugin)
    assert f"# {distribution(plugin)}" in metadata.get_payload()
    assert metadata["Summary"].endswith(".")
    assert "trainkit>=0.1,<0.2" in metadata.get_all("Requires-Dist")
    entries = configparser.ConfigParser(delimiters="=")
    entries.read_string(contents[f"{info}/entry_points.txt"])
    assert set(entries.sections()) <= GROUPS
    values = [value for group in entries.sections() for value in entries[group].values()]
    assert {value.partition(":")[0] for value in values} == {f"trainkit_{plugin}"}


@each_plugin
def test_it_declares_what_it_imports_and_nothing_else(plugin, contents):
    """What comes with trainkit itself, such as attrs, need not be declared again."""
    core = {normal(re.split(r"[<>=]", text)[0]) for text in project(ROOT)["dependencies"]} | {"trainkit"}
    declared = {normal(re.split(r"[<>=]", text)[0]) for text in project(PLUGINS[plugin])["dependencies"]}
    source = contents[f"trainkit_{plugin}.py"]
    needed = {normal(distributions().get(name, [name])[0]) for name in imported(source)}
    needed |= {package for name, package in ON_DEMAND.items() if re.search(rf"\b{name}\(", source)}
    needed |= BEHIND.get(plugin, set())
    assert declared - core == needed - core


def test_requirements_install_every_plugin():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("-e")] == [
        "-e .[test]",
        *(f"-e ./plugins/{name}" for name in PLUGINS),
    ]


def test_uv_takes_first_party_requirements_from_the_workspace():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]
    required = {distribution(name) for plugin in PLUGINS for name in needs(plugin)[1:]}
    assert set(tool["sources"]) == {"trainkit", *required}


# Run by an environment that holds the core alone. Each wheel is imported, as a zip, by a process of its own, forked
# when torch is there and warm. The network's modules are named like those of `resnet` and the images are of CIFAR-10's
# size, so that the recipe lines of every README fit.
ALONE = """
import json, multiprocessing, sys
import matplotlib.figure, sklearn.datasets, torchvision.transforms.functional  # what several import, once
import torch
from torch import nn
from trainkit import Metric, TensorSplit
from trainkit.cli import main
from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import from_dict, make_options
from trainkit.registry import COMMANDS, PLUGINS, installed
from trainkit.testing import build_run, fake_data, run_steps

class Block(nn.Sequential):
    def __init__(self, channels):
        super().__init__()
        for n in (1, 2):
            self.add_module(f"conv{n}", nn.Conv2d(channels, channels, 3, padding=1))
            self.add_module(f"bn{n}", nn.BatchNorm2d(channels))

class Network(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, stride=4)
        self.stages = nn.Sequential(*(nn.Sequential(Block(16), Block(16)) for _ in range(3)))
        self.fc = nn.Linear(16, classes)

    def forward(self, images):
        return self.fc(self.stages(self.stem(images)).mean((2, 3)))

@plugin
class ProvidesData:
    @hookimpl
    def data(self):
        return fake_data(size=32)

@plugin
class ProvidesModel:
    @hookimpl
    def model(self, run):
        return Network(run.data.shape[0], len(run.data.classes))

@plugin
class ProvidesOptimizer:
    @hookimpl
    def optimizer(self, params):
        return torch.optim.SGD(params, lr=0.01, weight_decay=1e-4)

@plugin
class ProvidesMetrics:
    @hookimpl
    def metrics(self):
        return {"loss": Metric(1.0, better="less")}

@plugin
class SeveralLabels:
    @hookimpl
    def transform_data(self, data):
        change = lambda split: TensorSplit(split.images, nn.functional.one_hot(split.targets, 4).float())
        return data.replace(train=change(data.train), test=change(data.test))

def surroundings(*provided):
    parts = {"data": ProvidesData, "model": ProvidesModel, "optimizer": ProvidesOptimizer}
    return {"metrics": ProvidesMetrics(), **{hook: cls() for hook, cls in parts.items() if hook not in provided}}

def check(item):
    name, wheels, options = item
    sys.path[:0] = wheels
    if options is None:
        for entries in installed(COMMANDS).values():
            command = entries[0].load()
            assert command.HELP and callable(command.run)
            try:
                main([*entries[0].name.split("."), "--help"])
            except SystemExit as end:
                assert end.code == 0
        for entries in installed("trainkit.executors").values():
            assert callable(entries[0].load())
    else:
        cls = installed(PLUGINS)[name][0].load()
        recipe = from_dict({"name": "alone", "epochs": 1, "batch_size": 8, "plugins": {name: options}})
        plugins = {**surroundings(*vars(cls)), name: make_options(recipe, name, cls)}
        if name == "binary_cross_entropy_with_logits":
            plugins["several_labels"] = SeveralLabels()
        if name == "start_weights":
            torch.save(Network(3, 4).state_dict(), "weights.pt")
        if name != "distillation":  # its teacher would need the plugins of another recipe
            assert run_steps(plugins, steps=1).step == 1
    return sorted(module for module in sys.modules if module.startswith("trainkit_"))

def report(item):
    try:
        return item[0], check(item), None
    except BaseException as error:
        return item[0], [], f"{type(error).__name__}: {error}"

torch.set_num_threads(1)
run_steps(surroundings(), steps=1)
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    print(json.dumps(pool.map(report, json.loads(sys.argv[1]), chunksize=1)))
"""


def is_plugin(plugin):
    """Tell what a recipe can list from what are commands alone."""
    return "trainkit.plugins" in project(PLUGINS[plugin])["entry-points"]


def needs(plugin):
    """Return a plugin and the first-party plugins that its distribution requires."""
    required = (re.match(r"trainkit-([\w-]+)", text) for text in project(PLUGINS[plugin])["dependencies"])
    return [plugin, *(found[1].replace("-", "_") for found in required if found)]


def readme_options(plugin):
    """Return the options that a plugin's README gives it."""
    lines = re.search(r"```yaml\n(.*?)```", (PLUGINS[plugin] / "README.md").read_text(), re.DOTALL).group(1)
    return yaml.safe_load(lines)["plugins"][plugin] or {}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What came of each wheel alone beside the core: the plugins' modules that were imported, and an error."""
    folder = tmp_path_factory.mktemp("alone")
    ten = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for images, classes in (("data", ten), ("data/flowers", ["aster", "tulip"])):  # where the READMEs look for them
        for split in ("train", "test"):
            for name in classes:
                (folder / images / split / name).mkdir(parents=True)
                for number in range(8):
                    Image.new("RGB", (32, 32)).save(folder / images / split / name / f"{number}.png")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    items = [
        (
            plugin,
            [str(wheel(PLUGINS[name])) for name in needs(plugin)],
            readme_options(plugin) if is_plugin(plugin) else None,
        )
        for plugin in PLUGINS
        if plugin not in SLOW_IMPORTS
    ]
    reports = environment(ROOT).evaluate(ALONE, json.dumps(items), cwd=folder)
    return {plugin: (modules, error) for plugin, modules, error in reports}


@pytest.mark.slow
@pytest.mark.parametrize("plugin", [plugin for plugin in PLUGINS if plugin not in SLOW_IMPORTS])
def test_it_works_alone_beside_the_core(plugin, alone):
    """With the recipe lines of its own README it trains a step; of its kind, it imports what it requires alone."""
    modules, error = alone[plugin]
    assert error is None
    assert f"trainkit_{plugin}" in modules
    assert set(modules) <= {f"trainkit_{name}" for name in needs(plugin)}


def files(plugin):
    """Return what an installer makes of a plugin's wheel, as paths in an environment's site-packages."""
    info = f"trainkit_{plugin}-{__version__}.dist-info"
    noted = ("INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json")
    with zipfile.ZipFile(wheel(PLUGINS[plugin])) as archive:
        return {*archive.namelist(), *(f"{info}/{name}" for name in noted)}


@pytest.mark.slow
def test_uninstalling_leaves_nothing_and_the_rest_works():
    """Some are uninstalled by pip, one by one; of all others, together, only what is left is looked at."""
    env = Environment()
    env.install(ROOT)
    empty = env.listing()
    env.install(*PLUGINS.values())
    site = env.site.relative_to(env.folder)
    full = env.listing()
    assert full == empty | {f"{site}/{name}" for plugin in PLUGINS for name in files(plugin)}

    left = full
    for plugin in SAMPLE:
        env.pip("uninstall", "-y", distribution(plugin))
        left = left - {f"{site}/{name}" for name in files(plugin)}
        assert env.listing() == left
    assert listed(env) == {plugin for plugin in PLUGINS if is_plugin(plugin)} - {*SAMPLE}
    assert env.trainkit("runs", "list").returncode == 2

    recipe = "recipes/quickstart.yaml"
    done = env.trainkit("run", recipe, cwd=ROOT)
    line = "pip install -e ./plugins/sgd"
    said = f"error: {recipe}: plugin 'sgd' is not installed; install with: {line}\n"
    assert (done.returncode, done.stderr) == (2, said)

    env.pip("install", "--no-build-isolation", *line.split()[2:], cwd=ROOT)
    assert "sgd" in listed(env)
    env.uv("uninstall", *(distribution(plugin) for plugin in PLUGINS if plugin != "runs"))
    assert env.listing() == empty


def listed(env):
    """Return the names that `trainkit plugins list` shows."""
    return {plugin["name"] for plugin in json.loads(env.trainkit("plugins", "list", "--json").stdout)}


MISSING = """
import json, sys
from trainkit.errors import PluginError
from trainkit.recipe import from_dict
from trainkit.registry import find
from pathlib import Path

said = {}
for name in json.loads(sys.argv[1]):
    tree = {"name": "r", "epochs": 1, "batch_size": 1, "plugins": {name: None}}
    try:
        find(from_dict(tree, Path("recipes/r.yaml")))
    except PluginError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def test_a_recipe_that_lists_a_plugin_says_what_installs_it():
    plugins = [plugin for plugin in PLUGINS if is_plugin(plugin)]
    said = environment(ROOT).evaluate(MISSING, json.dumps(plugins), cwd=ROOT)
    assert said == {
        name: f"recipes/r.yaml: plugin {name!r} is not installed; install with: pip install -e ./plugins/{name}"
        for name in plugins
    }
