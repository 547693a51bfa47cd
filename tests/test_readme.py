"""What the READMEs show works, from their own text."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainkit import cli, load_recipe
from trainkit.recipe import make_options
from trainkit.registry import find
from trainkit.testing import build_run, run_steps

from .processes import import_from

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECTS = sorted(ROOT.glob("plugins/*/pyproject.toml"))


def section(title):
    """Return a section of the README."""
    assert f"\n## {title}\n" in README
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def block(language, text):
    """Return the only code block of a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return found


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!\w+:)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_table_of_results_is_current(monkeypatch):
    """It says what `recipes/results` holds; `trainkit recipes results --write README.md` writes it."""
    monkeypatch.chdir(ROOT)
    assert cli.main(["recipes", "results", "--write", "README.md", "--check"]) == 0


def commands(text):
    """Return the words of each `trainkit` command in a text's blocks of shell commands, without `trainkit`."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "".join(lines for language, lines in blocks if language in ("", "sh")).splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True)[1:] for part in parts if part.startswith("trainkit ")]


READMES = {"README": README, **{path.parent.name: (path.parent / "README.md").read_text() for path in PROJECTS}}
SHOWN = [(name, words) for name, text in READMES.items() for words in commands(text)]


@pytest.mark.parametrize(("readme", "words"), SHOWN, ids=[f"{name}: {' '.join(words)}" for name, words in SHOWN])
def test_commands_are_understood(readme, words, monkeypatch):
    """They are parsed by the real command and not run; the recipe that they name is read, with their overrides."""
    real, understood = cli._command, []

    def only_parsing(name, *others):
        command = real(name, *others)
        run = lambda args: understood.append(args) or 0  # noqa: E731
        return SimpleNamespace(HELP=command.HELP, add_arguments=command.add_arguments, run=run)

    monkeypatch.setattr(cli, "_command", only_parsing)
    monkeypatch.chdir(ROOT)
    assert cli.main(words) == 0
    (args,) = understood
    if hasattr(args, "recipe") and str(args.recipe) != "photos.yaml":  # which the command before it writes
        recipe = load_recipe(args.recipe, args.overrides)
        for name, found in find(recipe).items():
            make_options(recipe, name, found.load())


def test_the_readme_shows_commands():
    assert {"run", "resume", "evaluate", "recipes"} <= {words[0] for name, words in SHOWN if name == "README"}


def test_from_python(tmp_path, monkeypatch, capsys):
    """The block runs as it is, but for the number of steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    code = block("python", section("From Python"))
    shorter = code.replace('["epochs=2"]', '["epochs=1", "max_steps=2", "plugins.figures=false"]')
    assert shorter != code
    exec(shorter, {})  # a name alone on the last line shows nothing there
    final, evaluated = capsys.readouterr().out.splitlines()[-1].split(maxsplit=1)
    assert f"'test_accuracy': {final}" in evaluated


@pytest.fixture(scope="module")
def ten_lines(tmp_path_factory):
    """The README's plugin: where it is installed, as its text says, and what a recipe may say."""
    text = section("Write a plugin in ten lines")
    home, target = tmp_path_factory.mktemp("trainkit_sign_sgd"), tmp_path_factory.mktemp("site")
    (home / re.search(r"`(trainkit_\w+\.py)`", text).group(1)).write_text(block("python", text))
    (home / "pyproject.toml").write_text(block("toml", text))
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(target), str(home)]
    subprocess.run(command, check=True, env={**os.environ, "PIP_ROOT_USER_ACTION": "ignore"})
    return target, re.search(r"`(sign_sgd: {.*})`", text).group(1)


def test_the_plugin_in_ten_lines_is_listed(ten_lines, trainkit):
    target, _ = ten_lines
    listed = json.loads(trainkit("plugins", "list", "--json", env={**os.environ, "PYTHONPATH": str(target)}).stdout)
    (found,) = [p for p in listed if p["name"] == "sign_sgd"]
    assert (found["distribution"], found["version"]) == ("trainkit-sign-sgd", "0.1.0")
    assert found["summary"] == "Replace gradients by their signs (Bernstein et al., ICML 2018)."


def test_a_recipe_that_lists_the_plugin_in_ten_lines_trains(ten_lines, small, trainkit):
    target, line = ten_lines
    small.write_text(small.read_text() + f"  {line}\n")
    done = trainkit("run", small, "max_steps=2", "--run-dir", "out", before=partial(import_from, target))
    assert done.returncode == 0, done.stderr
    locked = json.loads((small.parent / "out" / "plugins.lock.json").read_text())[-1]
    assert (locked["name"], locked["distribution"], locked["version"]) == ("sign_sgd", "trainkit-sign-sgd", "0.1.0")
    assert locked["options"] == {"scale": 0.5}


def test_the_plugin_in_ten_lines_does_what_it_says(ten_lines, monkeypatch):
    monkeypatch.syspath_prepend(ten_lines[0])
    made = importlib.import_module("trainkit_sign_sgd").SignSGD(scale=0.5)
    trained, fresh = run_steps({"sign_sgd": made}, steps=1).model, build_run({}).model
    for after, before in zip(trained.parameters(), fresh.parameters(), strict=True):
        step = (after - before).detach().abs()  # learning rate 0.1, or nothing where the gradient is 0
        torch.testing.assert_close(step, torch.where(step > 0.01, 0.05, 0.0))
