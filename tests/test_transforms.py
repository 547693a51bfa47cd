from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as TF

from trainkit import transforms
from trainkit.errors import PluginError, RecipeError
from trainkit.rng import stream
from trainkit.testing import run_steps, watch
from trainkit.transforms import Gather, Map, Pipeline, gather, to_float

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "test.zip"


class Shift(Gather):
    """Move each image by its own distance: separable, and leaves black margins."""

    def draw(self, rng, n, size):
        return {"dy": rng.integers(-4, 5, n), "dx": rng.integers(-4, 5, n)}

    def source(self, params, y, x, size):
        return y + params["dy"].view(-1, 1, 1), x + params["dx"].view(-1, 1, 1)


class Shear(Gather):
    """Move each row by its own distance: not separable."""

    def draw(self, rng, n, size):
        return {"slope": rng.integers(-2, 3, n, dtype=np.int32)}

    def source(self, params, y, x, size):
        return y, x + params["slope"].view(-1, 1, 1) * y


class Transpose(Gather):
    """Swap rows and columns: changes the size, and draws nothing."""

    def source(self, params, y, x, size):
        return x, y

    def out_size(self, size):
        return size[1], size[0]


class Window(Gather):
    """Look at the image through a larger window: some of every output lies outside."""

    def source(self, params, y, x, size):
        return y - 1, x - 2

    def out_size(self, size):
        return size[0] + 2, size[1] + 3


class Invert(Map):
    """Turn black white: does not commute with a gather that leaves margins."""

    def apply(self, images, params):
        return 255 - images


class Brighten(Map):
    """Return float images, each brighter by its own random amount."""

    def draw(self, rng, n, size):
        return {"amount": rng.random(n, dtype=np.float32)}

    def apply(self, images, params):
        return to_float(images) + params["amount"].view(-1, 1, 1, 1)


class Numbered(Map):
    """Paint each image with a number of its own, and with the epoch's."""

    needs_indices = True

    def look_up(self, indices, epoch):
        return {"number": 10 * epoch + indices}

    def apply(self, images, params):
        return params["number"].view(-1, 1, 1, 1).expand(images.shape).to(torch.float32)


class TooSmall(Gather):
    """Refuse images."""

    def source(self, params, y, x, size):
        raise AssertionError

    def out_size(self, size):
        raise RecipeError(f"{size[0]}x{size[1]} is too small")


def pixel_by_pixel(images, step, params):
    """What one gather means: ask for the source of each pixel, copy it or leave black."""
    n, channels, height, width = images.shape
    out = torch.zeros(n, channels, *step.out_size((height, width)), dtype=images.dtype)
    for image in range(n):
        mine = {name: values[image : image + 1] for name, values in params.items()}
        for row in range(out.shape[2]):
            for column in range(out.shape[3]):
                y, x = torch.tensor(row).view(1, 1, 1), torch.tensor(column).view(1, 1, 1)
                y, x = (int(v) for v in step.source(mine, y, x, (height, width)))
                if 0 <= y < height and 0 <= x < width:
                    out[image, :, row, column] = images[image, :, y, x]
    return out


def drawn(steps, seed, n, size):
    pipeline = Pipeline([(str(number), step) for number, step in enumerate(steps)])
    params = pipeline.draw(n, size, lambda name: stream(seed, name), torch.device("cpu"))
    return list(zip(steps, params, strict=True))


def noise(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 256, shape, dtype=np.uint8))


steps = st.lists(st.sampled_from([Shift(), Shear(), Transpose(), Window()]), min_size=1, max_size=4)
shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 4]), st.integers(1, 6), st.integers(1, 6))


@given(steps, shapes, st.integers(0, 2**32))
def test_neighbouring_gathers_equal_one_after_another(steps, shape, seed):
    images = noise(seed, *shape)
    plan = drawn(steps, seed, shape[0], shape[2:])
    one_by_one = images
    for step, params in plan:
        one_by_one = gather(one_by_one, [(step, params)])
    assert torch.equal(gather(images, plan), one_by_one)


@given(steps.map(lambda steps: steps[:1]), shapes, st.integers(0, 2**32))
def test_a_gather_copies_each_pixel_from_its_source(steps, shape, seed):
    images = noise(seed, *shape)
    ((step, params),) = drawn(steps, seed, shape[0], shape[2:])
    assert torch.equal(gather(images, [(step, params)]), pixel_by_pixel(images, step, params))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gather_takes_any_dtype_and_layout_and_leaves_its_input(dtype, layout):
    images = noise(0, 3, 3, 5, 7).to(dtype).contiguous(memory_format=layout)
    before = images.clone()
    plan = drawn([Shift(), Shear()], 1, 3, (5, 7))
    out = gather(images, plan)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert torch.equal(out.to(torch.uint8), gather(noise(0, 3, 3, 5, 7), plan))
    assert torch.equal(images, before)


def test_maps_and_gathers_keep_their_order():
    images = noise(0, 2, 1, 4, 4)
    before = Pipeline([("window", Window()), ("invert", Invert())])(images, lambda name: stream(0, name))
    after = Pipeline([("invert", Invert()), ("window", Window())])(images, lambda name: stream(0, name))
    framed = torch.nn.functional.pad(images, (2, 1, 1, 1))
    assert torch.equal(before, to_float(255 - framed))
    assert torch.equal(after, to_float(torch.nn.functional.pad(255 - images, (2, 1, 1, 1))))


