import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from attrs import field
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.run import Schedule
from trainkit.testing import assert_refuses, parameters_of, run_steps
from trainkit_lookahead import Lookahead, LookaheadOptimizer

syncs = pytest.mark.parametrize("sync", ["every_k", "first_step"])


class Reference:
    """Both variants, one parameter at a time, as they are written down."""

    def __init__(self, optimizer, k, alpha, sync):
        self.optimizer, self.k, self.alpha, self.sync = optimizer, k, alpha, sync
        self.slow = {p: p.detach().clone() for p in self.params()} if sync == "every_k" else {}
        self.counter = 0

    def params(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self):
        self.optimizer.step()
        if self.sync == "every_k":  # Algorithm 1
            self.counter += 1
            if self.counter == self.k:
                self.counter = 0
                self.update()
        else:  # a counter that starts at 0 is looked at before it is raised
            if self.counter == 0:
                self.update()
            self.counter += 1
            if self.counter >= self.k:
                self.counter = 0

    def update(self):
        for fast in self.params():
            if fast not in self.slow:
                self.slow[fast] = torch.zeros_like(fast.data)
                self.slow[fast].copy_(fast.data)
            slow = self.slow[fast]
            slow.add_((fast.data - slow) * self.alpha)
            fast.data.copy_(slow)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


def make_params():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(8, 3, 3, 3), (8,), (5, 7), ()]]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def train(params, optimizer, steps, start=0, scheduler=None):
    for step in range(start, start + steps):
        set_gradients(params, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same_bits(ours, theirs):
    return all(
        torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))
        for a, b in zip(ours, theirs, strict=True)
    )


@given(st.integers(1, 7), st.floats(0.01, 1), st.sampled_from(["every_k", "first_step"]))
@settings(max_examples=15)
def test_every_bit_is_that_of_the_reference(k, alpha, sync):
    ours, theirs = make_params(), make_params()
    base, plain = sgd(ours), sgd(theirs)
    lookahead = LookaheadOptimizer(base, k=k, alpha=alpha, sync=sync)
    reference = Reference(plain, k, alpha, sync)
    # a scheduler sees the wrapper, as in a run; the reference's works on the plain optimizer
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(lookahead, 50)
    schedule_of_reference = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 50)
    for step in range(60):
        train(ours, lookahead, 1, step, schedule)
        set_gradients(theirs, step)
        reference.step()
        schedule_of_reference.step()
        assert same_bits(ours, theirs), f"step {step + 1}"


@pytest.mark.parametrize(("sync", "synchronised"), [("every_k", [5, 10, 15]), ("first_step", [1, 6, 11, 16])])
def test_synchronises_at_these_steps(sync, synchronised):
    params = make_params()
    optimizer = LookaheadOptimizer(sgd(params), k=5, alpha=0.5, sync=sync)
    found = []
    for step in range(16):
        train(params, optimizer, 1, step)
        if optimizer.slow and all(map(torch.equal, params, optimizer.slow)):
            found.append(step + 1)
    assert found == synchronised


def test_first_update_by_hand():
    param = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = LookaheadOptimizer(torch.optim.SGD([param], lr=1.0), k=2, alpha=0.25, sync="every_k")
    for expected in (0.0, 0.5):  # 1 - 1; then 0 - 1 = -1, and 1 + (-1 - 1) / 4
        param.grad = torch.ones(1)
        optimizer.step()
        assert param.item() == expected


def test_ramp_is_the_average_with_a_growing_decay_of_airbench94():
    """Its decay is ``0.95 ** 5 * (step / total) ** 3``; the average is moved to the weights, and copied into them."""
    ours, theirs = make_params(), make_params()
    plugin = Lookahead(k=5, alpha=1 - 0.95**5, ramp=3)
    optimizer = plugin.transform_optimizer(SimpleNamespace(total_steps=20), sgd(ours))
    plain = sgd(theirs)
    average = [p.detach().clone() for p in theirs]
    for step in range(1, 21):
        train(ours, optimizer, 1, step)
        train(theirs, plain, 1, step)
        if step % 5 == 0:
            decay = 0.95**5 * (step / 20) ** 3
            for mean, parameter in zip(average, theirs, strict=True):
                mean.lerp_(parameter.detach(), 1 - decay)
                parameter.data.copy_(mean)
        torch.testing.assert_close(ours, theirs, msg=lambda text, step=step: f"step {step}: {text}")


@plugin
class MomentumAndSteps:
    """The optimizer and schedule that Lookahead is built around."""

    @hookimpl
    def optimizer(self, params):
        return sgd(params)

    @hookimpl
    def scheduler(self, optimizer):
        return Schedule(torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), "step")


