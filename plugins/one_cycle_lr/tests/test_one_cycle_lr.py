import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.errors import PluginError, RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import assert_refuses, build_run, run_steps, watch
from trainkit_one_cycle_lr import OneCycleLR


@plugin
class Optimizer:
    """An optimizer with a momentum to cycle."""

    name: str = "sgd"

    @hookimpl
    def optimizer(self, params):
        if self.name == "adam":
            return torch.optim.Adam(params)
        return torch.optim.SGD(params, lr=0.5, momentum=0.1)


def seen(steps, epochs=1000, optimizer="sgd", **options):
    """Return rate and momentum of each step."""
    found = []

    def note(run):
        (group,) = run.optimizer.param_groups
        found.append((group["lr"], group["betas"][0] if "betas" in group else group["momentum"]))

    cycle = {"optimizer": Optimizer(name=optimizer), "one_cycle_lr": OneCycleLR(**options)}
    run = run_steps({**cycle, "note": watch(gradients_ready=note)}, steps=steps, epochs=epochs)
    return found, run


def torchs(steps, optimizer="sgd", **options):
    """torch's own scheduler, in a plain loop."""
    weight = torch.nn.Parameter(torch.zeros(1))
    made = Optimizer(name=optimizer).optimizer([weight])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(made, **options)
    (group,), found = made.param_groups, []
    for number in range(steps):
        found.append((group["lr"], group["betas"][0] if "betas" in group else group["momentum"]))
        made.step()
        if number + 1 < steps:
            scheduler.step()
    return found


@given(
    st.fixed_dictionaries(
        {"max_lr": st.floats(0.01, 1), "pct_start": st.floats(0.2, 0.45)},
        optional={
            "anneal_strategy": st.sampled_from(["cos", "linear"]),
            "cycle_momentum": st.booleans(),
            "base_momentum": st.floats(0.5, 0.8),
            "max_momentum": st.floats(0.8, 0.99),
            "div_factor": st.floats(1, 100),
            "final_div_factor": st.floats(1, 1e5),
            "three_phase": st.booleans(),
        },
    ),
    st.sampled_from(["sgd", "adam"]),
)
@settings(max_examples=12)
def test_rates_and_momenta_are_exactly_torchs(options, optimizer):
    options |= {"total_steps": 14}
    found, _ = seen(14, optimizer=optimizer, **options)
    assert found == torchs(14, optimizer=optimizer, **options)


def test_the_cycle_is_the_documented_one():
    found, _ = seen(11, max_lr=0.5, total_steps=11, pct_start=5 / 11, anneal_strategy="linear", final_div_factor=100)
    rates = [lr for lr, _ in found]
    rise = [0.02 + (0.5 - 0.02) * i / 4 for i in range(5)]
    fall = [0.5 + (0.0002 - 0.5) * i / 6 for i in range(1, 7)]
    assert rates == pytest.approx(rise + fall)
    assert [m for _, m in found] == pytest.approx(
        [0.95 - 0.1 * i / 4 for i in range(5)] + [0.85 + 0.1 * i / 6 for i in range(1, 7)]
    )


@pytest.mark.parametrize(("steps", "epochs"), [(12, 3), (10, 3), (10, 1000)])
def test_by_default_it_ends_exactly_where_the_run_does_also_at_max_steps(steps, epochs):
    found, run = seen(steps, epochs=epochs, max_lr=0.1)
    assert found == torchs(steps, max_lr=0.1, total_steps=steps)
    assert found[-1][0] == run.history[-1]["lr"] == pytest.approx(0.1 / 25 / 1e4)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_beyond_the_cycle_the_rate_stays_at_its_end(strategy):
    found, run = seen(10, max_lr=0.1, total_steps=6, anneal_strategy=strategy)
    assert found[6:] == [found[5]] * 4
    assert found[5][0] == pytest.approx(0.1 / 25 / 1e4)
    assert run.optimizer.param_groups[0]["lr"] == found[5][0]


def test_parameter_groups_keep_the_proportions_of_their_rates():
    def groups(params):
        return torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "lr": 5.0}], lr=0.5, momentum=0.9)

    seen = []
    note = watch(gradients_ready=lambda run: seen.append([group["lr"] for group in run.optimizer.param_groups]))
    run_steps({"optimizer": watch(optimizer=groups), "one_cycle_lr": OneCycleLR(max_lr=0.1), "note": note}, steps=9)
    single = [lr for lr, _ in torchs(9, max_lr=0.1, total_steps=9)]
    assert [lr for lr, _ in seen] == single
    assert [lr for _, lr in seen] == pytest.approx([10 * lr for lr in single])


def test_an_optimizer_of_rate_0_has_the_rate_of_the_cycle():
    sgd = watch(optimizer=lambda params: torch.optim.SGD(params, lr=0.0, momentum=0.9))
    run = build_run({"sgd": sgd, "one_cycle_lr": OneCycleLR(max_lr=0.1, div_factor=4)})
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


@pytest.mark.parametrize("pct_start", [0.0, 1.0])
def test_a_cycle_may_only_fall_or_only_rise(pct_start):
    found, _ = seen(8, max_lr=0.1, total_steps=8, pct_start=pct_start)
    rates = [lr for lr, _ in found]
    assert all(math.isfinite(lr) and lr > 0 for lr in rates)
    assert rates == sorted(rates, reverse=pct_start == 0)
    assert max(rates) == pytest.approx(0.1, rel=0.1)


def test_an_optimizer_without_momentum_says_what_to_set():
    adagrad = watch(optimizer=lambda params: torch.optim.Adagrad(params, lr=0.1))
    with pytest.raises(RecipeError, match=r"Adagrad has neither a momentum nor betas.*set cycle_momentum: false"):
        build_run({"adagrad": adagrad, "one_cycle_lr": OneCycleLR(max_lr=0.1)})
    build_run({"adagrad": adagrad, "one_cycle_lr": OneCycleLR(max_lr=0.1, cycle_momentum=False)})


@pytest.mark.parametrize("three_phase", [False, True])
def test_a_rise_of_one_step_is_one_clear_error(three_phase):
    cycle = OneCycleLR(max_lr=0.1, total_steps=10, pct_start=0.1, three_phase=three_phase)
    with pytest.raises(RecipeError, match="'pct_start': 0.1 of 10 steps is one step"):
        build_run({"optimizer": Optimizer(), "one_cycle_lr": cycle})


def test_wrong_options_are_one_clear_error():
    assert_refuses(OneCycleLR, "max_lr")
    assert_refuses(OneCycleLR, "max_lr", 0)
    for key, value in {
        "total_steps": 0,
        "pct_start": 1.1,
        "anneal_strategy": "exp",
        "base_momentum": 1,
        "max_momentum": -0.1,
        "div_factor": 0,
        "final_div_factor": 0,
    }.items():
        assert_refuses(OneCycleLR, key, value, max_lr=0.1)


def test_a_run_has_one_schedule():
    cycle = {"optimizer": Optimizer(), "first": OneCycleLR(max_lr=0.1), "second": OneCycleLR(max_lr=0.1)}
    with pytest.raises(PluginError, match="lr_schedule"):
        build_run(cycle)
