"""What is installed beside a recipe's plugins cannot change its run."""

import json

import pytest
import torch

from trainkit import load_recipe

from .environments import PLUGINS, ROOT, THIRD_PARTY, environment

pytestmark = pytest.mark.slow
RECIPE = ROOT / "recipes" / "quickstart.yaml"

# ``figures`` draws at the end, for seconds, and has no part in the numbers
TRAIN = """
import json, sys
from trainkit.cli import main

code = main(["run", sys.argv[1], "--run-dir", "run", "epochs=1", "max_steps=8", "plugins.figures=false"])
print(json.dumps([code, sorted(name for name in sys.modules if name.startswith(("trainkit_", "acme_")))]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run among its own plugins only and one among all there are: folder, exit code, imported plugins."""
    own = [PLUGINS[name] for name in load_recipe(RECIPE).plugins]
    everything = [*PLUGINS.values(), *THIRD_PARTY.values()]
    found = []
    for projects in (own, everything):
        folder = tmp_path_factory.mktemp("run")
        code, imported = environment(ROOT, *projects).evaluate(TRAIN, str(RECIPE), cwd=folder)
        found.append((folder / "run", code, imported))
    return found


def test_no_unlisted_plugin_is_imported(runs):
    own = sorted(f"trainkit_{name}" for name in load_recipe(RECIPE).plugins if name != "figures")
    for _, code, imported in runs:
        assert (code, imported) == (0, own)


def test_metrics_are_the_same_to_the_last_bit(runs):
    few, many = (folder for folder, _, _ in runs)
    assert (few / "metrics.jsonl").read_bytes() == (many / "metrics.jsonl").read_bytes()
    rows = (few / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["train_loss"] > 0


def test_weights_are_the_same_to_the_last_bit(runs):
    few, many = (torch.load(folder / "checkpoints" / "last.pt", weights_only=True) for folder, _, _ in runs)
    assert few["model"].keys() == many["model"].keys()
    for name, values in few["model"].items():
        assert torch.equal(values, many["model"][name]), name


def test_what_is_written_down_of_the_plugins_is_the_same(runs):
    few, many = (folder for folder, _, _ in runs)
    for name in ("plugins.lock.json", "recipe.yaml"):
        assert (few / name).read_bytes() == (many / name).read_bytes()
