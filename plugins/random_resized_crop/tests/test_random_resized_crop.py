from pathlib import Path
from zipfile import ZipFile

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as F

from trainkit.errors import PluginError
from trainkit.rng import stream
from trainkit.testing import assert_refuses, build_run, from_recipe, run_steps, watch
from trainkit_random_resized_crop import RandomResizedCrop

ZIP = next((Path(__file__).parents[3].parent / "shared" / "data" / "cifar10").glob("*.zip"), None)
shrinks = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 13 changed the order of passes")


def from_pil(image):
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


def torchvision(images, params, size):
    """torchvision's function on PIL images, one by one."""
    results = []
    for image, i, j, h, w in zip(images, *(params[k].tolist() for k in "ijhw"), strict=True):
        pil = Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
        results.append(from_pil(F.resized_crop(pil, i, j, h, w, list(size), F.InterpolationMode.BILINEAR)))
    return torch.stack(results)


def drawn(crop, n, size, seed=0):
    return {k: torch.from_numpy(v) for k, v in crop.draw(stream(seed, "test"), n, size).items()}


def noise(n, channels, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, *size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("size", "out", "n"),
    [
        ((32, 32), (32, 32), 64),
        ((17, 23), (32, 32), 32),
        pytest.param((64, 64), (16, 16), 32, marks=shrinks),
        pytest.param((224, 224), (64, 64), 8, marks=shrinks),
        pytest.param((90, 37), (9, 30), 32, marks=shrinks),
        pytest.param((37, 90), (30, 9), 32, marks=shrinks),
    ],
)
def test_equals_torchvision_on_pil_images(size, out, n):
    for channels in (1, 3):
        crop = RandomResizedCrop(size=out)
        images, params = noise(n, channels, size), drawn(crop, n, size)
        ours = crop.apply(images.clone(), params)
        assert ours.shape == (n, channels, *out)
        assert ours.is_contiguous()
        assert torch.equal(ours, torchvision(images, params, out))


@shrinks
@settings(max_examples=50)
@given(st.data(), st.integers(0, 2**32))
def test_any_boxes_and_sizes(data, seed):
    size, out = (data.draw(st.tuples(st.integers(1, 48), st.integers(1, 48))) for _ in range(2))
    boxes = []
    for _ in range(data.draw(st.integers(1, 3))):
        h, w = data.draw(st.integers(1, size[0])), data.draw(st.integers(1, size[1]))
        boxes.append((data.draw(st.integers(0, size[0] - h)), data.draw(st.integers(0, size[1] - w)), h, w))
    params = dict(zip("ijhw", torch.tensor(boxes).T, strict=True))
    images = noise(len(boxes), 3, size, seed)
    ours = RandomResizedCrop(size=out).apply(images.clone(), params)
    assert torch.equal(ours, torchvision(images, params, out))


@settings(max_examples=50)
@given(st.integers(1, 2000), st.integers(1, 600), st.booleans())
def test_weights_for_any_lengths(length, out, vertical):
    """One line of pixels: only one pass has work to do."""
    images = noise(1, 1, (1, length))
    zero, one, length = torch.tensor([0]), torch.tensor([1]), torch.tensor([length])
    params, size = {"i": zero, "j": zero, "h": one, "w": length}, (1, out)
    if vertical:
        images, params, size = images.mT, {"i": zero, "j": zero, "h": length, "w": one}, (out, 1)
    ours = RandomResizedCrop(size=size).apply(images, params)
    assert torch.equal(ours, torchvision(images, params, size))


@pytest.mark.skipif(ZIP is None, reason="needs the CIFAR-10 images")
def test_equals_torchvision_on_photographs():
    with ZipFile(ZIP) as archive:
        names = [name for name in archive.namelist() if "test/" in name and name.endswith(".png")][::200]
        images = torch.stack([from_pil(Image.open(archive.open(name)).convert("RGB")) for name in names])
    crop = RandomResizedCrop(size=32, scale=(0.95, 1.0), ratio=(0.9, 1.1))
    params = drawn(crop, len(images), (32, 32))
    assert len(images) >= 50
    assert torch.equal(crop.apply(images.clone(), params), torchvision(images, params, (32, 32)))


