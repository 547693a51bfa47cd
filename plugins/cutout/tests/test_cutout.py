import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.rng import stream
from trainkit.testing import assert_refuses, build_run
from trainkit_cutout import Cutout


def authors(image, y, x, length):
    """The authors' function (github.com/uoguelph-mlrg/Cutout, util/cutout.py), for one hole at a given place."""
    _, h, w = image.shape
    mask = np.ones((h, w), np.float32)
    y1, y2 = np.clip(y - length // 2, 0, h), np.clip(y + length // 2, 0, h)
    x1, x2 = np.clip(x - length // 2, 0, w), np.clip(x + length // 2, 0, w)
    mask[y1:y2, x1:x2] = 0.0
    return image * torch.from_numpy(mask)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**32))
def test_equals_the_authors_function_for_the_same_centres(height, width, half, seed):
    cutout = Cutout(size=2 * half)  # of an odd size, theirs masks one pixel less
    images = torch.rand(5, 3, height, width) - 0.5
    draws = cutout.draw(stream(seed, "test"), 5, (height, width))
    before = images.clone()
    masked = cutout.apply(images, {k: torch.from_numpy(v) for k, v in draws.items()})
    centres = zip(images, draws["y"], draws["x"], strict=True)
    assert torch.equal(masked, torch.stack([authors(image, y, x, 2 * half) for image, y, x in centres]))
    assert torch.equal(images, before)


def test_an_odd_square_has_its_centre_in_the_middle_and_bytes_stay_bytes():
    images = torch.full((1, 1, 7, 7), 9, dtype=torch.uint8)
    masked = Cutout(size=3).apply(images, {"y": torch.tensor([3]), "x": torch.tensor([0])})
    expected = images.clone()
    expected[:, :, 2:5, 0:2] = 0
    assert masked.dtype == torch.uint8
    assert torch.equal(masked, expected)


def test_centres_are_uniform_over_all_pixels():
    draws = Cutout().draw(stream(0, "test"), 60_000, (4, 6))
    counts = np.bincount(draws["y"] * 6 + draws["x"], minlength=24)
    assert len(counts) == 24
    assert np.abs(counts - 2500).max() < 5 * np.sqrt(2500)


def test_training_images_only():
    run = build_run({"cutout": Cutout(size=4)})
    images = run.data.train.images
    masked, tested = (run.transforms[split](images, lambda name: stream(0, name)) for split in ("train", "test"))
    assert torch.equal(tested, images.float() / 255)
    assert (masked != tested).flatten(1).any(1).all()
    assert (masked[masked != tested] == 0).all()


def test_size_is_at_least_one_pixel():
    assert_refuses(Cutout, "size", 0, -2, 1.5)
