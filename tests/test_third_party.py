"""Packages as an outside author writes them, from the README alone: installed from wheels, they do all they say."""

import importlib
import json
import shutil
import tomllib

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from trainkit import Batch
from trainkit.data import epoch_permutation
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import assert_conforms, assert_light_imports, build_run, fake_data, run_steps

from .environments import PLUGINS, ROOT, THIRD_PARTY, environment, wheel

RECIPE = """\
name: stripes
epochs: 4
batch_size: 32
device: cpu
requires: ["acme-trainkit-sam>=1.2", trainkit-acme-mixup, acme-trainkit-stripes]
plugins:
  stripes: {noise: 50}
  random_horizontal_flip:
  resnet: {stem: 8, blocks: [1], channels: [8]}
  acme_mixup: {alpha: 0.1}
  cross_entropy:
  sgd: {lr: 0.1, momentum: 0.9}
  sam: {rho: 0.1}
  metrics:
  metric_log:
  alert: {metric: test_accuracy, above: 60}
  alert_file: {name: alerts/accuracy.txt}
"""
BESIDE = [PLUGINS[n] for n in ("random_horizontal_flip", "resnet", "cross_entropy", "sgd", "metrics", "metric_log")]
TOGETHER = """\
name: together
epochs: 3
batch_size: 64
device: cpu
plugins:
  digits:
  folds: {fold: 1, folds: 4}
  sampler: {fraction: 0.4, warmup: 1}
  random_crop: {size: 8, padding: 1}
  normalize: {mean: [0.305], std: [0.376]}
  acme_mixup:
  resnet: {stem: 4, blocks: [1], channels: [4], dropout: 0.1}
  finetune: {head: [fc], epochs: 1, weights: teacher.pt}
  cross_entropy:
  distill: {teacher: teacher.pt}
  accumulate: {batches: 2}
  sgd: {lr: 0.1, momentum: 0.9}
  average: {start: 2}
  metrics:
  metric_log:
  checkpoint:
"""
RESUMED = """\
import json, shutil, torch, trainkit

teacher = ["plugins.distill=false", "plugins.finetune=false", "plugins.average=false", "seed=3", "epochs=1"]
trainkit.fit(trainkit.build(trainkit.load_recipe("together.yaml", teacher)), "teacher")
shutil.copy("teacher/checkpoints/last.pt", "teacher.pt")
straight = trainkit.fit(trainkit.build(trainkit.load_recipe("together.yaml")), "straight")
cut = trainkit.load_recipe("together.yaml", {"plugins.stop.after": 3})
results = [trainkit.fit(trainkit.build(cut), "cut")]
while results[-1].status != "completed":
    results.append(trainkit.resume("cut"))
states = [torch.load(f"{run}/checkpoints/last.pt", weights_only=True) for run in ("straight", "cut")]
same = [
    torch.equal(a, b)
    for part in (lambda state: state["model"], lambda state: state["plugins"]["average"]["state"]["average"])
    for a, b in zip(*(part(state).values() for state in states), strict=True)
]
print(json.dumps([[result.status for result in results], same, straight.final, results[-1].final]))
"""


@pytest.fixture(scope="module")
def env():
    """The core, a few of its plugins and all packages of others, from wheels."""
    return environment(ROOT, *BESIDE, *THIRD_PARTY.values())


