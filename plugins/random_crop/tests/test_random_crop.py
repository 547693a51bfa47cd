import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomCrop as Reference
from torchvision.transforms import functional as TF

from trainkit.errors import RecipeError
from trainkit.testing import assert_refuses, build_run, from_recipe, run_steps
from trainkit.transforms import gather
from trainkit_random_crop import RandomCrop

CIFAR = Path(__file__).parents[3].parent / "shared" / "data" / "cifar10" / "test.zip"
MODES = ["constant", "edge", "reflect", "symmetric"]


def crop(plugin, images, draws):
    """Images [N, H, W, C] through the plugin, at given corners."""
    params = {name: torch.from_numpy(values) for name, values in draws.items()}
    return gather(torch.from_numpy(images).permute(0, 3, 1, 2), [(plugin, params)]).permute(0, 2, 3, 1).numpy()


def reference(plugin, images, draws):
    height, width = plugin.size if isinstance(plugin.size, tuple) else (plugin.size, plugin.size)
    padding = list(plugin.padding) if isinstance(plugin.padding, tuple) else plugin.padding
    found = []
    for image, top, left in zip(images, draws["top"], draws["left"], strict=True):
        pil = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
        padded = TF.pad(pil, padding, 0, plugin.padding_mode)
        found.append(np.asarray(TF.crop(padded, int(top), int(left), height, width)))
    return np.stack(found).reshape(len(images), height, width, images.shape[3])


@st.composite
def cases(draw):
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    border = st.integers(0, 30)
    padding = draw(border | st.tuples(border, border) | st.tuples(border, border, border, border))
    left, top, right, bottom = np.resize(padding, 4)
    side = st.integers(1, height + top + bottom), st.integers(1, width + left + right)
    size = draw(st.integers(1, min(height + top + bottom, width + left + right)) | st.tuples(*side))
    mode, channels = draw(st.sampled_from(MODES)), draw(st.sampled_from([1, 3]))
    kind = draw(st.sampled_from(["noise", "gray", "binary"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images = rng.integers(0, 2 if kind == "binary" else 256, (4, height, width, channels), dtype=np.uint8)
    if kind == "gray":
        images[:] = 128
    return RandomCrop(size=size, padding=padding, padding_mode=mode), images, rng


@settings(max_examples=50)
@given(cases())
def test_the_same_bytes_as_torchvision_on_pil_images(case):
    plugin, images, rng = case
    draws = plugin.draw(rng, len(images), images.shape[1:3])
    assert np.array_equal(crop(plugin, images, draws), reference(plugin, images, draws))


@pytest.mark.skipif(not CIFAR.exists(), reason="the CIFAR-10 images are not here")
def test_the_same_bytes_on_photographs():
    with zipfile.ZipFile(CIFAR) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".png"))[::200]
        images = np.stack([np.asarray(Image.open(archive.open(name)).convert("RGB")) for name in names])
    for mode in MODES:
        plugin = RandomCrop(size=32, padding=4, padding_mode=mode)
        draws = plugin.draw(np.random.default_rng(0), len(images), (32, 32))
        assert np.array_equal(crop(plugin, images, draws), reference(plugin, images, draws))


@pytest.mark.parametrize(("size", "padding"), [(8, 2), ((5, 9), (0, 2)), ((8, 10), 0), ((10, 3), (1, 2, 3, 0))])
def test_corners_are_distributed_as_torchvision_distributes_them(size, padding):
    n, shape = 6000, (8, 10)
    plugin = RandomCrop(size=size, padding=padding)
    left, top, right, bottom = np.resize(padding, 4)
    padded = torch.zeros(1, shape[0] + top + bottom, shape[1] + left + right)
    torch.manual_seed(0)
    theirs = np.array([Reference.get_params(padded, plugin.out_size(shape))[:2] for _ in range(n)])
    draws = plugin.draw(np.random.default_rng(0), n, shape)
    ours = np.stack([draws["top"], draws["left"]], 1)
    assert np.array_equal(np.unique(ours, axis=0), np.unique(theirs, axis=0))  # every place that they use, and no other
    places = np.unique(theirs, axis=0)
    for place in places:
        share = (ours == place).all(1).mean() * len(places)
        assert share == pytest.approx(1, abs=5 * np.sqrt(len(places) / n))


def test_training_images_only():
    run = build_run({"random_crop": RandomCrop(size=(6, 5), padding=1)}, mixed_sizes=True)
    images = run.data.train.images

    def stream(name):
        return np.random.default_rng(0)

    assert run.transforms["train"](images, stream).shape[2:] == (6, 5)
    assert torch.equal(run.transforms["test"](images, stream), images.float() / 255)


@pytest.mark.parametrize("size", [13, (12, 13), (13, 12)])
def test_a_crop_larger_than_the_padded_image_is_refused(size):
    assert RandomCrop(size=12, padding=2).out_size((8, 8)) == (12, 12)
    with pytest.raises(RecipeError, match=r"plugins\.random_crop\.size: .*13.*8x8 and 12x12"):
        run_steps({"random_crop": RandomCrop(size=size, padding=2)})


@pytest.mark.parametrize(
    "options",
    [{"size": 4}, {"size": [4, 6], "padding": [1, 2], "padding_mode": "edge"}, {"size": 4, "padding": [1] * 4}],
)
def test_a_recipe_gives_numbers_or_lists(options):
    size = options["size"]
    plugin = from_recipe(RandomCrop, **options)
    assert plugin.out_size((8, 8)) == ((size, size) if isinstance(size, int) else tuple(size))
    plugin.draw(np.random.default_rng(0), 2, (8, 8))


def test_impossible_options_are_refused():
    assert_refuses(RandomCrop, "size", 0, [4, -1], [4, 4, 4])
    assert_refuses(RandomCrop, "padding", -1, [1, 2, 3], [], [1, -1], size=4)
    assert_refuses(RandomCrop, "padding_mode", "mirror", size=4)
