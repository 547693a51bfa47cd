import io
import math
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
from trainkit_cosine_annealing_lr import CosineAnnealingLR

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


def rates(steps, epochs=1000, **options):
    watch = Watch(lrs=[])
    run_steps({"cosine_annealing_lr": CosineAnnealingLR(**options), "watch": watch}, steps=steps, epochs=epochs)
    return watch.lrs


def formula(t, t_max, eta_min, lr=0.1):
    return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * t / t_max)) / 2


@given(st.integers(1, 20), st.floats(0, 0.1), st.sampled_from(["epoch", "step"]))
@settings(max_examples=15)
def test_rate_follows_the_formula(t_max, eta_min, unit):
    found = rates(16, t_max=t_max, eta_min=eta_min, unit=unit)
    done = [step // STEPS_PER_EPOCH if unit == "epoch" else step for step in range(16)]
    assert found == pytest.approx([formula(t, t_max, eta_min) for t in done], rel=1e-9, abs=1e-12)


def test_by_default_it_spans_the_whole_run_by_epochs():
    found = rates(12, epochs=3, eta_min=0.001)
    expected = [formula(epoch, 3, 0.001) for epoch in range(3) for _ in range(STEPS_PER_EPOCH)]
    assert found == pytest.approx(expected)


def test_by_default_it_spans_the_whole_run_by_steps():
    watch = Watch(lrs=[])
    plugins = {"cosine_annealing_lr": CosineAnnealingLR(eta_min=0.001, unit="step"), "watch": watch}
    run = run_steps(plugins, steps=12, epochs=3)
    assert watch.lrs == pytest.approx([formula(step, 12, 0.001) for step in range(12)])
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_rates_are_exactly_torchs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12, eta_min=0.001)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(12, t_max=12, eta_min=0.001, unit="step") == expected


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_continues_exactly_from_a_checkpoint_within_an_epoch(unit, tmp_path):
    options = {"t_max": 4 if unit == "epoch" else 14, "unit": unit}
    file = io.BytesIO()
    whole, rest = Watch(lrs=[], save_at=6, file=file), Watch(lrs=[])
    run_steps({"cosine_annealing_lr": CosineAnnealingLR(**options), "watch": whole}, steps=14)
    run = build_run({"cosine_annealing_lr": CosineAnnealingLR(**options), "watch": rest}, epochs=1000, max_steps=14)
    file.seek(0)
    run.load_state_dict(torch.load(file, weights_only=True))
    fit(run, tmp_path / "run")
    assert rest.lrs == whole.lrs[6:]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"t_max": 0}, "t_max"),
        ({"t_max": 1.5}, "t_max"),
        ({"eta_min": -0.1}, "eta_min"),
        ({"unit": "batch"}, "unit"),
    ],
)
def test_wrong_options_are_one_clear_error(options, key):
    recipe = from_dict({"name": "r", "epochs": 1, "batch_size": 1, "plugins": {"cosine_annealing_lr": options}})
    with pytest.raises(RecipeError, match=rf"plugins\.cosine_annealing_lr\.{key}"):
        make_options(recipe, "cosine_annealing_lr", CosineAnnealingLR)


def test_a_run_has_one_schedule():
    with pytest.raises(PluginError, match="lr_schedule"):
        build_run({"first": CosineAnnealingLR(), "second": CosineAnnealingLR()})
