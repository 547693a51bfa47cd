import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import Compose, ToTensor
from torchvision.transforms import Normalize as Reference

from trainkit import Map, TrainkitError
from trainkit.errors import RecipeError
from trainkit.testing import assert_refuses, build_run, run_steps, watch
from trainkit.transforms import to_float
from trainkit_normalize import Normalize


class Built:
    device = torch.device("cpu")

    def __init__(self, channels):
        self.data = type("Data", (), {"shape": (channels, 16, 16)})


statistics = st.sampled_from([1, 3]).flatmap(
    lambda channels: st.tuples(
        st.lists(st.floats(-2, 2), min_size=channels, max_size=channels),
        st.lists(st.floats(1e-3, 4), min_size=channels, max_size=channels),
    )
)


@given(statistics)
def test_every_value_has_the_bits_of_torchvision(case):
    mean, std = case
    plugin = Normalize(mean=mean, std=std)
    plugin.transforms(Built(len(mean)))
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pil = Image.fromarray(values if len(mean) == 1 else np.stack([values, 255 - values, values.T], 2))
    expected = Compose([ToTensor(), Reference(mean, std)])(pil)
    images = torch.from_numpy(np.array(pil).reshape(1, 16, 16, -1)).permute(0, 3, 1, 2)
    assert torch.equal(plugin.apply(images, {})[0], expected)


def test_float_images_are_taken_as_scaled_and_left_as_they_are():
    plugin = Normalize(mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010])
    plugin.transforms(Built(3))
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    scaled = to_float(images)
    before = scaled.clone()
    assert torch.equal(plugin.apply(scaled, {}), plugin.apply(images, {}))
    assert torch.equal(scaled, before)


def test_training_and_test_images():
    run = build_run({"normalize": Normalize(mean=[0.5] * 3, std=[0.25] * 3)})
    for split in ("train", "test"):
        images = getattr(run.data, split).images
        expected = (images.float() / 255 - 0.5) / 0.25
        assert torch.equal(run.transforms[split](images, lambda name: np.random.default_rng(0)), expected)


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.5]), ([0.5] * 3, [0.5]), ([0.5] * 2, [0.5] * 3), ([], [])])
def test_a_wrong_number_of_channels_is_refused_when_the_run_is_built(mean, std):
    with pytest.raises(RecipeError, match=r"plugins\.normalize\.mean, plugins\.normalize\.std: .* 3 channels"):
        build_run({"normalize": Normalize(mean=mean, std=std)})


class NeedsBytes(Map):
    """Counts on bytes."""

    needs_uint8 = True

    def apply(self, images, params):
        return 255 - images


def test_a_transform_that_needs_bytes_is_refused_below_it():
    normalize, negative = Normalize(mean=[0.5] * 3, std=[0.25] * 3), watch(transforms=lambda run: NeedsBytes())
    run_steps({"negative": negative, "normalize": normalize}, steps=1)
    message = r"transform 'negative' needs uint8 images, .* returns float32; list it above .*such as normalize"
    with pytest.raises(TrainkitError, match=message):
        run_steps({"normalize": normalize, "negative": negative}, steps=1)


def test_impossible_or_missing_options_are_refused():
    assert_refuses(Normalize, "std", [0.0], [-1], mean=[0.5])
    assert_refuses(Normalize, "std", mean=[0.5])
    assert_refuses(Normalize, "mean", std=[0.5])
