import json
import math
import re

import pytest
import torch
from attrs import field
from torch import nn

import trainkit_non_finite
from trainkit import fit
from trainkit.errors import PluginError, RunError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import build_run, parameters_of, run_steps, watch
from trainkit_accumulate import Accumulate
from trainkit_non_finite import NonFinite


@plugin
class Poison:
    """Puts a value into gradients at one step."""

    step: int
    value: float = math.nan
    names: tuple = ("0.weight",)

    @hookimpl
    def gradients_ready(self, run):
        if run.step + 1 == self.step:
            for name, parameter in run.model.named_parameters():
                if name in self.names:
                    parameter.grad.view(-1)[1] = self.value


@plugin
class Watch:
    """Notes the gradient norm of each step, and saves the run at some."""

    every: int = 1
    norms: list = field(factory=list)
    saved: list = field(factory=list)
    evaluated: int = 0

    @hookimpl
    def gradients_ready(self, run):
        self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()])))

    @hookimpl
    def forward_end(self, run):
        self.evaluated += run.split == "test"

    @hookimpl
    def safe_point(self, run):
        if run.step % self.every == 0 or run.stop_reason:
            run.state_dict()
            self.saved.append(run.step)


def train_poisoned(tmp_path, poison, watch=None, **others):
    run = build_run({**others, "poison": poison, "watch": watch or Watch(), "non_finite": NonFinite()}, epochs=3)
    with pytest.raises(RunError) as caught:
        fit(run, tmp_path / "run")
    return run, str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_bad_update_is_not_made_and_earlier_saves_stay(tmp_path, value):
    watch = Watch()
    run, message = train_poisoned(tmp_path, Poison(step=6, value=value), watch)
    clean = run_steps({}, steps=5)
    assert all(map(torch.equal, parameters_of(run), parameters_of(clean)))
    assert watch.saved == [1, 2, 3, 4, 4, 5]
    assert "step 6 (epoch 2) is not finite" in message
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_the_message_names_parameters_and_the_update_before(tmp_path):
    watch = Watch()
    poison = Poison(step=6, names=("0.weight", "5.bias"))
    _, message = train_poisoned(tmp_path, poison, watch)
    assert "gradient norm nan (in 2 of 5 parameters: 0.weight, 5.bias)" in message
    lr, norm = re.search(r"learning rate (\S+) and gradient norm ([\d.e-]+)\.", message).groups()
    assert float(lr) == 0.1
    assert float(norm) == pytest.approx(watch.norms[4], rel=1e-4)


def test_long_lists_of_parameters_are_cut(tmp_path):
    def model(run):
        layers = [nn.Linear(run.data.shape[0] * 64 if n == 0 else 4, 4) for n in range(4)]
        return nn.Sequential(nn.Flatten(), *layers)

    names = tuple(f"{layer}.{part}" for layer in range(1, 5) for part in ("weight", "bias"))
    _, message = train_poisoned(tmp_path, Poison(step=1, names=names), deep=watch(model=model))
    assert "in 8 of 8 parameters: 1.weight, 1.bias, 2.weight, 2.bias, 3.weight and 3 more)" in message


def test_the_first_step_has_no_update_before_it(tmp_path):
    _, message = train_poisoned(tmp_path, Poison(step=1))
    assert "first step since the run was started" in message


def test_the_learning_rate_is_the_one_that_the_optimizer_used(tmp_path):
    def halve(optimizer):
        """Change the rate for the duration of the step only, as a warm-up may."""
        optimizer.register_step_pre_hook(lambda o, *_: o.param_groups[0].update(lr=0.05))
        optimizer.register_step_post_hook(lambda o, *_: o.param_groups[0].update(lr=0.1))
        return optimizer

    _, message = train_poisoned(tmp_path, Poison(step=2), halve=watch(transform_optimizer=halve))
    assert "learning rate 0.05 " in message


