from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import WeightedRandomSampler

from trainkit.data import TensorSplit, epoch_permutation
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import build_run, fake_data, run_steps
from trainkit_balanced_sampler import BalancedSampler


@plugin
class Given:
    """Given training images."""

    train: Any

    @hookimpl
    def data(self):
        return fake_data().replace(train=self.train)


@plugin
class Watch:
    """Keeps the images of each step."""

    seen: list

    @hookimpl
    def step_end(self, run):
        self.seen.append((run.epoch, run.batch.indices.tolist()))


def in_memory(targets):
    return TensorSplit(torch.zeros(len(targets), 3, 8, 8, dtype=torch.uint8), torch.tensor(targets))


def orders(targets, epochs=1, seed=0, **options):
    sampler = BalancedSampler(**options)
    run = build_run({"data": Given(train=in_memory(targets)), "balanced_sampler": sampler}, seed=seed)
    drawn = []
    for run.epoch in range(epochs):
        drawn.append(sampler.epoch_order(run))
    return drawn


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any),
    st.integers(1, 50) | st.none(),
    st.integers(0, 9),
)
def test_the_counts_of_classes_are_equal_to_within_one_image(counts, images, seed):
    targets = np.random.default_rng(seed).permutation(np.repeat(range(len(counts)), counts)).tolist()
    n = images or len(targets)
    for order in orders(targets, epochs=3, seed=seed, images=images):
        assert order.dtype == torch.int64
        assert len(order) == n
        present = {label for label, count in enumerate(counts) if count}
        drawn = Counter(targets[i] for i in order.tolist())
        assert set(drawn) <= present
        assert {drawn[label] for label in present} <= {n // len(present), -(-n // len(present))}


def test_images_are_drawn_as_often_as_by_torchs_weighted_sampler():
    targets = [0] * 40 + [1] * 8 + [2] * 2
    epochs, n = 200, len(targets)
    ours = torch.cat(orders(targets, epochs)).bincount(minlength=n).double()
    weights = [1 / targets.count(label) for label in targets]
    generator = torch.Generator().manual_seed(0)
    theirs = WeightedRandomSampler(weights, epochs * n, generator=generator)
    theirs = torch.tensor(list(theirs)).bincount(minlength=n).double()
    expected = epochs * n / 3 * torch.tensor(weights)
    for drawn in (ours, theirs):  # chi-square with 49 degrees of freedom: above 85 once in a thousand times
        assert ((drawn - expected) ** 2 / expected).sum() < 85
    assert ours[:40].sum() == pytest.approx(epochs * n / 3, abs=epochs)  # while theirs varies by chance


def test_images_repeat_as_often_as_draws_with_replacement_do():
    drawn = torch.stack([order.unique().numel() * torch.ones(()) for order in orders([0] * 100, epochs=50)])
    assert drawn.mean() == pytest.approx(100 * (1 - (1 - 1 / 100) ** 100), abs=2)


def test_what_is_left_goes_to_every_class_in_turn():
    extra = Counter()
    for order in orders([0, 1, 2] * 10, epochs=300, images=31):
        ((label, _),) = Counter(i % 3 for i in order.tolist()).most_common(1)
        extra[label] += 1
    assert all(70 < extra[label] < 130 for label in range(3))


def test_classes_are_spread_over_the_epoch():
    order = torch.stack(orders([0] * 90 + [1] * 10, epochs=50))
    rare = (order >= 90).double().mean(0)  # over the epochs, by place in the epoch
    assert rare[:50].mean() == pytest.approx(0.5, abs=0.05)
    assert rare[50:].mean() == pytest.approx(0.5, abs=0.05)


def test_the_order_depends_on_seed_and_epoch_alone():
    targets = [0] * 12 + [1] * 4
    first, second = orders(targets, epochs=2)
    again, _ = orders(targets, epochs=2)
    (other,) = orders(targets, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_run_trains_on_these_images_and_resumes_within_an_epoch(tmp_path):
    whole, rest = [], []
    sampler, split = BalancedSampler(images=24), in_memory([0] * 28 + [1] * 4)
    run = run_steps({"data": Given(train=split), "balanced_sampler": sampler, "watch": Watch(seen=whole)}, steps=6)
    assert run.steps_per_epoch == 3
    stopped = run_steps({"data": Given(train=split), "balanced_sampler": BalancedSampler(images=24)}, steps=4)
    plugins = {"data": Given(train=split), "balanced_sampler": BalancedSampler(images=24), "watch": Watch(seen=rest)}
    from trainkit import fit

    run = build_run(plugins, epochs=1000, max_steps=6)
    run.load_state_dict(stopped.state_dict())
    fit(run, tmp_path / "run")
    assert rest == whole[4:]
    assert [i for epoch, batch in whole if epoch == 1 for i in batch] == orders([0] * 28 + [1] * 4, 2, images=24)[
        1
    ].tolist()


def test_a_split_that_is_decoded_is_asked_for_its_targets_once():
    class Lazy:
        asked = 0

        def __len__(self):
            return 32

        @property
        def targets(self):
            self.asked += 1
            return [0] * 24 + [1] * 8

        def __getitem__(self, index):
            return torch.zeros(3, 8, 8, dtype=torch.uint8), int(index >= 24)

    split = Lazy()
    plugins = {"data": Given(train=split), "balanced_sampler": BalancedSampler()}
    run_steps(plugins, steps=1)
    once = split.asked
    split.asked = 0
    run_steps({"data": Given(train=split), "balanced_sampler": BalancedSampler()}, steps=12)
    assert split.asked == once


def test_one_instance_serves_one_run_after_another():
    sampler = BalancedSampler()
    for targets in ([0, 1] * 8, [0] * 30 + [1] * 10):
        run = build_run({"data": Given(train=in_memory(targets)), "balanced_sampler": sampler})
        assert Counter(targets[i] for i in sampler.epoch_order(run).tolist())[1] == len(targets) // 2


def test_it_differs_from_a_permutation():
    (order,) = orders([0, 1] * 16)
    assert sorted(order.tolist()) != sorted(epoch_permutation(0, 0, 32).tolist())


def test_targets_must_be_classes():
    with pytest.raises(RecipeError, match=r"'balanced_sampler', epoch_order: it balances classes.*float32 \[\]"):
        orders([0.5, 1.0])


def test_images_must_be_at_least_1():
    with pytest.raises(ValueError, match="'images'"):
        BalancedSampler(images=0)
