import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data import TensorSplit, epoch_permutation
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import build_run, fake_data, run_steps
from trainkit_random_crop import RandomCrop
from trainkit_repeated_augmentation import RepeatedAugmentation


@plugin
class Images:
    """So many training images."""

    n: int

    @hookimpl
    def data(self):
        images = torch.zeros(self.n, 3, 8, 8, dtype=torch.uint8)
        return fake_data().replace(train=TensorSplit(images, torch.arange(self.n) % 4))


@plugin
class Watch:
    """Keeps the first training batch."""

    batches: list

    @hookimpl
    def forward_end(self, run, batch, output, loss):
        if run.split == "train":
            self.batches.append(batch)


def ra_sampler(permutation, num_repeats, num_replicas=1, rank=0, multiple=256):
    """DeiT's RASampler, whose permutation is given; there `multiple` is 256."""
    n = len(permutation)
    num_samples = math.ceil(n * num_repeats / num_replicas)
    total_size = num_samples * num_replicas
    num_selected_samples = math.floor(n // multiple * multiple / num_replicas)
    indices = [ele for ele in permutation for _ in range(num_repeats)]
    indices += indices[: total_size - len(indices)]
    assert len(indices) == total_size
    indices = indices[rank:total_size:num_replicas]
    assert len(indices) == num_samples
    return indices[:num_selected_samples]


def order(n, times, epoch=0, seed=0):
    sampler = RepeatedAugmentation(times=times)
    run = build_run({"data": Images(n=n), "repeated_augmentation": sampler}, seed=seed)
    run.epoch = epoch
    return sampler.epoch_order(run)


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 3), st.integers(0, 3))
def test_the_order_is_that_of_deits_sampler_in_one_process(n, times, epoch, seed):
    ours = order(n, times, epoch, seed)
    assert ours.dtype == torch.int64
    assert ours.tolist() == ra_sampler(epoch_permutation(seed, epoch, n).tolist(), times, multiple=1)


def test_deits_own_sampler_leaves_the_end_of_the_same_order_out():
    theirs = ra_sampler(epoch_permutation(0, 0, 600).tolist(), 3)
    assert len(theirs) == 512
    assert order(600, 3)[:512].tolist() == theirs


def test_once_is_the_default_order():
    assert torch.equal(order(32, 1, epoch=2), epoch_permutation(0, 2, 32))


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 50))
def test_each_image_comes_so_often_but_for_the_last(n, times):
    found, counts = order(n, times).unique_consecutive(return_counts=True)
    assert found.unique().numel() == len(found) == math.ceil(n / times)
    assert counts[:-1].tolist() == [times] * (len(found) - 1)
    assert counts.sum() == n


def test_repetitions_are_in_one_batch_and_augmented_anew():
    batches = []
    plugins = {"random_crop": RandomCrop(size=8, padding=4), "repeated": RepeatedAugmentation(times=8)}
    run_steps({**plugins, "watch": Watch(batches=batches)}, steps=2)
    first, second = batches
    assert first.indices.unique().numel() == second.indices.unique().numel() == 1
    assert first.indices[0] != second.indices[0]
    assert len(first.images.unique(dim=0)) > 4


def test_times_must_be_at_least_1():
    with pytest.raises(ValueError, match="'times'"):
        RepeatedAugmentation(times=0)
