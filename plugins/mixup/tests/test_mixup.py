from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms import v2

from trainkit import Batch, TensorSplit
from trainkit.errors import PluginError, RecipeError
from trainkit.rng import stream
from trainkit.testing import assert_refuses, build_run, parameters_of, run_steps, watch
from trainkit_mixup import Mixup, mix


def made_batch(n, classes, seed=0, size=4):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, size, size + 1, generator=generator)
    return Batch(images, torch.randint(classes, (n,), generator=generator))


def at(epoch=0, batch=0, split="train", classes=5):
    """What of a run the plugin sees."""
    rng = lambda purpose: stream(0, purpose, epoch, batch)  # noqa: E731
    return SimpleNamespace(split=split, rng=rng, data=SimpleNamespace(classes=("",) * classes))


def reference(batch, lam, classes):
    transform = v2.MixUp(num_classes=classes)
    transform._dist = SimpleNamespace(sample=lambda shape: torch.tensor(lam, dtype=torch.float64))
    return transform(batch.images, batch.targets)


@given(st.integers(1, 7), st.integers(2, 6), st.floats(0, 1), st.integers(0, 2**31), st.booleans())
def test_equals_torchvisions_for_the_same_lambda(n, classes, lam, seed, soft):
    batch = made_batch(n, classes, seed)
    if soft:  # what another plugin made of the targets
        batch.targets = torch.rand(n, classes).softmax(1)
    images, targets = reference(batch, lam, classes)
    before = batch.images.clone()
    mixed = mix(batch, lam, classes)
    torch.testing.assert_close(mixed.images, images, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixed.targets, targets, rtol=1e-6, atol=1e-6)
    assert torch.equal(batch.images, before)


@given(st.floats(0, 1))
def test_the_loss_is_the_mixture_of_both_losses(lam):
    """The paper's training step: lam * loss(output, y) + (1 - lam) * loss(output, y of the other image)."""
    batch, logits = made_batch(6, 5), torch.randn(6, 5)
    loss = F.cross_entropy(logits, mix(batch, lam, 5).targets)
    mine, other = (F.cross_entropy(logits, t) for t in (batch.targets, batch.targets.roll(1)))
    torch.testing.assert_close(loss, lam * mine + (1 - lam) * other)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lambda_follows_the_beta_distribution(alpha):
    n, mixup, batch = 4000, Mixup(alpha=alpha), Batch(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]))
    lam = np.array([mixup.transform_batch(at(batch=i), batch).targets[0, 0].item() for i in range(n)])
    deviation = np.sqrt(1 / (4 * (2 * alpha + 1)))
    assert lam.mean() == pytest.approx(0.5, abs=5 * deviation / np.sqrt(n))
    assert lam.std() == pytest.approx(deviation, rel=0.05)
    theirs = torch.distributions.Beta(alpha, alpha).sample((n,)).numpy()
    quantiles = np.linspace(0.05, 0.95, 19)
    assert np.abs(np.searchsorted(np.sort(theirs), np.quantile(lam, quantiles)) / n - quantiles).max() < 0.06


def test_channels_last_images_stay_so():
    batch = made_batch(4, 5)
    batch.images = batch.images.contiguous(memory_format=torch.channels_last)
    assert mix(batch, 0.3, 5).images.is_contiguous(memory_format=torch.channels_last)


def test_needs_no_value_on_the_host():
    batch = made_batch(4, 5)
    mixed = mix(Batch(batch.images.to("meta"), batch.targets.to("meta")), 0.3, 5)  # a device without values
    assert (mixed.images.shape, mixed.targets.shape) == (batch.images.shape, (4, 5))


def test_test_batches_stay_as_they_are():
    batch = made_batch(4, 5)
    assert Mixup().transform_batch(at(split="test"), batch) is batch
    assert batch.targets.shape == (4,)


def test_lambda_depends_on_the_position_alone():
    batch = made_batch(4, 5)
    first, again, later, epoch = (
        Mixup().transform_batch(at(*position), batch).images for position in [(0, 3), (0, 3), (0, 4), (1, 3)]
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, epoch)


def test_a_batch_of_one_image_is_mixed_with_itself():
    batch = made_batch(1, 3)
    mixed = mix(batch, 0.25, 3)
    assert torch.equal(mixed.images, batch.images)
    assert torch.equal(mixed.targets, F.one_hot(batch.targets, 3).float())


def test_it_trains():
    mixed, plain = run_steps({"mixup": Mixup()}, steps=5), run_steps({}, steps=5)
    assert mixed.batch.targets.shape == (8,)  # of the evaluation, which came last
    assert not any(map(torch.equal, parameters_of(mixed), parameters_of(plain)))


def test_indices_stay_with_the_images_that_dominate():
    seen = []
    note = watch(transform_batch=lambda run, batch: seen.append((run.split, batch.indices)) or batch)
    run = run_steps({"mixup": Mixup(), "note": note}, steps=4)
    indices = torch.cat([found for split, found in seen if split == "train"])
    assert sorted(indices.tolist()) == list(range(len(run.data.train)))


@pytest.mark.parametrize("make", [lambda t: F.one_hot(t, 4).float(), lambda t: t.float()], ids=["labels", "number"])
def test_other_targets_than_classes_are_refused(make):
    change = lambda split: TensorSplit(split.images, make(split.targets))  # noqa: E731
    data = watch(transform_data=lambda data: data.replace(train=change(data.train), test=change(data.test)))
    with pytest.raises(
        RecipeError, match=r"'mixup', built: it mixes classes, and the data's targets are float32 .*drop"
    ):
        build_run({"data": data, "mixup": Mixup()})


def test_not_beside_cutmix():
    with pytest.raises(PluginError, match="'mixup' cannot run beside plugin 'cutmix'"):
        build_run({"mixup": Mixup(), "cutmix": watch()})


def test_alpha_must_be_positive():
    assert_refuses(Mixup, "alpha", 0, -1, float("nan"))
