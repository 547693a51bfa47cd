import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from trainkit.cli import main
from trainkit_recipe_schema import recipe_schema

FOLDER = Path(__file__).parents[3] / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("[!_]*.yaml") if not path.name.endswith(".study.yaml"))
SMALL = "name: a\nepochs: 1\nbatch_size: 8\nplugins: %s\n"


@pytest.fixture(scope="module")
def check():
    """Return what is wrong with a recipe's text, by path."""
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    return lambda text: [
        ".".join(map(str, error.absolute_path)) for error in validator.iter_errors(yaml.safe_load(text))
    ]


def test_our_recipes_are_valid(check):
    assert len(RECIPES) >= 8
    assert {path.name: found for path in RECIPES if (found := check(path.read_text()))} == {}


@pytest.mark.parametrize(
    "plugins", ["{se: , ema: false}", "{random_erasing@second: {p: 0.5}}", "{mixup: {alpha: 0.2}}"]
)
def test_what_a_recipe_may_say_is_valid(check, plugins):
    assert check(SMALL % plugins) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (SMALL % "{sgdd: {lr: 0.1}}", "plugins"),
        (SMALL % "{sgd: {lrr: 0.1}}", "plugins.sgd"),
        (SMALL % "{sgd: {lr: fast}}", "plugins.sgd"),
        (SMALL % "{grad_clip: {limit: -1}}", "plugins.grad_clip"),
        (SMALL % "{grad_clip: {mode: median}}", "plugins.grad_clip"),
        (SMALL % "{resnet: {blocks: 3}}", "plugins.resnet"),
        (SMALL % "{resnet: {blocks: [0]}}", "plugins.resnet"),
        (SMALL % "{}" + "epoch: 3\n", ""),
        ("name: a\nepochs: 0\nbatch_size: 8\n", "epochs"),
        ("name: a\nbatch_size: 8\n", ""),
    ],
)
def test_a_mistake_is_found_where_it_is(check, text, place):
    assert place in check(text)


def test_the_command_writes_it(tmp_path, capsys):
    assert main(["recipes", "schema", "-o", str(tmp_path / "schema.json")]) == 0
    written = json.loads((tmp_path / "schema.json").read_text())
    lookahead = written["$defs"]["lookahead"]["anyOf"][0]["properties"]["k"]
    assert (lookahead["type"], lookahead["minimum"]) == ("integer", 1)
    assert "description" in lookahead
    capsys.readouterr()
    assert main(["recipes", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == written