def _losses(values):
    """Return a plugin whose loss function adds a constant to each batch's loss; the gradients stay what they are."""

    def loss(run):
        def changed(output, target):
            constant = values[run.images // 8] if run.split == "train" else 0.0
            return torch.nn.functional.cross_entropy(output, target) + constant

        return changed

    return watch(loss=loss)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_bad_loss_with_good_gradients_fails_too(tmp_path, value):
    watch = Watch()
    _, message = train_poisoned(tmp_path, Poison(step=0), watch, losses=_losses([0.0, 0.0, value]))
    assert watch.saved == [1, 2]
    assert f"step 3 (epoch 1) is not finite: loss {value:g}, gradient norm {watch.norms[2]:g};" in message


def test_every_batch_of_an_accumulated_step_counts(tmp_path):
    others = {"accumulate": Accumulate(batches=2), "losses": _losses([0.0, 0.0, math.inf, 0.0])}
    _, message = train_poisoned(tmp_path, Poison(step=0), **others)
    assert "step 2 (epoch 1) is not finite: loss inf" in message


def test_nothing_is_changed_where_all_is_finite():
    plain, guarded = run_steps({}, steps=9), run_steps({"non_finite": NonFinite()}, steps=9)
    assert guarded.step == 9
    assert all(map(torch.equal, parameters_of(plain), parameters_of(guarded)))


def test_test_batches_may_have_any_loss():
    def loss(run):
        return lambda *args: torch.nn.functional.cross_entropy(*args) + (math.inf if run.split == "test" else 0)

    assert run_steps({"loss": watch(loss=loss), "non_finite": NonFinite()}, steps=9).step == 9


def test_parameters_without_gradients_are_left_out(tmp_path):
    def freeze(model):
        model[0].weight.requires_grad_(False)
        model.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
        return model

    _, message = train_poisoned(
        tmp_path, Poison(step=2, names=("5.bias",)), freeze=watch(transform_model=freeze), watch=watch()
    )
    assert "in 1 of 4 parameters: 5.bias" in message


def test_it_must_be_listed_above_grad_clip():
    with pytest.raises(PluginError, match=r"'non_finite' must come before 'grad_clip'"):
        build_run({"grad_clip": watch(), "non_finite": NonFinite()})
    build_run({"non_finite": NonFinite(), "grad_clip": watch()})


class LateEvent:
    """Stands for an event of a GPU that is a number of steps behind the host."""

    def __init__(self, number, delay, events):
        self.number, self.delay, self.events = number, delay, events
        self.waited = False

    def query(self):
        return len(self.events) - self.number > self.delay

    def synchronize(self):
        self.waited = not self.query()


@pytest.fixture
def late(monkeypatch):
    """Let values arrive only so many steps later; returns the events."""

    def install(delay):
        events = []

        def to_host(values):
            events.append(LateEvent(len(events), delay, events))
            return values.clone(), events[-1]

        monkeypatch.setattr(trainkit_non_finite, "_to_host", to_host)
        return events

    return install


def test_on_a_gpu_the_failure_comes_when_the_values_do_and_names_their_step(tmp_path, late):
    events = late(1)
    run, message = train_poisoned(tmp_path, Poison(step=2), Watch(every=100))
    assert "step 2 (epoch 1) is not finite" in message
    assert "in 1 of 5 parameters: 0.weight)" in message  # although by now all gradients are
    assert run.step == 2  # the update was made, and the step after it was not
    assert not any(event.waited for event in events)


@pytest.mark.parametrize("every", [1, 3])
def test_on_a_gpu_nothing_is_saved_from_the_bad_step_on(tmp_path, late, every):
    late(1000)
    watch = Watch(every=every)
    run, message = train_poisoned(tmp_path, Poison(step=2), watch)
    assert "step 2 (epoch 1) is not finite" in message
    assert all(step < 2 for step in watch.saved)
    assert run.step == max(every, 2)


def test_on_a_gpu_an_epochs_training_is_checked_before_its_evaluation(tmp_path, late):
    late(1000)
    watch = Watch(every=100)
    run, message = train_poisoned(tmp_path, Poison(step=4), watch)
    assert "step 4 (epoch 1) is not finite" in message
    assert (run.step, watch.evaluated, run.history) == (4, 0, [])


def test_on_a_gpu_the_weights_are_checked_before_the_test_split_is_evaluated_by_itself(tmp_path, late):
    """With eval_every, the first evaluation comes epochs later, and the checkpoint in between waits, too."""
    late(1000)
    watch = Watch(every=100)
    poison = Poison(step=2)
    plugins = {"poison": poison, "watch": watch, "non_finite": NonFinite()}
    run = build_run(plugins, epochs=4, eval_every=2)
    with pytest.raises(RunError, match=r"step 2 \(epoch 1\) is not finite"):
        fit(run, tmp_path / "run")
    assert (run.step, watch.evaluated) == (8, 0)


def test_on_a_gpu_a_stop_waits_too(tmp_path, late):
    late(1000)
    _, message = train_poisoned(
        tmp_path,
        Poison(step=2),
        watch(),
        stop=watch(step_end=lambda run: run.stop("enough") if run.step == 3 else None),
    )
    assert "step 2 (epoch 1) is not finite" in message


def test_on_a_gpu_steps_that_are_fine_are_not_waited_for(late):
    events = late(2)
    run = run_steps({"non_finite": NonFinite()}, steps=4)
    assert run.step == 4
    assert [event.waited for event in events] == [False, False, True, True]  # the last two at the epoch's end


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_reports_the_step_and_saves_nothing_after_it(tmp_path):
    watch = Watch(every=7)
    plugins = {"poison": Poison(step=5), "non_finite": NonFinite(), "watch": watch}
    run = build_run(plugins, epochs=9, device="cuda")
    with pytest.raises(RunError, match=r"step 5 \(epoch 2\) is not finite.*in 1 of 5 parameters: 0.weight\)"):
        fit(run, tmp_path / "run")
    assert watch.saved == []
