import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomRotation as Reference
from torchvision.transforms import functional as TF

from trainkit.testing import assert_refuses, build_run, from_recipe
from trainkit.transforms import gather
from trainkit_random_rotation import RandomRotation, affine

CIFAR = Path(__file__).parents[3].parent / "shared" / "data" / "cifar10" / "test.zip"


def rotate(images, angles):
    """Images [N, H, W, C] through the plugin, by given angles."""
    matrix = torch.from_numpy(affine(np.array(angles), images.shape[1:3]))
    out = gather(torch.from_numpy(images).permute(0, 3, 1, 2), [(RandomRotation(), {"matrix": matrix})])
    return out.permute(0, 2, 3, 1).numpy()


def reference(images, angles):
    pil = [Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in images]
    turned = [np.asarray(TF.rotate(image, float(angle))) for image, angle in zip(pil, angles, strict=True)]
    return np.stack(turned).reshape(images.shape)


def made(kind, seed, shape):
    rng = np.random.default_rng(seed)
    if kind == "binary":
        return rng.integers(0, 2, shape, dtype=np.uint8) * 255
    if kind == "gray":
        return np.full(shape, 128, np.uint8)
    return rng.integers(0, 256, shape, dtype=np.uint8)


right = st.integers(-8, 8).map(lambda quarter: quarter * 90.0)
nearly_right = st.builds(lambda a, d: a + d, right, st.floats(-1e-12, 1e-12))
angles = st.floats(-10, 10) | st.floats(-720, 720) | st.integers(-360, 360).map(float) | right | nearly_right


@given(
    st.lists(angles, min_size=1, max_size=4),
    st.integers(1, 48),
    st.integers(1, 48),
    st.sampled_from([1, 3]),
    st.sampled_from(["noise", "gray", "binary"]),
    st.integers(0, 2**32),
)
@example([90.0, 180.0, 270.0, 360.0], 32, 32, 3, "noise", 0)
@example([90.0, 180.0, 270.0, -0.0], 31, 32, 1, "noise", 0)
def test_the_same_bytes_as_torchvision_on_pil_images(angles, height, width, channels, kind, seed):
    images = made(kind, seed, (len(angles), height, width, channels))
    assert np.array_equal(rotate(images, angles), reference(images, angles))


@pytest.mark.parametrize("size", [(375, 500), (1999, 7), (1, 27_000), (27_000, 1)])
def test_the_same_bytes_for_large_images(size):
    angles = [7.3, -133.7, 45.0, 90.0]
    images = made("noise", 0, (len(angles), *size, 1))
    assert np.array_equal(rotate(images, angles), reference(images, angles))


@pytest.mark.skipif(not CIFAR.exists(), reason="the CIFAR-10 images are not here")
def test_the_same_bytes_on_photographs():
    with zipfile.ZipFile(CIFAR) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".png"))[::200]
        images = np.stack([np.asarray(Image.open(archive.open(name)).convert("RGB")) for name in names])
    angles = RandomRotation(degrees=10).draw(np.random.default_rng(0), len(images), (32, 32))["angle"]
    assert np.array_equal(rotate(images, angles), reference(images, angles))


def test_what_is_drawn_fits_together():
    draws = RandomRotation(degrees=30).draw(np.random.default_rng(0), 100, (20, 30))
    assert np.array_equal(draws["matrix"], affine(draws["angle"], (20, 30)))


@pytest.mark.parametrize("degrees", [10, (-20, 90), (30, 30), 0])
def test_angles_are_distributed_as_torchvision_distributes_them(degrees):
    n = 4000
    torch.manual_seed(0)
    theirs = np.array([Reference.get_params(Reference(degrees).degrees) for _ in range(n)])
    ours = RandomRotation(degrees=degrees).draw(np.random.default_rng(0), n, (8, 8))["angle"]
    assert ours.shape == (n,)
    spread = max(Reference(degrees).degrees) - min(Reference(degrees).degrees)
    levels = np.linspace(0, 1, 21)  # the standard error of a quantile is at most 0.8 % of the range
    assert np.abs(np.quantile(ours, levels) - np.quantile(theirs, levels)).max() <= 0.04 * spread


def test_training_images_only():
    run = build_run({"random_rotation": RandomRotation(degrees=180)})
    images = run.data.train.images

    def stream(name):
        return np.random.default_rng(0)

    plain = images.float() / 255
    assert not torch.equal(run.transforms["train"](images, stream), plain)
    assert torch.equal(run.transforms["test"](images, stream), plain)


@pytest.mark.parametrize("degrees", [15, 2.5, [-5, 10]])
def test_a_recipe_gives_one_number_or_a_range(degrees):
    low, high = degrees if isinstance(degrees, list) else (-degrees, degrees)
    angle = from_recipe(RandomRotation, degrees=degrees).draw(np.random.default_rng(0), 500, (4, 4))["angle"]
    assert low <= angle.min() < low + 0.1 * (high - low)
    assert high >= angle.max() > high - 0.1 * (high - low)


def test_an_impossible_range_is_refused():
    wrong = [-1, [10, -10], [0, float("inf")], float("nan"), [1, 2, 3], "ten"]
    assert_refuses(RandomRotation, "degrees", *wrong)
