import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit import build, fit, load_recipe
from trainkit.errors import PluginError, RecipeError
from trainkit.session import reopen
from trainkit.testing import assert_refuses, build_run, run_steps, watch
from trainkit_cosine_annealing_lr import CosineAnnealingLR

STEPS_PER_EPOCH = 4  # of the made data


def rates(steps, epochs=1000, **options):
    """Return the learning rate of each step, and the one that would come next."""
    lrs = []
    note = watch(gradients_ready=lambda run: lrs.append(run.optimizer.param_groups[0]["lr"]))
    run = run_steps({"cosine_annealing_lr": CosineAnnealingLR(**options), "note": note}, steps=steps, epochs=epochs)
    return lrs, run.optimizer.param_groups[0]["lr"]


def formula(t, t_max, eta_min, lr=0.1):
    return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * t / t_max)) / 2


@given(st.integers(1, 20), st.floats(0, 0.1), st.sampled_from(["epoch", "step"]))
@settings(max_examples=10)
def test_rate_follows_the_formula(t_max, eta_min, unit):
    found, _ = rates(16, t_max=t_max, eta_min=eta_min, unit=unit)
    done = [step // STEPS_PER_EPOCH if unit == "epoch" else step for step in range(16)]
    assert found == pytest.approx([formula(t, t_max, eta_min) for t in done], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("steps", "epochs"), [(12, 3), (10, 3), (10, 1000)])
def test_by_default_it_ends_where_the_run_does_also_at_max_steps(steps, epochs):
    found, end = rates(steps, epochs=epochs, eta_min=0.001, unit="step")
    assert found == pytest.approx([formula(step, steps, 0.001) for step in range(steps)])
    assert end == pytest.approx(0.001, rel=1e-12)
    found, end = rates(steps, epochs=epochs, eta_min=0.001)  # by epochs: 3, the last perhaps cut short
    assert found == pytest.approx([formula(step // STEPS_PER_EPOCH, 3, 0.001) for step in range(steps)])
    assert end == pytest.approx(0.001 if steps == 12 else found[-1])


def test_rates_are_exactly_torchs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12, eta_min=0.001)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(12, t_max=12, eta_min=0.001, unit="step")[0] == expected


def test_wrong_options_are_one_clear_error():
    assert_refuses(CosineAnnealingLR, "t_max", 0, 1.5)
    assert_refuses(CosineAnnealingLR, "eta_min", -0.1)
    assert_refuses(CosineAnnealingLR, "unit", "batch")


def test_a_run_has_one_schedule():
    with pytest.raises(PluginError, match="lr_schedule"):
        build_run({"first": CosineAnnealingLR(), "second": CosineAnnealingLR()})


RECIPE = """\
name: longer
epochs: 4
batch_size: 256
device: cpu
plugins:
  digits:
  normalize: {mean: [0.305], std: [0.376]}
  resnet: {stem: 4, blocks: [1], channels: [4]}
  cross_entropy:
  sgd: {lr: 0.1}
  cosine_annealing_lr: {eta_min: 0.001}
  metric_log:
  checkpoint:
"""


@pytest.mark.parametrize("max_epochs", [2, 4])
def test_a_longer_run_goes_on_falling_where_it_was_and_only_if_it_may(tmp_path, monkeypatch, max_epochs):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    run = build(load_recipe("recipe.yaml"))
    fit(run, "run", max_steps=6 * max_epochs)
    # One epoch more than the schedule was made for would make the rate rise again.
    with pytest.raises(RecipeError, match="would climb again.*or set its option `stretch: true`"):
        reopen("run", ["epochs=6"])
    run = reopen("run", ["epochs=6", "plugins.cosine_annealing_lr.stretch=true"])
    fit(run)
    found = [row["lr"] for row in run.history]
    before = [formula(t, 4, 0.001) for t in range(max_epochs)]
    # What was left of the half cosine is passed through over what is left of six epochs.
    left = [max_epochs + (4 - max_epochs) * (t - max_epochs) / (6 - max_epochs) for t in range(max_epochs, 6)]
    assert found == pytest.approx(before + [formula(t, 4, 0.001) for t in left])
    assert found == sorted(found, reverse=True)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