@given(st.integers(1, 9), st.integers(1, 400))
def test_chunks_do_not_change_results(n, pixels):
    images = noise(n, n, 3, 6, 5)
    pipeline = Pipeline([("a", Shift()), ("b", Window()), ("c", Brighten()), ("d", Shear())])
    whole = pipeline(images, lambda name: stream(3, name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "CPU_CHUNK", pixels)
        assert torch.equal(pipeline(images, lambda name: stream(3, name)), whole)


def test_a_chunk_bounds_the_pixels_in_work(monkeypatch):
    seen = []

    class Watch(Map):
        def apply(self, images, params):
            seen.append(tuple(images.shape))
            return images

    monkeypatch.setattr(transforms, "CPU_CHUNK", 300)
    Pipeline([("window", Window()), ("watch", Watch())])(noise(0, 7, 3, 8, 7), lambda name: stream(0, name))
    assert seen == [(3, 3, 10, 10), (3, 3, 10, 10), (1, 3, 10, 10)]


def test_what_is_uint8_at_the_end_is_scaled_as_totensor_scales():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    out = Pipeline([])(values, lambda name: stream(0, name))
    assert torch.equal(out[0], TF.to_tensor(Image.fromarray(values[0, 0].numpy())))


def test_what_is_float_at_the_end_stays():
    images = noise(0, 2, 3, 4, 4)
    pipeline = Pipeline([("brighten", Brighten())])
    (params,) = pipeline.draw(2, (4, 4), lambda name: stream(0, name), torch.device("cpu"))
    out = pipeline(images, lambda name: stream(0, name))
    assert torch.equal(out, to_float(images) + params["amount"].view(-1, 1, 1, 1))
    assert out.max() > 1


def test_each_transform_draws_from_the_stream_of_its_own_name():
    alone = Pipeline([("shift", Shift())])
    among = Pipeline([("window", Window()), ("shear", Shear()), ("shift", Shift()), ("other", Shift())])

    def draw(pipeline):
        return pipeline.draw(50, (4, 4), lambda name: stream(5, name), torch.device("cpu"))

    (mine,), (_, _, same, other) = draw(alone), draw(among)
    assert all(torch.equal(mine[name], same[name]) for name in mine)
    assert not all(torch.equal(mine[name], other[name]) for name in mine)


def test_sizes_follow_the_transforms():
    pipeline = Pipeline([("a", Window()), ("b", Invert()), ("c", Transpose())])
    assert pipeline.sizes((4, 8)) == [(4, 8), (6, 11), (6, 11), (11, 6)]
    seen = []

    class Watch(Invert):
        def draw(self, rng, n, size):
            seen.append((n, size))
            return {}

    Pipeline([("a", Window()), ("w", Watch())])(noise(0, 2, 1, 4, 8), lambda name: stream(0, name))
    assert seen == [(2, (6, 11))]


def test_a_size_that_a_transform_cannot_take_is_known_without_images():
    with pytest.raises(RecipeError, match="6x11 is too small"):
        Pipeline([("a", Window()), ("b", TooSmall())]).sizes((4, 8))


def photographs():
    with ZipFile(CIFAR) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".png"))[::200]
        return torch.stack([TF.pil_to_tensor(Image.open(archive.open(name)).convert("RGB")) for name in names])


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(lambda: noise(0, 50, 3, 32, 32), id="noise"),
        pytest.param(lambda: noise(1, 50, 1, 28, 40), id="one channel, not square"),
        pytest.param(photographs, id="cifar10", marks=pytest.mark.skipif(not CIFAR.exists(), reason="no images here")),
    ],
)
def test_rotation_crop_and_flip_at_once_equal_pil_one_after_another(images):
    rotation = pytest.importorskip("trainkit_random_rotation").RandomRotation(degrees=10)
    crop = pytest.importorskip("trainkit_random_crop").RandomCrop(size=32, padding=2)
    flip = pytest.importorskip("trainkit_random_horizontal_flip").RandomHorizontalFlip()
    images = images()
    plan = drawn([rotation, crop, flip], 0, len(images), tuple(images.shape[2:]))
    turned, cropped, flipped = (params for _, params in plan)
    expected = []
    for n, image in enumerate(images):
        pil = TF.rotate(TF.to_pil_image(image), float(turned["angle"][n]))
        pil = TF.crop(TF.pad(pil, 2), int(cropped["top"][n]), int(cropped["left"][n]), 32, 32)
        expected.append(TF.pil_to_tensor(TF.hflip(pil) if flipped["flip"][n] else pil))
    assert torch.equal(gather(images, plan), torch.stack(expected))


def test_a_transform_may_know_which_images_it_gets_in_a_batch_of_several_chunks(monkeypatch):
    pipeline = Pipeline([("numbered", Numbered())])
    images, indices = noise(0, 7, 3, 4, 4), torch.tensor([5, 0, 3, 9, 1, 1, 2])
    monkeypatch.setattr(transforms, "CPU_CHUNK", 2 * 4 * 4)
    painted = pipeline(images, lambda name: stream(0, name), indices, 2)
    assert painted[:, 0, 0, 0].tolist() == [25, 20, 23, 29, 21, 21, 22]
    with pytest.raises(PluginError, match="transform 'numbered' needs to know which images it gets"):
        pipeline(images, lambda name: stream(0, name))


def test_a_run_tells_transforms_which_images_they_get_and_in_which_epoch():
    seen = []
    note = watch(
        transforms=lambda split: Numbered(),
        forward_end=lambda run, batch: seen.append((run.split, run.epoch, batch.indices, batch.images[:, 0, 0, 0])),
    )
    run_steps({"note": note}, steps=8)
    assert {(split, epoch) for split, epoch, *_ in seen} == {("train", 0), ("test", 0), ("train", 1), ("test", 1)}
    assert all(torch.equal(numbers, (10 * epoch + indices).float()) for _, epoch, indices, numbers in seen)
