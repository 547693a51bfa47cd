from types import SimpleNamespace

import pytest
import torch
from attrs import field
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, MultiStepLR, OneCycleLR

from trainkit import Schedule
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import assert_refuses, build_run, parameters_of, run_steps, watch
from trainkit_accumulate import Accumulate
from trainkit_linear_warmup import LinearWarmup

STEPS_PER_EPOCH = 4  # of the made data

SCHEDULES = {
    "cosine": lambda o: CosineAnnealingLR(o, T_max=12, eta_min=0.03),  # computes each rate from the one before
    "steps": lambda o: MultiStepLR(o, [1, 3], gamma=0.1),
    "cycle": lambda o: OneCycleLR(o, max_lr=1.0, total_steps=30, cycle_momentum=False),  # ignores the one before
    "formula": lambda o: LambdaLR(o, lambda t: 1 / (1 + t)),
}


@plugin
class Scheduled:
    kind: str
    unit: str = "step"

    @hookimpl
    def scheduler(self, optimizer):
        return Schedule(SCHEDULES[self.kind](optimizer), self.unit)


@plugin
class SGD:
    """SGD in two parameter groups, which notes the rates that each update uses; perhaps wrapped, perhaps skipped."""

    used: list = field(factory=list)
    wrapped: bool = False
    skip: tuple = ()

    @hookimpl
    def optimizer(self, params):
        seen = self.used

        class Noting(torch.optim.SGD):
            def step(self, closure=None):
                seen.append([group["lr"] for group in self.param_groups])
                return super().step(closure)

        return Noting([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], lr=0.1, momentum=0.9)

    @hookimpl
    def transform_optimizer(self, optimizer):
        return Wrapper(optimizer) if self.wrapped else optimizer

    @hookimpl
    def optimizer_step(self, run):
        if run.step not in self.skip:  # as a gradient scaler does where gradients are infinite
            run.optimizer.step()


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another, whose groups it shares."""

    def __init__(self, base):
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self.param_groups, self.state = base.param_groups, base.state

    def step(self, closure=None):
        return self.base.step(closure)


def schedules_own(kind, unit, steps):
    """The rates of torch's scheduler alone, in a plain loop."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.02}], lr=0.1)
    scheduler = SCHEDULES[kind](optimizer)
    found = []
    for number in range(1, steps + 1):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if unit == "step" or number % STEPS_PER_EPOCH == 0:
            scheduler.step()
    return found


def used_rates(steps, warmup, before=None, after=None, **options):
    sgd = SGD(**options)
    plugins = {"sgd": sgd, "before": before, "linear_warmup": warmup, "after": after}
    run = run_steps({name: p for name, p in plugins.items() if p is not None}, steps=steps)
    return sgd.used, run


@pytest.mark.parametrize(("unit", "place"), [("step", "before"), ("epoch", "after")])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_rates_are_the_product_of_schedule_and_factor(kind, unit, place):
    found, _ = used_rates(12, LinearWarmup(steps=7, start_factor=0.1), **{place: Scheduled(kind=kind, unit=unit)})
    factors = [0.1 + 0.9 * min(t / 7, 1) for t in range(12)]
    own = schedules_own(kind, unit, 12)
    expected = [[rate * factor for rate in rates] for rates, factor in zip(own, factors, strict=True)]
    assert found == [pytest.approx(row, rel=1e-12) for row in expected]
    assert found[7:] == own[7:]  # to the last bit: nothing of the warm-up is left


@given(st.floats(0.001, 1), st.integers(1, 12))
@settings(max_examples=12)
def test_alone_it_is_torchs_linear_lr(start_factor, steps):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = LinearLR(optimizer, start_factor, total_iters=steps)
    expected = []
    for _ in range(14):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found, _ = used_rates(14, LinearWarmup(start_factor=start_factor, steps=steps))
    assert [rate for rate, _ in found] == pytest.approx(expected, rel=1e-12)


