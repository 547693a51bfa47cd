from itertools import permutations
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as F

from trainkit.data import Data, TensorSplit
from trainkit.errors import PluginError, RecipeError
from trainkit.rng import stream
from trainkit.testing import assert_refuses, build_run, from_recipe, run_steps, watch
from trainkit_color_jitter import ColorJitter

ZIP = next((Path(__file__).parents[3].parent / "shared" / "data" / "cifar10").glob("*.zip"), None)
OPERATIONS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
STRONG = ColorJitter(brightness=(0, 3), contrast=(0, 3), saturation=(0, 3), hue=0.5)


def to_pil(image):
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


def torchvision(images, params):
    """torchvision's functions on PIL images, one by one."""
    results = []
    for image, order, factors in zip(images, params["order"].tolist(), params["factor"].tolist(), strict=True):
        pil = to_pil(image)
        for operation, factor in zip(order, factors, strict=True):
            pil = OPERATIONS[operation](pil, factor)
        results.append(from_pil(pil))
    return torch.stack(results)


def drawn(jitter, n, size=(8, 8), seed=0):
    return {k: torch.from_numpy(v) for k, v in jitter.draw(stream(seed, "test"), n, size).items()}


def given_params(orders, factors):
    """Params of chosen orders and of chosen factors by operation."""
    order = torch.tensor(orders)
    factor = torch.tensor(factors, dtype=torch.float32)
    shift = np.int32(factor[:, 3].double().numpy() * 255).astype(np.uint8)
    return {"order": order, "factor": factor.gather(1, order), "shift": torch.from_numpy(shift)}


def made(kind, n=48, size=(13, 17), channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (n, channels, *size), generator=generator, dtype=torch.uint8)
    match kind:
        case "noise":
            return noise
        case "gray":
            return noise[:, :1].repeat(1, channels, 1, 1)
        case "binary":
            return (noise > 127).to(torch.uint8) * 255
        case "dark":
            return noise % 3
        case "black":
            return torch.zeros_like(noise)


@pytest.mark.parametrize("kind", ["noise", "gray", "binary", "dark", "black"])
def test_equals_torchvision_on_pil_images(kind):
    for jitter in (ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1), STRONG):
        for channels in (3, 1):
            images, params = made(kind, channels=channels), drawn(jitter, 48)
            assert torch.equal(jitter.apply(images.clone(), params), torchvision(images, params))


def test_every_order():
    orders = list(permutations(range(4)))
    images, params = made("noise", n=24), given_params(orders, [(0.7, 1.6, 1.3, -0.2)] * 24)
    assert torch.equal(ColorJitter().apply(images.clone(), params), torchvision(images, params))


factors = st.tuples(*[st.floats(0, 4, width=32)] * 3, st.floats(-0.5, 0.5, width=32))
steps = st.lists(st.tuples(st.permutations(range(4)), factors), min_size=1, max_size=3)


@settings(max_examples=40)
@given(steps, st.tuples(st.integers(1, 40), st.integers(1, 40)), st.sampled_from([1, 3]), st.integers(0, 2**32))
def test_any_factors_sizes_and_orders(steps, size, channels, seed):
    images = made("noise", len(steps), size, channels, seed)
    params = given_params(*zip(*steps, strict=True))
    assert torch.equal(ColorJitter().apply(images.clone(), params), torchvision(images, params))


@pytest.mark.parametrize("factor", [0.1, -0.25, 0.5, -0.5])
def test_hue_of_every_fifth_level_and_the_extremes(factor):
    levels = torch.cat([torch.arange(0, 255, 5), torch.tensor([1, 17, 254, 255])])
    colors = torch.cartesian_prod(levels, levels, levels).to(torch.uint8).T.reshape(1, 3, len(levels), -1)
    params = {"order": torch.tensor([[3]]), "factor": torch.tensor([[factor]])}
    shift = torch.tensor([int(factor * 255) % 256], dtype=torch.uint8)
    ours = ColorJitter().apply(colors.clone(), {**params, "shift": shift})
    assert torch.equal(ours, torchvision(colors, params))


@pytest.mark.skipif(ZIP is None, reason="needs the CIFAR-10 images")
def test_equals_torchvision_on_photographs():
    with ZipFile(ZIP) as archive:
        names = [name for name in archive.namelist() if "test/" in name and name.endswith(".png")][::200]
        images = torch.stack([from_pil(Image.open(archive.open(name)).convert("RGB")) for name in names])
    jitter = ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1)
    params = drawn(jitter, len(images))
    assert len(images) >= 50
    assert torch.equal(jitter.apply(images.clone(), params), torchvision(images, params))