@plugin
class PlainLookahead:
    """The reference, in a run."""

    sync: str
    reference: Reference | None = field(init=False, default=None)

    @hookimpl
    def optimizer_step(self, run):
        self.reference = self.reference or Reference(run.optimizer, 5, 0.5, self.sync)
        self.reference.step()


@syncs
def test_a_run_gives_the_bits_of_the_reference(sync):
    ours = run_steps({"sgd": MomentumAndSteps(), "lookahead": Lookahead(sync=sync)}, steps=13)
    plain = run_steps({"sgd": MomentumAndSteps(), "lookahead": PlainLookahead(sync=sync)}, steps=13)
    without = run_steps({"sgd": MomentumAndSteps()}, steps=13)
    assert same_bits(parameters_of(ours), parameters_of(plain))
    assert not same_bits(parameters_of(ours), parameters_of(without))


@syncs
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_continues_exactly_from_a_state(sync, steps):
    ours, theirs = make_params(), make_params()
    whole, rest = (LookaheadOptimizer(sgd(params), k=5, alpha=0.5, sync=sync) for params in (ours, theirs))
    train(ours, whole, steps)
    for p, other in zip(theirs, ours, strict=True):
        p.data.copy_(other.data)
    rest.load_state_dict(copy.deepcopy(whole.state_dict()))
    train(ours, whole, 8, start=steps)
    train(theirs, rest, 8, start=steps)
    assert same_bits(ours, theirs)


def test_loading_copies_and_shares_again():
    first, second = make_params(), make_params()
    saved = LookaheadOptimizer(sgd(first), k=5, alpha=0.5, sync="every_k")
    train(first, saved, 7)
    base = sgd(second)
    loaded = LookaheadOptimizer(base, k=5, alpha=0.5, sync="every_k")
    loaded.load_state_dict(saved.state_dict())
    before = [s.clone() for s in loaded.slow]
    train(first, saved, 5)
    assert all(map(torch.equal, before, loaded.slow))
    assert loaded.param_groups is base.param_groups
    assert loaded.state is base.state
    loaded.param_groups[0]["lr"] = 0.0
    assert base.param_groups[0]["lr"] == 0.0


def test_is_an_optimizer_to_everything_around_it():
    params = make_params()
    base = torch.optim.Adam(params[:2], lr=0.1)
    optimizer = LookaheadOptimizer(base, k=2, alpha=0.5, sync="every_k")
    assert isinstance(optimizer, torch.optim.Optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
        train(params[:2], optimizer, 1, scheduler=scheduler)
    assert base.param_groups[0]["lr"] == pytest.approx(0.01)
    assert set(optimizer.state) == set(params[:2])
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    assert optimizer.step(lambda: torch.tensor(3.0)).item() == 3.0
    assert seen == [1]


def test_slow_weights_of_an_added_group_begin_where_it_does():
    params = make_params()
    optimizer = LookaheadOptimizer(sgd(params[:2]), k=2, alpha=0.5, sync="every_k")
    train(params, optimizer, 4)
    optimizer.add_param_group({"params": params[2:], "lr": 0.0, "weight_decay": 0.0})
    assert len(optimizer.base.param_groups) == 2
    start = [p.detach().clone() for p in params[2:]]
    train(params, optimizer, 4, start=4)
    assert all(map(torch.equal, optimizer.slow, params))
    assert all(map(torch.equal, start, params[2:]))


def test_weights_loaded_after_construction_are_where_it_begins():
    param = torch.nn.Parameter(torch.tensor([100.0]))
    optimizer = LookaheadOptimizer(torch.optim.SGD([param], lr=1.0), k=1, alpha=0.5, sync="every_k")
    param.data.fill_(1.0)
    param.grad = torch.ones(1)
    optimizer.step()
    assert param.item() == 0.5


def test_state_that_does_not_fit_is_one_clear_error():
    params = make_params()
    optimizer = LookaheadOptimizer(sgd(params), k=5, alpha=0.5, sync="every_k")
    with pytest.raises(RecipeError, match="without lookahead"):
        optimizer.load_state_dict(sgd(make_params()).state_dict())
    train(params, optimizer, 1)
    state = optimizer.state_dict()
    state["lookahead"] = {"steps": 1, "slow": [s.flatten() for s in optimizer.slow]}
    with pytest.raises(RecipeError, match="do not fit"):
        optimizer.load_state_dict(state)


def test_options_have_bounds():
    assert_refuses(Lookahead, "k", 0)
    assert_refuses(Lookahead, "alpha", 0, 1.5)
