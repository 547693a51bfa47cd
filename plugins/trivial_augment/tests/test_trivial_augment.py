import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, TrivialAugmentWide
from torchvision.transforms.autoaugment import _apply_op

from trainkit.data import Data, TensorSplit
from trainkit.errors import PluginError, RecipeError
from trainkit.rng import stream
from trainkit.testing import assert_refuses, build_run, watch
from trainkit_trivial_augment import OPERATIONS, TrivialAugment, parameters


def space(bins=31):
    """Return every operation and magnitude that torchvision may draw."""
    found = []
    for name, (magnitudes, signed) in TrivialAugmentWide()._augmentation_space(bins).items():
        values = magnitudes.tolist() if magnitudes.ndim else [0.0]
        found += [(name, sign * value) for value in values for sign in ((1.0, -1.0) if signed else (1.0,))]
    return found


SPACE = space()


def torchvision(images, steps):
    """torchvision's function on PIL images, one by one."""
    results = []
    for image, (name, magnitude) in zip(images, steps, strict=True):
        pil = Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
        changed = _apply_op(pil, name, magnitude, InterpolationMode.NEAREST, None)
        results.append(torch.from_numpy(np.array(changed)).view(*images.shape[2:], -1).permute(2, 0, 1))
    return torch.stack(results)


def ours(images, steps):
    names, magnitudes = zip(*steps, strict=True)
    numbers = np.array([OPERATIONS.index(name) for name in names])
    drawn = parameters(numbers, np.array(magnitudes), images.shape[2:])
    return TrivialAugment().apply(images, {k: torch.from_numpy(v) for k, v in drawn.items()})


def made(kind, n, size=(12, 15), channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (n, channels, *size), generator=generator, dtype=torch.uint8)
    match kind:
        case "noise":
            return noise
        case "narrow":  # few levels, in the middle
            return noise // 7 + 90
        case "binary":
            return (noise > 127).to(torch.uint8) * 255
        case "skewed":  # one level is most frequent, others are rare
            return torch.where(noise < 230, 40, noise)
        case "flat":
            return noise[..., :1, :1].expand_as(noise).contiguous()


@pytest.mark.parametrize("kind", ["noise", "narrow", "binary", "skewed", "flat"])
@pytest.mark.parametrize("channels", [3, 1])
def test_every_operation_and_magnitude_gives_torchvisions_bytes(kind, channels):
    images = made(kind, len(SPACE), channels=channels)
    before = images.clone()
    assert torch.equal(ours(images, SPACE), torchvision(images, SPACE))
    assert torch.equal(images, before)


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
kinds = st.sampled_from(["noise", "narrow", "skewed"])


@settings(max_examples=40)
@given(st.lists(st.sampled_from(SPACE), min_size=1, max_size=5), sizes, st.sampled_from([1, 3]), kinds, st.integers(0))
def test_any_size_gives_torchvisions_bytes(steps, size, channels, kind, seed):
    images = made(kind, len(steps), size, channels, seed % 2**32)
    assert torch.equal(ours(images, steps), torchvision(images, steps))


@pytest.mark.parametrize("size", [(375, 500), (16_000, 3), (3, 16_000)])
def test_large_images_give_torchvisions_bytes(size):
    steps = [("ShearX", 0.99), ("ShearY", -0.99), ("Rotate", 130.5), ("Rotate", 90.0), ("Contrast", 0.5)]
    steps += [("Equalize", 0.0), ("AutoContrast", 0.0), ("Sharpness", -0.7)]
    images = made("narrow", len(steps), size, 1)
    assert torch.equal(ours(images, steps), torchvision(images, steps))


@pytest.mark.parametrize("bins", [31, 5])
def test_draws_are_torchvisions_all_equally_likely(bins):
    n = 20_000
    drawn = TrivialAugment(num_magnitude_bins=bins).draw(stream(0, "test"), n, (8, 8))
    found = list(zip(drawn["operation"].tolist(), drawn["magnitude"].tolist(), strict=True))
    operations = np.bincount(drawn["operation"], minlength=14)
    assert ((operations - n / 14) ** 2 / (n / 14)).sum() < 35  # chi-square, 13 degrees of freedom: 0.1 % lie above 34.5
    assert set(found) == {(OPERATIONS.index(name), magnitude) for name, magnitude in space(bins)}
    signs = np.sign(drawn["magnitude"][np.isin(drawn["operation"], [1, 2, 3, 4, 5, 6, 7, 8, 9])])
    assert abs(signs.mean()) < 0.03
    rotated = np.abs(drawn["magnitude"][drawn["operation"] == 5])
    _, counts = np.unique(rotated, return_counts=True)
    assert len(counts) == bins
    assert ((counts - len(rotated) / bins) ** 2 / (len(rotated) / bins)).sum() < 60  # 30 degrees of freedom: 59.7


def test_needs_no_value_on_the_host():
    drawn = TrivialAugment().draw(stream(0, "test"), 16, (8, 9))
    params = {name: torch.from_numpy(value).to("meta") for name, value in drawn.items()}  # a device without values
    assert TrivialAugment().apply(made("noise", 16, (8, 9)).to("meta"), params).shape == (16, 3, 8, 9)


def test_training_images_only():
    run = build_run({"trivial_augment": (transform := TrivialAugment())})
    assert [step for _, step in run.transforms["train"].steps] == [transform]
    assert run.transforms["test"].steps == ()


def test_other_images_are_refused():
    split = TensorSplit(torch.zeros(8, 4, 2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    data = Data(train=split, test=split, classes=("one",), shape=(4, 2, 2))
    with pytest.raises(RecipeError, match="4 channels.*`trivial_augment: false`"):
        build_run({"data": watch(data=lambda: data), "trivial_augment": TrivialAugment()})


def test_must_come_before_normalize():
    with pytest.raises(PluginError, match="normalize"):
        build_run({"normalize": watch(), "trivial_augment": TrivialAugment()})


def test_too_few_magnitudes_are_refused():
    assert_refuses(TrivialAugment, "num_magnitude_bins", 1, 0, 2.5)
