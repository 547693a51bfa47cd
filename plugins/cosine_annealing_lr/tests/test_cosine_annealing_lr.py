import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.errors import PluginError
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
