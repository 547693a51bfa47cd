import io

import numpy as np
import pytest
import torch
from PIL import Image

from trainkit import TensorSplit
from trainkit.testing import run_steps, watch
from trainkit_mixup import Mixup
from trainkit_random_horizontal_flip import RandomHorizontalFlip
from trainkit_sample_images import SampleImages, draw


def halves(data):
    """Images whose left half is black and whose right half is white."""
    images = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)
    images[..., 4:] = 255
    return data.replace(train=TensorSplit(images, torch.arange(16) % 4))


def test_the_picture_shows_what_is_stored_and_what_is_seen(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("trainkit_sample_images.draw", lambda *args: drawn.append(args) or draw(*args))
    plugins = {
        "halves": watch(transform_data=halves),
        "flip": RandomHorizontalFlip(p=0.5),
        "sample_images": SampleImages(count=8),
    }
    seen = []
    plugins["seen"] = watch(forward_end=lambda run, batch: seen.append(batch.images[:8].clone()))
    run_steps(plugins, steps=1, run_dir=tmp_path / "run")
    ((before, after, names),) = drawn
    assert torch.equal(after, seen[0])  # of the first step itself; they reach from 0 to 1 already
    assert {tuple(image[0, 0, [0, 7]].tolist()) for image in before} == {(0.0, 1.0)}
    assert {tuple(image[0, 0, [0, 7]].tolist()) for image in after} == {(0.0, 1.0), (1.0, 0.0)}
    assert set(names) <= {f"class {n}" for n in range(4)}
    picture = np.asarray(Image.open(tmp_path / "run" / "figures" / "samples.png"))
    assert picture.shape[1] == 1240


def test_images_that_are_mixed_are_shown_mixed(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("trainkit_sample_images.draw", lambda *args: drawn.append(args) or draw(*args))
    run_steps({"mixup": Mixup(), "sample_images": SampleImages()}, steps=1, run_dir=tmp_path / "run")
    ((before, after, _),) = drawn
    assert len(before) == len(after) == 8  # no more than a batch
    assert not torch.allclose(after, (before - before.min()) / (before.max() - before.min()), atol=0.02)


@pytest.mark.parametrize(("n", "channels"), [(1, 1), (9, 3), (64, 4)])
def test_any_number_of_images_and_channels_is_drawn(n, channels):
    images = torch.rand(n, channels, 8, 6)
    figure = draw(images, images, ["cost: $1 $2"] * n)
    figure.savefig(io.BytesIO(), format="png")
    assert sum(len(axes.images) for axes in figure.axes) == 2 * n