def test_images_one_by_one_equal_the_batch():
    images, params = made("noise"), drawn(STRONG, 48)
    one_by_one = [
        STRONG.apply(images[i : i + 1].clone(), {k: v[i : i + 1] for k, v in params.items()}) for i in range(48)
    ]
    assert torch.equal(torch.cat(one_by_one), STRONG.apply(images.clone(), params))


def test_memory_format_does_not_matter():
    images, params = made("noise"), drawn(STRONG, 48)
    apart = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(STRONG.apply(apart, params), STRONG.apply(images.clone(), params))


def test_needs_no_value_on_the_host():
    params = {k: v.to("meta") for k, v in drawn(STRONG, 48).items()}  # a device without values
    assert STRONG.apply(made("noise").to("meta"), params).shape == (48, 3, 13, 17)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_one_operation_alone(name):
    jitter = ColorJitter(**{name: 0.4})
    images, params = made("noise"), drawn(jitter, 48)
    assert params["order"].shape == (48, 1)
    assert torch.equal(jitter.apply(images.clone(), params), torchvision(images, params))


def test_off_changes_nothing():
    off = ColorJitter(brightness=0, contrast=(1, 1), saturation=(1.0, 1.0), hue=(0, 0))
    images, params = made("noise"), drawn(off, 48)
    assert params["order"].shape == (48, 0)
    assert torch.equal(off.apply(images.clone(), params), images)


def test_draws_have_torchvisions_distribution():
    n, options = 6000, {"brightness": 0.4, "contrast": (0.5, 2.0), "saturation": 1.5, "hue": 0.2}
    ours = drawn(ColorJitter(**options), n)
    theirs = transforms.ColorJitter(**options)
    torch.manual_seed(0)
    sample = [theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue) for _ in range(n)]
    factor = torch.empty(n, 4).scatter_(1, ours["order"], ours["factor"])
    expected = torch.tensor([s[1:] for s in sample])
    levels = torch.linspace(0, 1, 11)
    spread = torch.tensor([0.8, 1.5, 2.5, 0.4])
    assert ((factor.quantile(levels, 0) - expected.quantile(levels, 0)) / spread).abs().max() < 0.04
    assert torch.corrcoef(torch.cat([factor, ours["order"]], 1).T)[:4].fill_diagonal_(0).abs().max() < 0.05
    code = torch.tensor([64, 16, 4, 1])
    _, counts = (ours["order"] @ code).unique(return_counts=True)
    assert len(counts) == 24
    assert ((counts - n / 24) ** 2 / (n / 24)).sum() < 50  # chi-square, 23 degrees of freedom: 0.1 % lie above 49.7
    hue = ours["factor"][ours["order"] == 3].double().numpy()
    assert np.array_equal(ours["shift"].numpy(), np.int32(hue * 255).astype(np.uint8))


def test_training_images_only():
    run = build_run({"color_jitter": STRONG})
    assert [step for _, step in run.transforms["train"].steps] == [STRONG]
    assert run.transforms["test"].steps == ()
    run_steps({"color_jitter": STRONG})


def test_other_images_are_refused():
    split = TensorSplit(torch.zeros(8, 4, 2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    data = Data(train=split, test=split, classes=("one",), shape=(4, 2, 2))
    with pytest.raises(RecipeError, match="4 channels"):
        build_run({"data": watch(data=lambda: data), "color_jitter": STRONG})


def test_must_come_before_normalize():
    with pytest.raises(PluginError, match="normalize"):
        build_run({"normalize": watch(), "color_jitter": ColorJitter()})


def test_wrong_amounts():
    assert_refuses(ColorJitter, "brightness", -0.1, float("nan"))
    assert_refuses(ColorJitter, "contrast", [1.2, 0.8], float("inf"))
    assert_refuses(ColorJitter, "saturation", [-1, 1])
    assert_refuses(ColorJitter, "hue", 0.6, [-0.6, 0], -0.1)


@pytest.mark.parametrize("value", [0, 0.5, [1, 2]])
def test_amounts_in_a_recipe(value):
    jitter = from_recipe(ColorJitter, contrast=value)
    assert drawn(jitter, 3)["order"].shape == (3, 0 if value == 0 else 1)
