from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit import fit
from trainkit.data import epoch_permutation
from trainkit.errors import PluginError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import assert_conforms, build_run, fake_data, parameters_of, record_hooks, run_steps
from trainkit_accumulate import Accumulate


@plugin
class Setup:
    """Any number of images, and a network without batch normalization, whose gradients are means over images."""

    images: int = 32
    lr: float = 0.05

    @hookimpl
    def data(self):
        return fake_data(self.images)

    @hookimpl
    def model(self, run):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, len(run.data.classes)))

    @hookimpl
    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9, weight_decay=1e-3)


@settings(max_examples=15)
@given(st.integers(2, 40), st.integers(1, 9), st.integers(1, 5))
def test_equals_batches_of_the_joined_size(images, batch_size, batches):
    steps = 3 * -(-images // (batch_size * batches))  # three epochs
    setup, accumulate = Setup(images=images), Accumulate(batches=batches)
    parts = run_steps({"setup": setup, "accumulate": accumulate}, steps=steps, batch_size=batch_size)
    whole = run_steps({"setup": setup}, steps=steps, batch_size=batch_size * batches)
    assert parts.epoch == whole.epoch == 3
    for mine, other in zip(parameters_of(parts), parameters_of(whole), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@plugin
class Steps:
    """Keeps the gradient of each step and the losses of the batches."""

    gradients: list
    losses: list

    @hookimpl
    def forward_end(self, run, loss):
        if run.split == "train":
            self.losses.append(loss.detach())

    @hookimpl
    def gradients_ready(self, run):
        self.gradients.append(run.model[0].weight.grad.clone())


def test_each_image_of_a_step_counts_the_same_in_an_epochs_last_step_too():
    """27 images in batches of 4, the last of 3: steps of 8, 8, 8 and 3 images, with weights that stay the same."""
    steps, setup = Steps(gradients=[], losses=[]), Setup(images=27, lr=0.0)
    run = run_steps({"setup": setup, "accumulate": Accumulate(), "steps": steps}, steps=4, batch_size=4)
    (epoch,) = build_run({"setup": setup}, batch_size=27).batches["train"].iterate(epoch_permutation(0, 0, 27))
    output = run.model(epoch.images.float() / 255)
    for first, gradient in zip(range(0, 27, 8), steps.gradients, strict=True):
        loss = nn.functional.cross_entropy(output[first : first + 8], epoch.targets[first : first + 8])
        by_hand = torch.autograd.grad(loss, run.model[0].weight, retain_graph=True)[0]
        torch.testing.assert_close(gradient, by_hand)
    for first, loss in zip(range(0, 27, 4), steps.losses, strict=True):  # other plugins see the plain loss
        torch.testing.assert_close(
            loss, nn.functional.cross_entropy(output[first : first + 4], epoch.targets[first : first + 4]).detach()
        )


@pytest.mark.parametrize(("batches", "steps"), [(1, 4), (2, 2), (3, 2), (4, 1), (9, 1)])
def test_one_step_and_one_safe_point_after_so_many_batches(batches, steps):
    @plugin
    class Watcher:
        """Takes part in every hook of a step."""

        @hookimpl
        def forward_end(self):
            pass

        @hookimpl
        def gradients_ready(self):
            pass

        @hookimpl
        def step_end(self):
            pass

        @hookimpl
        def safe_point(self):
            pass

    fired = Counter(record_hooks({"accumulate": Accumulate(batches=batches), "w": Watcher()}, steps=99, epochs=1))
    assert fired["backward", "accumulate"] == 4
    assert fired["gradients_ready", "w"] == fired["step_end", "w"] == steps
    assert fired["safe_point", "w"] == steps + 1  # and at the epoch's end


def test_one_batch_a_step_is_what_happens_without():
    plain, one = run_steps({}, steps=6), run_steps({"accumulate": Accumulate(batches=1)}, steps=6)
    assert all(map(torch.equal, parameters_of(plain), parameters_of(one)))


@pytest.mark.parametrize("batches", [2, 3])
def test_it_conforms(batches):
    assert_conforms(Accumulate, batches=batches)


@plugin
class StopAt:
    """Asks the run to stop while a training batch is being looked at."""

    batch: int

    @hookimpl
    def forward_end(self, run):
        if run.split == "train" and run.batch_index == self.batch:
            run.stop("enough")


@pytest.mark.parametrize("batch", [0, 1, 2, 3])
def test_a_run_stopped_within_a_step_completes_it_and_continues_exactly(tmp_path, batch):
    whole = build_run({"accumulate": Accumulate(batches=3)}, epochs=2)
    fit(whole, tmp_path / "whole")
    first = build_run({"accumulate": Accumulate(batches=3), "stop": StopAt(batch=batch)}, epochs=2)
    fit(first, tmp_path / "first")
    assert first.batch_index == (3 if batch < 3 else 4)
    second = build_run({"accumulate": Accumulate(batches=3)}, epochs=2)
    second.load_state_dict(first.state_dict())
    fit(second, tmp_path / "second")
    assert second.step == whole.step == 4
    assert all(map(torch.equal, parameters_of(second), parameters_of(whole)))


def test_who_else_computes_gradients_is_named():
    @plugin
    class Other:
        """Another way to compute gradients."""

        @hookimpl
        def backward(self, loss):
            loss.backward()

    with pytest.raises(PluginError, match="'accumulate' and plugin 'other' both provide it"):
        build_run({"accumulate": Accumulate(), "other": Other()})


@pytest.mark.parametrize("batches", [0, -2])
def test_batches_must_be_at_least_one(batches):
    with pytest.raises(ValueError, match="'batches'"):
        Accumulate(batches=batches)


def test_schedules_are_built_for_the_steps_that_will_be_taken():
    run = build_run({"accumulate": Accumulate(batches=3)}, epochs=2)  # 32 images in batches of 8
    assert (run.batches_per_epoch, run.steps_per_epoch) == (4, 2)
