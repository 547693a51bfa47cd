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
from trainkit_cutmix import CutMix, mix


class Given:
    """Gives the numbers that it was made with in place of random ones."""

    def __init__(self, lam, x, y):
        self.lam, self.centers = lam, iter([x, y])

    def beta(self, a, b):
        return self.lam

    def integers(self, high):
        return next(self.centers)


def made_batch(n, classes, height=4, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, height, width, generator=generator)
    return Batch(images, torch.randint(classes, (n,), generator=generator))


def at(epoch=0, batch=0, split="train", classes=5):
    """What of a run the plugin sees."""
    rng = lambda purpose: stream(0, purpose, epoch, batch)  # noqa: E731
    return SimpleNamespace(split=split, rng=rng, data=SimpleNamespace(classes=("",) * classes))


def reference(batch, lam, x, y, classes):
    transform = v2.CutMix(num_classes=classes)
    transform._dist = SimpleNamespace(sample=lambda shape: torch.tensor(lam, dtype=torch.float64))
    centers = iter([x, y])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda high, size: torch.tensor([next(centers)]))
        return transform(batch.images, batch.targets)


@given(st.data())
def test_equals_torchvisions_for_the_same_numbers(data):
    n, classes = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 6))
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    lam, x, y = data.draw(st.floats(0, 1)), data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    batch = made_batch(n, classes, height, width, data.draw(st.integers(0, 2**31)))
    if data.draw(st.booleans()):  # what another plugin made of the targets
        batch.targets = torch.rand(n, classes).softmax(1)
    images, targets = reference(batch, lam, x, y, classes)
    mixed = mix(batch, CutMix().draw(Given(lam, x, y), height, width), classes)
    assert torch.equal(mixed.images, images)
    torch.testing.assert_close(mixed.targets, targets, rtol=1e-6, atol=1e-6)


def test_each_image_gets_the_box_of_the_one_before_it():
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 4, 5).clone()
    mixed = mix(Batch(images, torch.tensor([0, 1, 2])), (1, 2, 4, 4), 3)
    assert mixed.images[:, 0, 3, 2].tolist() == [2, 0, 1]
    assert (mixed.images[0] == 2).sum() == 6
    assert mixed.targets[0].tolist() == pytest.approx([0.7, 0, 0.3])  # 6 of 20 pixels


def test_the_loss_is_that_of_the_paper():
    batch, logits = made_batch(6, 5), torch.randn(6, 5)
    targets = batch.targets
    loss = F.cross_entropy(logits, mix(batch, (0, 0, 2, 3), 5).targets)
    mine, other = (F.cross_entropy(logits, t) for t in (targets, targets.roll(1)))
    torch.testing.assert_close(loss, 14 / 20 * mine + 6 / 20 * other)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_boxes_are_distributed_as_torchvision_distributes_them(alpha):
    n, height, width = 4000, 24, 32
    image = torch.zeros(1, 1, height, width)
    torch.manual_seed(0)
    theirs = v2.CutMix(alpha=alpha, num_classes=2)
    theirs = np.array([theirs.make_params([image])["box"] for _ in range(n)])
    ours = np.array([CutMix(alpha=alpha).draw(stream(0, "test", 0, i), height, width) for i in range(n)])
    assert (ours[:, :2] <= ours[:, 2:]).all()
    for name, of in {"corners": lambda box: box, "sides": lambda box: box[:, 2:] - box[:, :2]}.items():
        for mine, other in zip(of(ours).T, of(theirs).T, strict=True):
            shares = [np.searchsorted(np.sort(side), np.arange(33), side="right") / n for side in (mine, other)]
            # a greater distance between two samples of one distribution has a chance of 1e-6
            assert np.abs(shares[0] - shares[1]).max() < 2.7 * np.sqrt(2 / n), name


def test_channels_last_images_stay_so():
    batch = made_batch(4, 5)
    batch.images = batch.images.contiguous(memory_format=torch.channels_last)
    assert mix(batch, (1, 1, 3, 3), 5).images.is_contiguous(memory_format=torch.channels_last)


def test_needs_no_value_on_the_host():
    batch = made_batch(4, 5)
    mixed = mix(Batch(batch.images.to("meta"), batch.targets.to("meta")), (0, 1, 2, 3), 5)  # a device without values
    assert (mixed.images.shape, mixed.targets.shape) == (batch.images.shape, (4, 5))


def test_test_batches_stay_as_they_are():
    batch = made_batch(4, 5)
    before = batch.images.clone()
    assert CutMix().transform_batch(at(split="test"), batch) is batch
    assert batch.targets.shape == (4,)
    assert torch.equal(batch.images, before)


def test_the_box_depends_on_the_position_alone():
    first, again, later, epoch = (
        CutMix().transform_batch(at(*position), made_batch(4, 5, 30, 30)).images
        for position in [(0, 3), (0, 3), (0, 4), (1, 3)]
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, epoch)


def test_it_trains_and_leaves_the_data_as_they_are():
    mixed, plain = run_steps({"cutmix": CutMix()}, steps=5), run_steps({}, steps=5)
    assert torch.equal(mixed.data.train.images, plain.data.train.images)
    assert not any(map(torch.equal, parameters_of(mixed), parameters_of(plain)))


def test_indices_stay_with_the_images_that_dominate():
    seen = []
    note = watch(transform_batch=lambda run, batch: seen.append((run.split, batch.indices)) or batch)
    run = run_steps({"cutmix": CutMix(), "note": note}, steps=4)
    indices = torch.cat([found for split, found in seen if split == "train"])
    assert sorted(indices.tolist()) == list(range(len(run.data.train)))


@pytest.mark.parametrize("make", [lambda t: F.one_hot(t, 4).float(), lambda t: t.float()], ids=["labels", "number"])
def test_other_targets_than_classes_are_refused(make):
    change = lambda split: TensorSplit(split.images, make(split.targets))  # noqa: E731
    data = watch(transform_data=lambda data: data.replace(train=change(data.train), test=change(data.test)))
    with pytest.raises(
        RecipeError, match=r"'cutmix', built: it mixes classes, and the data's targets are float32 .*drop"
    ):
        build_run({"data": data, "cutmix": CutMix()})


def test_not_beside_mixup():
    with pytest.raises(PluginError, match="'cutmix' cannot run beside plugin 'mixup'"):
        build_run({"mixup": watch(), "cutmix": CutMix()})


def test_alpha_must_be_positive():
    assert_refuses(CutMix, "alpha", 0, -1, float("nan"))
