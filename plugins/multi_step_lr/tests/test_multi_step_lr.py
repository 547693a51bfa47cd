import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.errors import PluginError
from trainkit.testing import assert_refuses, build_run, run_steps, watch
from trainkit_multi_step_lr import MultiStepLR

STEPS_PER_EPOCH = 4  # of the made data


def rates(steps, **options):
    lrs = []
    note = watch(gradients_ready=lambda run: lrs.append(run.optimizer.param_groups[0]["lr"]))
    run_steps({"multi_step_lr": MultiStepLR(**options), "note": note}, steps=steps)
    return lrs


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4, unique=True).map(sorted),
    st.floats(0.1, 2),
    st.sampled_from(["epoch", "step"]),
)
@settings(max_examples=10)
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


def test_wrong_options_are_one_clear_error():
    assert_refuses(MultiStepLR, "milestones")
    assert_refuses(MultiStepLR, "milestones", [], [0, 5], [5, 5], [9, 5], 5)
    assert_refuses(MultiStepLR, "gamma", 0, milestones=[5])
    assert_refuses(MultiStepLR, "unit", "batch", milestones=[5])


def test_a_run_has_one_schedule():
    with pytest.raises(PluginError, match="lr_schedule"):
        build_run({"first": MultiStepLR(milestones=[1]), "second": MultiStepLR(milestones=[2])})
