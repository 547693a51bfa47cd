"""The short CIFAR-10 recipes: their parts fit each other, on made images of CIFAR-10's shape."""

from pathlib import Path

import pytest

from trainkit.recipe import load_recipe, make_options
from trainkit.registry import find
from trainkit.testing import build_run, fake_data, watch

RECIPES = Path(__file__).parents[1] / "recipes"
OBSERVERS = ("model_summary", "metric_log", "figures", "progress", "ledger", "weights", "checkpoint")


def built(name):
    """Build the recipe's plugins, but for those that only watch, on few images."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    installed = find(recipe)
    names = [plugin for plugin in recipe.plugins if plugin != "cifar10" and plugin not in OBSERVERS]
    data = {"data": watch(data=lambda: fake_data(n=16, classes=10, size=32))}
    return recipe, build_run(
        data | {plugin: make_options(recipe, plugin, installed[plugin].load()) for plugin in names}
    )


@pytest.mark.parametrize(
    ("name", "highest", "rates"),
    [("cifar94", 1.5, [1, 64]), ("basic_se_fast", 0.6, [1, 1]), ("dense_shared_fast", 0.6, [1, 0.3, 1])],
)
def test_it_has_the_networks_parameters_and_the_rates_that_it_states(name, highest, rates):
    recipe, run = built(name)
    assert run.parameters == recipe.expect["parameters"]
    groups = run.optimizer.param_groups
    assert [group["lr"] / groups[0]["lr"] for group in groups] == pytest.approx(rates)
    assert [group["max_lr"] for group in groups] == pytest.approx([highest * rate for rate in rates])
    order = [step.partition("/")[0] for step, _ in run.transforms["train"].steps]
    assert order[:3] == ["random_crop", "alternating_flip", "normalize"]
    assert [step for step, _ in run.transforms["test"].steps] == ["normalize/test"]