def test_images_one_by_one_equal_the_batch():
    crop = RandomResizedCrop(size=(20, 24))
    images, params = noise(16, 3, (30, 28)), drawn(crop, 16, (30, 28))
    one_by_one = [crop.apply(images[i : i + 1], {k: v[i : i + 1] for k, v in params.items()}) for i in range(16)]
    assert torch.equal(torch.cat(one_by_one), crop.apply(images, params))


def test_needs_no_value_on_the_host():
    crop = RandomResizedCrop(size=(20, 24))
    params = {k: v.to("meta") for k, v in drawn(crop, 16, (30, 28)).items()}  # a device without values
    assert crop.apply(noise(16, 3, (30, 28)).to("meta"), params).shape == (16, 3, 20, 24)


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((32, 32), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((32, 32), (0.95, 1.0), (0.9, 1.1)),
        ((60, 20), (0.5, 1.0), (0.5, 2.0)),
    ],
)
def test_draws_have_torchvisions_distribution(size, scale, ratio):
    n = 4000
    ours = drawn(RandomResizedCrop(size=8, scale=scale, ratio=ratio), n, size)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    sample = [transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)]
    ours = torch.stack([ours[k] for k in "ijhw"], 1).double()
    theirs = torch.tensor(sample).double()
    error = (ours.var(0) / n + theirs.var(0) / n).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 4 * error + 1e-9).all()
    levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    assert (ours.quantile(levels, 0) - theirs.quantile(levels, 0)).abs().max() <= 1  # pixels
    torch.testing.assert_close(torch.corrcoef(ours.T), torch.corrcoef(theirs.T), rtol=0, atol=0.08)


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((10, 100), (0.9, 1.0), (0.9, 1.1)),
        ((100, 10), (0.9, 1.0), (0.9, 1.1)),
        ((30, 20), (2.0, 3.0), (0.5, 2.0)),
        ((7, 50), (1.0, 1.0), (0.3, 0.7)),
    ],
)
def test_central_crop_where_none_fits(size, scale, ratio):
    expected = transforms.RandomResizedCrop.get_params(torch.empty(3, *size), list(scale), list(ratio))
    params = drawn(RandomResizedCrop(size=8, scale=scale, ratio=ratio), 5, size)
    assert [tuple(params[k].tolist()) for k in "ijhw"] == [(v,) * 5 for v in expected]


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.floats(0.01, 2), st.floats(0.05, 20))
def test_crops_lie_within_the_image(size, scale, ratio):
    params = drawn(RandomResizedCrop(size=8, scale=(scale / 2, scale), ratio=(ratio, ratio * 1.5)), 20, size)
    assert (params["h"] >= 1).all()
    assert (params["w"] >= 1).all()
    assert (params["i"] >= 0).all()
    assert (params["j"] >= 0).all()
    assert (params["i"] + params["h"] <= size[0]).all()
    assert (params["j"] + params["w"] <= size[1]).all()


def test_training_images_only():
    crop = RandomResizedCrop(size=8)
    run = build_run({"random_resized_crop": crop})
    assert [step for _, step in run.transforms["train"].steps] == [crop]
    assert run.transforms["test"].steps == ()
    run_steps({"random_resized_crop": crop})


def test_must_come_before_normalize():
    with pytest.raises(PluginError, match="normalize"):
        build_run({"normalize": watch(), "random_resized_crop": RandomResizedCrop(size=8)})


def test_wrong_options():
    assert_refuses(RandomResizedCrop, "size", 0, [8, -1])
    assert_refuses(RandomResizedCrop, "scale", [0, 1], [1, 0.5], [float("nan"), 1], size=8)
    assert_refuses(RandomResizedCrop, "ratio", [0, 1], [2, 1], [1, float("inf")], size=8)


@pytest.mark.parametrize(("value", "size"), [(24, (24, 24)), ([24, 16], (24, 16))])
def test_size_in_a_recipe(value, size):
    crop = from_recipe(RandomResizedCrop, size=value, scale=[0.5, 1])
    assert crop.out_size((8, 8)) == size
    assert crop.scale == (0.5, 1.0)