@pytest.fixture(scope="module")
def trained(env, tmp_path_factory):
    """A folder in which the recipe has run, and what its run printed."""
    folder = tmp_path_factory.mktemp("third_party")
    (folder / "stripes.yaml").write_text(RECIPE)
    done = env.trainkit("run", "stripes.yaml", "--run-dir", "run", "--profile", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_they_are_listed(env):
    listed = json.loads(env.trainkit("plugins", "list", "--json").stdout)
    found = {(p["distribution"], p["version"], p["summary"]) for p in listed}
    for folder in THIRD_PARTY.values():
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        if "trainkit.plugins" in project["entry-points"]:
            assert (project["name"], project["version"], project["description"]) in found


@pytest.mark.slow
def test_a_recipe_trains_with_them(trained):
    folder, _ = trained
    result = json.loads((folder / "run" / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("completed", 32)
    assert result["final"]["test_accuracy"] > 60  # half of the images would be right by chance


def test_their_hooks_are_the_ones_that_were_called(trained):
    _, printed = trained
    rows = {tuple(line.split()[:2]) for line in printed.splitlines() if line}
    for row in [("stripes", "data"), ("acme_mixup", "transform_batch"), ("sam", "optimizer_step")]:
        assert row in rows


def test_the_run_says_which_packages_it_used(trained):
    folder, _ = trained
    locked = {p["name"]: p for p in json.loads((folder / "run" / "plugins.lock.json").read_text())}
    assert (locked["sam"]["distribution"], locked["sam"]["version"]) == ("acme-trainkit-sam", "1.2.0")
    assert (locked["acme_mixup"]["distribution"], locked["acme_mixup"]["version"]) == ("trainkit-acme-mixup", "0.3.0")
    assert locked["sam"]["options"] == {"rho": 0.1}


def test_a_plugin_implements_the_hook_of_another(trained):
    folder, _ = trained
    assert (folder / "run" / "alerts" / "accuracy.txt").read_text().startswith("test_accuracy passed 60 in epoch ")


@pytest.mark.slow
def test_a_hook_of_another_needs_its_owner_in_the_recipe(env, trained):
    folder, _ = trained
    done = env.trainkit("run", "stripes.yaml", "plugins.alert=false", cwd=folder)
    assert done.returncode == 2
    assert "error: plugin 'alert_file' (acme-trainkit-alert-file 1.1.0): 'alert' is not a hook" in done.stderr


def test_a_command_of_their_own(env, trained):
    folder, _ = trained
    done = env.trainkit("best", "run", cwd=folder)
    assert done.returncode == 0
    assert {line.split()[0] for line in done.stdout.splitlines()} >= {"test_loss", "test_accuracy"}
    assert "best  " in env.trainkit("--help").stdout
    done = env.trainkit("best", "nowhere", cwd=folder)
    assert (done.returncode, done.stderr[:25]) == (2, "error: nowhere/result.jso")


@pytest.mark.slow
def test_a_recipe_names_where_its_packages_come_from(tmp_path):
    (tmp_path / "stripes.yaml").write_text(RECIPE)
    done = environment(ROOT).trainkit("run", "stripes.yaml", cwd=tmp_path)
    assert done.returncode == 2
    line = "pip install acme-trainkit-stripes trainkit-acme-mixup 'acme-trainkit-sam>=1.2'"
    assert f"; install with: {line}; " in done.stderr


@pytest.fixture(scope="module")
def together():
    """The environment of the recipe in which what seldom meets is together."""
    beside = ("accumulate", "autocast", "checkpoint", "digits", "normalize", "random_crop")
    return environment(ROOT, *BESIDE, *(PLUGINS[n] for n in beside), *THIRD_PARTY.values())


@pytest.mark.slow
def test_a_run_of_them_that_stops_again_and_again_ends_the_same(together, tmp_path):
    (tmp_path / "together.yaml").write_text(TOGETHER)
    statuses, same, straight, cut = together.evaluate(RESUMED, cwd=tmp_path)
    assert statuses == ["stopped"] * 4 + ["completed"]
    assert all(same)
    assert cut == straight


@pytest.mark.slow
def test_the_tests_of_the_packages_pass_where_they_are_installed(together, tmp_path):
    names = [path.parents[1].name for path in sorted(ROOT.glob("tests/third_party/*/tests/*.py"))]
    for name in names:
        shutil.copytree(THIRD_PARTY[name] / "tests", tmp_path / name)
    modules = [name.replace("-", "_") for name in names]
    (tmp_path / "conftest.py").write_text(  # one interpreter that counts the imports of all
        "from trainkit.testing import assert_light_imports\n\n\n"
        f"def pytest_sessionstart():\n    assert_light_imports(*{modules})\n"
    )
    done = together(together.python, "-m", "pytest", "-v", tmp_path, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout
    assert "SKIPPED" not in done.stdout
    assert [name for name in names if f"{name}/" not in done.stdout] == []


@pytest.fixture
def imported(monkeypatch):
    """Imports the class of a package from its wheel."""

    def class_of(name):
        project = tomllib.loads((THIRD_PARTY[name] / "pyproject.toml").read_text())["project"]
        (value,) = project["entry-points"]["trainkit.plugins"].values()
        module, _, attribute = value.partition(":")
        monkeypatch.syspath_prepend(str(wheel(THIRD_PARTY[name])))
        return getattr(importlib.import_module(module), attribute)

    return class_of


@plugin
class Linear:
    """A network without batch statistics, so that a second forward pass has no effect of its own."""

    @hookimpl
    def model(self, run):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))


def test_sam_is_the_papers_algorithm(imported):
    rho, steps = 0.5, 3
    trained = run_steps({"linear": Linear(), "sam": imported("acme-trainkit-sam")(rho=rho)}, steps).model
    model = build_run({"linear": Linear()}).model
    data = fake_data().train
    for index in epoch_permutation(0, 0, len(data)).split(8)[:steps]:
        images, targets = data.images[index].float() / 255, data.targets[index]
        weights = list(model.parameters())
        gradients = torch.autograd.grad(cross_entropy(model(images), targets), weights)
        length = sum((g**2).sum() for g in gradients) ** 0.5
        climbed = {n: p + rho * g / length for (n, p), g in zip(model.named_parameters(), gradients, strict=True)}
        loss = cross_entropy(torch.func.functional_call(model, climbed, images), targets)
        with torch.no_grad():
            for weight, gradient in zip(weights, torch.autograd.grad(loss, list(climbed.values())), strict=True):
                weight.sub_(0.1 * gradient)
    for ours, plain in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain)
    assert not torch.allclose(trained[1].weight, run_steps({"linear": Linear()}, steps).model[1].weight, atol=1e-4)


def test_mixup_mixes_images_and_targets_alike(imported):
    run = build_run({})
    images = torch.eye(4).view(4, 4, 1, 1).expand(4, 4, 8, 8)  # the image of a class says which it is
    mixed = imported("trainkit-acme-mixup")(alpha=1.0).transform_batch(run, Batch(images, torch.arange(4)))
    torch.testing.assert_close(mixed.images[:, :, 0, 0], mixed.targets)
    torch.testing.assert_close(mixed.targets.sum(1), torch.ones(4))
    assert not torch.equal(mixed.targets, one_hot(torch.arange(4)).float())


@pytest.mark.slow
def test_they_keep_the_promises_of_every_plugin(imported):
    options = {"acme-trainkit-sam": {}, "trainkit-acme-mixup": {}, "acme-trainkit-stripes": {"images": 32}}
    classes = {name: imported(name) for name in options}
    assert_light_imports(*(cls.__module__ for cls in classes.values()))
    for name, cls in classes.items():
        assert_conforms(cls, **options[name])
