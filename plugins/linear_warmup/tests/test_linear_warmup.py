import io
from typing import Any

import pytest
import torch
from attrs import field
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, MultiStepLR, OneCycleLR

from trainkit import Schedule, fit
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import from_dict, make_options
from trainkit.testing import build_run, parameters_of, run_steps
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


@plugin
class Save:
    step: int
    file: Any

    @hookimpl
    def safe_point(self, run):
        if run.step == self.step:
            torch.save(run.state_dict(), self.file)


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


@pytest.mark.parametrize("unit", ["step", "epoch"])
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_rates_are_the_product_of_schedule_and_factor(kind, place, unit):
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
def test_the_factor_ends_at_exactly_one(start_factor, steps, more):
    warmup = LinearWarmup(start_factor=start_factor, steps=steps)
    build_length(warmup)
    assert warmup.factor(0) == start_factor
    assert warmup.factor(steps + more) == 1.0


def build_length(warmup):
    warmup.scheduler(None, torch.optim.SGD([torch.zeros(1)]))


@pytest.mark.parametrize(("epochs", "steps"), [(2.0, 8), (0.5, 2), (0.3, 1), (0.01, 1), (1.6, 6)])
def test_epochs_are_as_many_steps_as_they_have_batches(epochs, steps):
    in_epochs, _ = used_rates(10, LinearWarmup(epochs=epochs))
    in_steps, _ = used_rates(10, LinearWarmup(steps=steps))
    assert in_epochs == in_steps


def test_a_wrapped_optimizer_is_warmed_up_once():
    plain, _ = used_rates(6, LinearWarmup(steps=5), after=Scheduled(kind="cosine"))
    wrapped, _ = used_rates(6, LinearWarmup(steps=5), after=Scheduled(kind="cosine"), wrapped=True)
    assert wrapped == plain


def test_a_skipped_update_leaves_no_trace():
    plain, _ = used_rates(8, LinearWarmup(steps=5), after=Scheduled(kind="cosine"))
    found, _ = used_rates(8, LinearWarmup(steps=5), after=Scheduled(kind="cosine"), skip=(1, 2))
    assert found == [plain[0], *plain[3:]]


def test_updates_are_those_of_a_plain_loop_with_the_rates_set_by_hand():
    @plugin
    class ByHand:
        @hookimpl
        def gradients_ready(self, run):
            for group, rate in zip(run.optimizer.param_groups, (0.1, 0.02), strict=True):
                group["lr"] = rate * (0.2 + 0.8 * min(run.step / 5, 1))

    _, run = used_rates(9, LinearWarmup(steps=5, start_factor=0.2))
    by_hand = run_steps({"sgd": SGD(), "by_hand": ByHand()}, steps=9)
    torch.testing.assert_close(parameters_of(run), parameters_of(by_hand))


def test_an_epochs_record_holds_the_factor_that_was_reached():
    _, run = used_rates(16, LinearWarmup(steps=10, start_factor=0.5), before=Scheduled(kind="steps", unit="epoch"))
    assert [row["lr"] for row in run.history] == pytest.approx([0.1 * 0.7, 0.01 * 0.9, 0.01, 0.001])
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_continues_exactly_from_the_middle_of_the_warm_up(unit, tmp_path):
    def plugins(sgd, step):
        warmup = LinearWarmup(steps=9)
        return {
            "schedule": Scheduled(kind="cosine", unit=unit), "sgd": sgd, "linear_warmup": warmup,
            "save": Save(step=step, file=file),
        }  # fmt: skip

    file, whole, rest = io.BytesIO(), SGD(), SGD()
    finished = run_steps(plugins(whole, 6), steps=14)
    run = build_run(plugins(rest, -1), epochs=1000, max_steps=14)
    file.seek(0)
    run.load_state_dict(torch.load(file, weights_only=True))
    fit(run, tmp_path / "run")
    assert rest.used == whole.used[6:]
    assert run.history == finished.history
    assert all(map(torch.equal, parameters_of(finished), parameters_of(run)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"steps: .*either 'steps' or 'epochs', and neither is given"),
        ({"steps": 5, "epochs": 1}, r"steps: .*either 'steps' or 'epochs', and both are given"),
        ({"steps": 0}, "steps"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": -1.5}, "epochs"),
        ({"steps": 5, "start_factor": 0}, "start_factor"),
        ({"steps": 5, "start_factor": 1.1}, "start_factor"),
    ],
)
def test_wrong_options_are_one_clear_error(options, message):
    recipe = from_dict({"name": "r", "epochs": 1, "batch_size": 1, "plugins": {"linear_warmup": options}})
    with pytest.raises(RecipeError, match=rf"plugins\.linear_warmup\.{message}"):
        make_options(recipe, "linear_warmup", LinearWarmup)
