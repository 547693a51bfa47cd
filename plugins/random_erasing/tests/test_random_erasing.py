import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomErasing as Reference
from torchvision.transforms import functional as TF

from trainkit.errors import RecipeError, TrainkitError
from trainkit.rng import stream
from trainkit.testing import assert_refuses, build_run, from_recipe, run_steps, watch
from trainkit.transforms import Map
from trainkit_random_erasing import RandomErasing


def built(**options):
    """A plugin as it is in a run on RGB images."""
    erasing = RandomErasing(**options)
    build_run({"random_erasing": erasing})
    return erasing


def noise(n, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, *size), generator=generator, dtype=torch.uint8)
    return images if dtype == torch.uint8 else (images.float() - 128) / 60


def drawn(erasing, n, size, seed=0):
    return {k: torch.from_numpy(v) for k, v in erasing.draw(stream(seed, "test"), n, size).items()}


def torchvision(images, params, value):
    """torchvision's function on the images, one by one."""
    value = torch.tensor(value if isinstance(value, tuple) else [value])[:, None, None]
    boxes = zip(*(params[k].tolist() for k in "ijhw"), strict=True)
    return torch.stack([TF.erase(image, *box, value) for image, box in zip(images, boxes, strict=True)])


@settings(max_examples=40)
@given(st.data())
def test_equals_torchvisions_for_the_same_boxes(data):
    size = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.float32]))
    number = st.integers(0, 255) if dtype == torch.uint8 else st.floats(-3, 3, width=32)
    value = data.draw(number | st.tuples(number, number, number))
    low, high = sorted(data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    erasing = built(p=data.draw(st.sampled_from([0.0, 0.5, 1.0])), scale=(low, high), value=value)
    images, params = noise(6, size, dtype), drawn(erasing, 6, size, data.draw(st.integers(0, 2**32)))
    before = images.clone()
    erased = erasing.apply(images, params)
    assert erased.dtype == dtype
    assert torch.equal(erased, torchvision(images, params, value))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((32, 32), {}),
        ((20, 45), {"scale": (0.1, 0.2), "ratio": (0.5, 2.0)}),
        ((32, 32), {"scale": (0.4, 1.0), "ratio": (1.8, 3.3)}),  # most tries do not fit, and often none of ten
        ((4, 5), {"scale": (0.0, 0.1)}),  # boxes of no pixels
    ],
)
def test_boxes_are_distributed_as_torchvision_distributes_them(size, options):
    n = 4000
    image = torch.zeros(1, *size)
    reference = Reference(**options)
    torch.manual_seed(0)
    theirs = np.array([reference.get_params(image, reference.scale, reference.ratio, [0.0])[:4] for _ in range(n)])
    theirs[(theirs[:, 2:] == size).all(1)] = 0  # torchvision's way to say that nothing fits: the image itself
    draws = RandomErasing(p=1, **options).draw(stream(0, "test"), n, size)
    ours = np.stack([draws[k] for k in "ijhw"], 1)
    assert (ours >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    ours, theirs = (boxes[(boxes[:, 2:] > 0).all(1)] for boxes in (ours, theirs))
    assert len(ours) / n == pytest.approx(len(theirs) / n, abs=0.05)
    for mine, other in zip(ours.T, theirs.T, strict=True):
        shares = [np.searchsorted(np.sort(side), np.arange(46), side="right") / len(side) for side in (mine, other)]
        # a greater distance between two samples of one distribution has a chance of 1e-6
        assert np.abs(shares[0] - shares[1]).max() < 2.7 * np.sqrt(1 / len(ours) + 1 / len(theirs))


def test_an_image_in_which_no_box_fits_stays_as_it_is():
    erasing = built(p=1, scale=(1, 1), ratio=(1, 1), value=9)  # a box of the image's own size, which is too large
    images = noise(4, (16, 16), torch.uint8)
    assert torch.equal(erasing.apply(images, drawn(erasing, 4, (16, 16))), images)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_p_is_the_share_of_erased_images(p):
    draws = RandomErasing(p=p, scale=(0.1, 0.3)).draw(stream(0, "test"), 10_000, (32, 32))
    erased = draws["h"] * draws["w"] > 0
    assert erased.mean() == pytest.approx(p, abs=0.025 if 0 < p < 1 else 0)


def test_random_fills_with_standard_normal_noise_of_each_pixels_own():
    erasing = built(p=1, scale=(0.2, 0.4), value="random")
    images = torch.full((200, 3, 32, 32), 100.0)
    params = drawn(erasing, 200, (32, 32))
    erased = erasing.apply(images, params)
    inside = erased[erased != 100]
    assert len(inside) == 3 * int((params["h"] * params["w"]).sum())
    assert float(inside.mean()) == pytest.approx(0, abs=0.01)
    assert float(inside.std()) == pytest.approx(1, abs=0.01)
    assert float((inside.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.01)
    assert len(inside.unique()) > 0.98 * len(inside)  # float32 has not many more values


def test_random_noise_depends_on_the_stream_alone():
    erasing, images = built(p=1, value="random"), torch.zeros(4, 3, 16, 16)
    first, other = (erasing.apply(images, drawn(erasing, 4, (16, 16), seed)) for seed in (0, 1))
    again = built(p=1, value="random")
    assert torch.equal(first, again.apply(images, drawn(again, 4, (16, 16), 0)))
    assert not torch.equal(first, other)


def test_images_one_by_one_equal_the_batch():
    erasing = built(p=1, value=(1.0, 2.0, 3.0))
    images, params = noise(8, (20, 24), torch.float32), drawn(erasing, 8, (20, 24))
    one_by_one = [erasing.apply(images[i : i + 1], {k: v[i : i + 1] for k, v in params.items()}) for i in range(8)]
    assert torch.equal(torch.cat(one_by_one), erasing.apply(images, params))


def test_needs_no_value_on_the_host():
    erasing = built()
    params = {k: v.to("meta") for k, v in drawn(erasing, 8, (20, 24)).items()}  # a device without values
    erasing._fill = erasing._fill.to("meta")
    assert erasing.apply(noise(8, (20, 24), torch.float32).to("meta"), params).shape == (8, 3, 20, 24)


def test_training_images_only():
    run = build_run({"random_erasing": RandomErasing(p=1, scale=(0.2, 0.3), value=255)})
    images = run.data.train.images
    erased, tested = (run.transforms[s](images, lambda name: stream(0, name)) for s in ("train", "test"))
    assert torch.equal(tested, images.float() / 255)
    changed = (erased != tested).any(1).float().mean((1, 2))
    assert ((changed > 0.1) & (changed < 0.4)).all()
    assert (erased[(erased != tested)] == 1).all()


class Scale(Map):
    """Makes float images."""

    def apply(self, images, params):
        return images / 128 - 1


def test_the_numbers_must_fit_the_channels():
    with pytest.raises(RecipeError, match=r"random_erasing\.value: it has 2 numbers, and the images have 3 channels"):
        build_run({"random_erasing": RandomErasing(value=(1, 2))})


@pytest.mark.parametrize("value", ["random", 0.5, -1, 256, (0, 0, 1.5)])
def test_uint8_images_take_whole_numbers_of_a_byte(value):
    with pytest.raises(TrainkitError, match=r"0 to 255; or move the line `random_erasing:` below `normalize:`"):
        run_steps({"random_erasing": RandomErasing(value=value)})
    run_steps({"scale": watch(transforms=lambda run: Scale()), "random_erasing": RandomErasing(value=value)})


@pytest.mark.parametrize("options", [{"value": 1}, {"value": [1, 2.5, 3], "scale": [0, 1]}, {"value": "random"}])
def test_a_recipe_gives_numbers_lists_or_random(options):
    erasing = from_recipe(RandomErasing, **options)
    build_run({"random_erasing": erasing})
    assert erasing.apply(torch.zeros(2, 3, 9, 9), drawn(erasing, 2, (9, 9))).shape == (2, 3, 9, 9)


def test_impossible_options_are_refused():
    assert_refuses(RandomErasing, "p", 1.5)
    assert_refuses(RandomErasing, "scale", [0.5, 0.2], [-0.1, 0.2], [0.5, 1.1])
    assert_refuses(RandomErasing, "ratio", [0, 1], [2, 1], [1, float("inf")])
    assert_refuses(RandomErasing, "value", "mean", None)
