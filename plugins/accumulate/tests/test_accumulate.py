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
from trainkit.testing import build_run, fake_data, parameters_of, record_hooks, run_steps, watch
from trainkit_accumulate import Accumulate
from trainkit_metrics import Metrics


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


@settings(max_examples=10)
@given(st.integers(2, 40), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_equals_batches_of_the_joined_size(images, batch_size, batches, drop_last):
    drop_last = drop_last and images >= batch_size
    kept = images // batch_size * batch_size if drop_last else images
    steps = 2 * -(-kept // (batch_size * batches))  # two epochs
    setup, accumulate = Setup(images=images), Accumulate(batches=batches)
    parts = run_steps(
        {"setup": setup, "accumulate": accumulate}, steps=steps, batch_size=batch_size, drop_last=drop_last
    )
    assert parts.epoch == 2
    if kept == images:
        whole = run_steps({"setup": setup}, steps=steps, batch_size=batch_size * batches)
        for mine, other in zip(parameters_of(parts), parameters_of(whole), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_each_image_of_a_step_counts_the_same_in_an_epochs_last_step_too():
    """27 images in batches of 4, the last of 3: steps of 8, 8, 8 and 3 images, with weights that stay the same."""
    gradients, losses, setup = [], [], Setup(images=27, lr=0.0)
    noted = watch(
        forward_end=lambda run, loss: losses.append(loss.detach()) if run.split == "train" else None,
        gradients_ready=lambda run: gradients.append(run.model[0].weight.grad.clone()),
    )
    run = run_steps({"setup": setup, "accumulate": Accumulate(), "noted": noted}, steps=4, batch_size=4)
    (epoch,) = build_run({"setup": setup}, batch_size=27).batches["train"].iterate(epoch_permutation(0, 0, 27))
    output = run.model(epoch.images.float() / 255)
    for first, gradient in zip(range(0, 27, 8), gradients, strict=True):
        loss = nn.functional.cross_entropy(output[first : first + 8], epoch.targets[first : first + 8])
        by_hand = torch.autograd.grad(loss, run.model[0].weight, retain_graph=True)[0]
        torch.testing.assert_close(gradient, by_hand)
    for first, loss in zip(range(0, 27, 4), losses, strict=True):  # other plugins see the plain loss
        torch.testing.assert_close(
            loss, nn.functional.cross_entropy(output[first : first + 4], epoch.targets[first : first + 4]).detach()
        )


@pytest.mark.parametrize(("batches", "steps"), [(1, 4), (3, 2), (4, 1), (9, 1)])
def test_one_step_and_one_safe_point_after_so_many_batches(batches, steps):
    hooks = ("backward", "gradients_ready", "step_end", "safe_point")
    others = watch(**dict.fromkeys(hooks[1:], lambda: None), backward=lambda loss: loss.backward())
    fired = Counter(record_hooks({"accumulate": Accumulate(batches=batches), "w": others}, steps=99, epochs=1))
    # one safe point more, at the epoch's end
    assert [fired[hook, "w"] for hook in hooks] == [4, steps, steps, steps + 1]


def test_one_batch_a_step_is_what_happens_without():
    plain, one = run_steps({}, steps=6), run_steps({"accumulate": Accumulate(batches=1)}, steps=6)
    assert all(map(torch.equal, parameters_of(plain), parameters_of(one)))


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_run_stopped_within_a_step_completes_it_and_continues_exactly(tmp_path, at):
    whole = build_run({"accumulate": Accumulate(batches=3)}, epochs=2)
    fit(whole, tmp_path / "whole")
    stop = watch(forward_end=lambda run: run.batch_index == at and run.stop("enough"))
    first = build_run({"accumulate": Accumulate(batches=3), "stop": stop}, epochs=2)
    fit(first, tmp_path / "first")
    assert first.batch_index == (3 if at < 3 else 4)
    second = build_run({"accumulate": Accumulate(batches=3)}, epochs=2)
    second.load_state_dict(first.state_dict())
    fit(second, tmp_path / "second")
    assert second.step == whole.step == 4
    assert all(map(torch.equal, parameters_of(second), parameters_of(whole)))


def test_who_changes_the_loss_after_it_was_scaled_is_named():
    term = watch(transform_loss=lambda run, loss: loss + 1)
    build_run({"term": term, "accumulate": Accumulate()})
    with pytest.raises(PluginError, match=r"'accumulate', built: .*plugin 'term' changes it .*list it after 'term'"):
        build_run({"accumulate": Accumulate(), "term": term})


def test_who_else_says_how_many_batches_make_a_step_is_named():
    with pytest.raises(PluginError, match="'accumulate' and plugin 'other' both provide it"):
        build_run({"accumulate": Accumulate(), "other": watch(batches_per_step=lambda: 2)})


def test_the_reported_loss_is_the_plain_one():
    """With weights that stay the same, the training loss is that of the test split, which holds the same images."""
    plugins = {"setup": Setup(lr=0.0), "accumulate": Accumulate(batches=3), "metrics": Metrics()}
    same = watch(transform_data=lambda data: data.replace(test=data.train))
    (row,) = run_steps({**plugins, "same": same}, steps=99, epochs=1).history
    assert row["train_loss"] == pytest.approx(row["test_loss"])


def test_batches_must_be_at_least_one():
    for batches in (0, -2):
        with pytest.raises(ValueError, match="'batches'"):
            Accumulate(batches=batches)


def test_schedules_are_built_for_the_steps_that_will_be_taken():
    run = build_run({"accumulate": Accumulate(batches=3)}, epochs=2)  # 32 images in batches of 8
    assert (run.batches_per_epoch, run.steps_per_epoch, run.total_steps) == (4, 2, 4)
