import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import Compose, ToTensor
from torchvision.transforms import Normalize as Reference

from trainkit.errors import RecipeError
from trainkit.recipe import Recipe, make_options
from trainkit.testing import build_run
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


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("std", {"mean": [0.5], "std": [0.0]}),
        ("std", {"mean": [0.5], "std": [-1]}),
        ("std", {"mean": [0.5]}),
        ("mean", {"std": [0.5]}),
    ],
)
def test_impossible_or_missing_options_are_refused(key, options):
    recipe = Recipe(name="r", epochs=1, batch_size=1, plugins={"normalize": options})
    with pytest.raises(RecipeError, match=rf"plugins\.normalize\.{key}: "):
        make_options(recipe, "normalize", Normalize)
