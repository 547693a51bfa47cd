"""Plugins in files beside a recipe: they run where the user allows it; the run keeps and records their content."""

import json
import shutil

import pytest

import trainkit
from trainkit.cli import main
from trainkit.errors import PluginError, RecipeError

TRICK = '''
"""A trick of one's own."""
from pathlib import Path

from trainkit.plugin import hookimpl, plugin

Path(__file__).with_name("it_ran").touch()


class Options:
    """No plugin: no hook."""


@plugin
class MyHalfLoss:
    """Scale the loss."""

    factor: float = 0.5

    @hookimpl
    def transform_loss(self, run, loss):
        return loss * self.factor
'''

RECIPE = """
name: own
epochs: 1
batch_size: 64
max_steps: 3
local: [tricks.py]
plugins:
  digits:
  resnet: {stem: 4, blocks: [1], channels: [4]}
  cross_entropy:
  sgd: {lr: 0.1}
  metrics:
  checkpoint:
  my_half_loss:
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe beside a file with a plugin, which leaves a trace where it runs."""
    (tmp_path / "tricks.py").write_text(TRICK)
    path = tmp_path / "own.yaml"
    path.write_text(RECIPE)
    return path


def ran(folder):
    """Tell whether the file in a folder ran, and forget it."""
    trace = folder / "it_ran"
    happened = trace.exists()
    trace.unlink(missing_ok=True)
    return happened


def test_no_command_runs_a_strangers_file_unless_it_is_allowed(recipe, tmp_path, capsys):
    for command in (["run"], ["run", "--dry-run"], ["plugins", "order"], ["recipes", "show"]):
        main([*command, str(recipe)])
        assert not ran(tmp_path), command
    assert "pass --allow-local" in capsys.readouterr().err

    where = tmp_path / "run"
    assert main(["run", str(recipe), "--allow-local", "--run-dir", str(where)]) == 0
    assert ran(tmp_path)
    for command in (["run"], ["resume"], ["evaluate"], ["verify"], ["predict", str(where)], ["runs", "check"]):
        main([*command, str(where / "recipe.yaml" if command == ["run"] else where)])
        assert not ran(where / "files" / "local"), command
    assert main(["evaluate", str(where), "--allow-local"]) == 0
    assert ran(where / "files" / "local")


def test_the_run_keeps_a_copy_that_runs_again_from_anywhere_and_is_recorded_by_its_content(recipe, tmp_path):
    with trainkit.allow_local():
        first = trainkit.fit(trainkit.build(trainkit.load_recipe(recipe)), tmp_path / "first")
        (record,) = [each for each in locked(first.path) if each["name"] == "my_half_loss"]
        moved = tmp_path / "elsewhere" / "moved"
        moved.parent.mkdir()
        shutil.move(first.path, moved)
        recipe.with_name("tricks.py").unlink()
        again = trainkit.fit(trainkit.build(trainkit.load_recipe(moved / "recipe.yaml")), tmp_path / "again")
        assert again.final == first.final
        (same,) = [each for each in locked(again.path) if each["name"] == "my_half_loss"]
        assert same["code"] == record["code"]
        assert [p.name for p in (again.path / "files" / "local").iterdir() if p.suffix == ".py"] == ["tricks.py"]

        copy = moved / "files" / "local" / "tricks.py"
        copy.write_text(copy.read_text().replace("loss * self", "2 * loss * self"))
        with pytest.raises(RecipeError, match="my_half_loss code was"):
            trainkit.resume(moved, ["max_steps=6"])


def locked(run_dir):
    return json.loads((run_dir / "plugins.lock.json").read_text())


def test_what_is_allowed_in_a_block_is_not_allowed_behind_it(recipe, tmp_path):
    with trainkit.allow_local():
        trainkit.build(trainkit.load_recipe(recipe))
    with pytest.raises(PluginError, match="--allow-local"):
        trainkit.build(trainkit.load_recipe(recipe))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("1 / 0", "local: tricks.py: failed at import: ZeroDivisionError"),
        ("import sys; sys.exit(3)", "failed at import: SystemExit: 3"),
        ("def broken(:", "failed at import: SyntaxError"),
        ("x = 1", "defines no plugin"),
        (TRICK.replace("MyHalfLoss", "SGD"), "'sgd' .SGD. is trainkit-sgd's, too; rename the class"),
        (TRICK.replace("MyHalfLoss", "MyHalveLoss"), "did you mean 'my_halve_loss'"),
    ],
)
def test_a_file_that_offers_no_plugin_is_named_with_the_reason(recipe, source, said):
    recipe.with_name("tricks.py").write_text(source)
    with trainkit.allow_local(), pytest.raises(PluginError, match=said):
        trainkit.build(trainkit.load_recipe(recipe))


@pytest.mark.parametrize("name", ["../tricks.py", "/tmp/tricks.py", "tricks.txt", "link.py", "loop.py"])
def test_a_file_elsewhere_is_refused(tmp_path, recipe, name):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "link.py").symlink_to(tmp_path / "tricks.py")
    (inner / "loop.py").symlink_to("loop.py")
    path = inner / "own.yaml"
    path.write_text(RECIPE.replace("tricks.py", name))
    with trainkit.allow_local(), pytest.raises(RecipeError, match=r"own\.yaml: local: .*recipe's own folder"):
        trainkit.build(trainkit.load_recipe(path))
    assert not ran(tmp_path)


def test_a_file_that_is_not_there_is_named(recipe):
    recipe.with_name("tricks.py").unlink()
    with trainkit.allow_local(), pytest.raises(RecipeError, match=r"local: tricks\.py: cannot be read"):
        trainkit.build(trainkit.load_recipe(recipe))
