import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.errors import PluginError, RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import from_dict, make_options
from trainkit.session import fit
from trainkit.testing import build_run, run_steps
from trainkit_multi_step_lr import MultiStepLR

STEPS_PER_EPOCH = 4  # of the made data


@plugin
class Watch:
    """Notes the learning rate of each step, and keeps a checkpoint of one in memory."""

    lrs: list
    save_at: int = -1
    file: Any = None

    @hookimpl
    def gradients_ready(self, run):
        self.lrs.append(run.optimizer.param_groups[0]["lr"])

    @hookimpl
    def safe_point(self, run):
        if run.step == self.save_at and run.batch_index:
            torch.save(run.state_dict(), self.file)


def rates(steps, **options):
    watch = Watch(lrs=[])
    run_steps({"multi_step_lr": MultiStepLR(**options), "watch": watch}, steps=steps)
    return watch.lrs


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4, unique=True).map(sorted),
    st.floats(0.1, 2),
    st.sampled_from(["epoch", "step"]),
)
@settings(max_examples=15)
def test_rate_is_multiplied_at_each_milestone(milestones, gamma, unit):
    found = rates(16, milestones=milestones, gamma=gamma, unit=unit)
    done = [step // STEPS_PER_EPOCH if unit == "epoch" else step for step in range(16)]
    expected = [0.1 * gamma ** sum(m <= d for m in milestones) for d in done]
    assert found == pytest.approx(expected, rel=1e-12)


def test_unit_is_the_epoch_unless_given():
    assert rates(8, milestones=[1]) == pytest.approx([0.1] * 4 + [0.01] * 4)


def test_rates_are_exactly_torchs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7, 8], 0.3)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(12, milestones=[3, 7, 8], gamma=0.3, unit="step") == expected


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_continues_exactly_from_a_checkpoint_within_an_epoch(unit, tmp_path):
    options = {"milestones": [1, 2, 3] if unit == "epoch" else [4, 5, 7, 10], "unit": unit}
    file = io.BytesIO()
    whole, rest = Watch(lrs=[], save_at=6, file=file), Watch(lrs=[])
    run_steps({"multi_step_lr": MultiStepLR(**options), "watch": whole}, steps=14)
    run = build_run({"multi_step_lr": MultiStepLR(**options), "watch": rest}, epochs=1000, max_steps=14)
    file.seek(0)
    run.load_state_dict(torch.load(file, weights_only=True))
    fit(run, tmp_path / "run")
    assert rest.lrs == whole.lrs[6:]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "milestones"),
        ({"milestones": []}, "milestones"),
        ({"milestones": [0, 5]}, "milestones"),
        ({"milestones": [5, 5]}, "milestones"),
        ({"milestones": [9, 5]}, "milestones"),
        ({"milestones": 5}, "milestones"),
        ({"milestones": [5], "gamma": 0}, "gamma"),
        ({"milestones": [5], "unit": "batch"}, "unit"),
    ],
)
def test_wrong_options_are_one_clear_error(options, key):
    recipe = from_dict({"name": "r", "epochs": 1, "batch_size": 1, "plugins": {"multi_step_lr": options}})
    with pytest.raises(RecipeError, match=rf"plugins\.multi_step_lr\.{key}"):
        make_options(recipe, "multi_step_lr", MultiStepLR)


def test_a_run_has_one_schedule():
    with pytest.raises(PluginError, match="lr_schedule"):
        build_run({"first": MultiStepLR(milestones=[1]), "second": MultiStepLR(milestones=[2])})