@given(st.floats(1e-6, 1), st.integers(1, 10**6), st.integers(0, 100))
@settings(max_examples=50)
def test_the_factor_ends_at_exactly_one(start_factor, steps, more):
    warmup = LinearWarmup(start_factor=start_factor, steps=steps)
    warmup.built(SimpleNamespace(optimizer=torch.optim.SGD([torch.zeros(1)])))
    assert warmup.factor(0) == start_factor
    assert warmup.factor(steps + more) == 1.0


@pytest.mark.parametrize(("epochs", "steps"), [(2.0, 8), (0.5, 2), (0.3, 1), (0.01, 1), (1.6, 6)])
def test_epochs_are_as_many_steps_as_they_have(epochs, steps):
    in_epochs, _ = used_rates(10, LinearWarmup(epochs=epochs))
    in_steps, _ = used_rates(10, LinearWarmup(steps=steps))
    assert in_epochs == in_steps


def test_epochs_with_accumulated_gradients_have_fewer_steps():
    warmup = LinearWarmup(epochs=2)
    build_run({"accumulate": Accumulate(batches=2), "linear_warmup": warmup}, epochs=5)  # 2 steps an epoch
    assert (warmup.factor(3), warmup.factor(4)) == (pytest.approx(1 / 3 + 2 / 3 * 3 / 4), 1.0)


def test_a_wrapped_optimizer_is_warmed_up_once():
    plain, _ = used_rates(6, LinearWarmup(steps=5), after=Scheduled(kind="cosine"))
    wrapped, _ = used_rates(6, LinearWarmup(steps=5), after=Scheduled(kind="cosine"), wrapped=True)
    assert wrapped == plain


def test_a_skipped_update_leaves_no_trace():
    plain, _ = used_rates(8, LinearWarmup(steps=5), after=Scheduled(kind="cosine"))
    found, _ = used_rates(8, LinearWarmup(steps=5), after=Scheduled(kind="cosine"), skip=(1, 2))
    assert found == [plain[0], *plain[3:]]


def test_updates_are_those_of_a_plain_loop_with_the_rates_set_by_hand():
    def set_rates(run):
        for group, rate in zip(run.optimizer.param_groups, (0.1, 0.02), strict=True):
            group["lr"] = rate * (0.2 + 0.8 * min(run.step / 5, 1))

    _, run = used_rates(9, LinearWarmup(steps=5, start_factor=0.2))
    by_hand = run_steps({"sgd": SGD(), "by_hand": watch(gradients_ready=set_rates)}, steps=9)
    torch.testing.assert_close(parameters_of(run), parameters_of(by_hand))


def test_an_epochs_record_holds_the_factor_that_was_reached():
    _, run = used_rates(16, LinearWarmup(steps=10, start_factor=0.5), before=Scheduled(kind="steps", unit="epoch"))
    assert [row["lr"] for row in run.history] == pytest.approx([0.1 * 0.7, 0.01 * 0.9, 0.01, 0.001])
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_an_optimizer_that_another_plugin_wraps_is_the_one_that_is_warmed_up():
    """The optimizer's hooks are set once all is built, so the order in the recipe does not matter."""
    found = []
    for first in ("sgd", "linear_warmup"):
        plugins = {"sgd": SGD(wrapped=True), "linear_warmup": LinearWarmup(steps=5)}
        ordered = {first: plugins[first], **plugins}
        run_steps(ordered, steps=6)
        found.append(plugins["sgd"].used)
    assert found[0] == found[1]
    assert found[0][0][0] == pytest.approx(0.1 / 3)


def test_wrong_options_are_one_clear_error():
    for options, which in (({}, "neither is"), ({"steps": 5, "epochs": 1}, "both are")):
        with pytest.raises(ValueError, match=f"either 'steps' or 'epochs', and {which} given"):
            LinearWarmup(**options)
    assert_refuses(LinearWarmup, "steps", 0)
    assert_refuses(LinearWarmup, "epochs", 0, -1.5)
    assert_refuses(LinearWarmup, "start_factor", 0, 1.1, steps=5)
