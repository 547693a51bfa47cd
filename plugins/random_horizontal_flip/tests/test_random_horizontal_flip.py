import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as TF

from trainkit.testing import assert_refuses, build_run
from trainkit.transforms import gather
from trainkit_random_horizontal_flip import RandomHorizontalFlip


@settings(max_examples=40)
@given(
    st.lists(st.booleans(), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1, 3]),
    st.integers(0, 2**32),
)
def test_the_same_bytes_as_torchvision_on_pil_images(flips, height, width, channels, seed):
    images = np.random.default_rng(seed).integers(0, 256, (len(flips), height, width, channels), dtype=np.uint8)
    params = {"flip": torch.tensor(flips)}
    ours = gather(torch.from_numpy(images).permute(0, 3, 1, 2), [(RandomHorizontalFlip(), params)])
    for image, flip, found in zip(images, flips, ours.permute(0, 2, 3, 1).numpy(), strict=True):
        pil = Image.fromarray(image.squeeze(2) if channels == 1 else image)
        expected = TF.hflip(pil) if flip else pil
        assert np.array_equal(found, np.asarray(expected).reshape(found.shape))


@pytest.mark.parametrize("p", [0, 0.3, 1])
def test_a_share_p_of_the_images_is_mirrored(p):
    n = 10_000
    flip = RandomHorizontalFlip(p=p).draw(np.random.default_rng(0), n, (4, 4))["flip"]
    assert flip.shape == (n,)
    assert flip.mean() == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / n))


def test_training_images_only():
    run = build_run({"random_horizontal_flip": RandomHorizontalFlip(p=1)})
    images = run.data.train.images

    def stream(name):
        return np.random.default_rng(0)

    plain = images.float() / 255
    assert torch.equal(run.transforms["train"](images, stream), plain.flip(3))
    assert torch.equal(run.transforms["test"](images, stream), plain)


def test_p_must_be_a_probability():
    assert_refuses(RandomHorizontalFlip, "p", -0.1, 1.1)
