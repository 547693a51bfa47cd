"""The paper's whole augmentation, as its recipes list it, is byte for byte torchvision's on PIL images."""

from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import load_recipe, make_options
from trainkit.registry import find
from trainkit.rng import stream
from trainkit.testing import build_run, fake_data

ROOT = Path(__file__).parents[1]
NAMES = ("random_resized_crop", "random_rotation", "random_crop", "random_horizontal_flip", "color_jitter", "normalize")
JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@plugin
class Images:
    @hookimpl
    def data(self):
        return fake_data(size=32)


def pipeline(*names):
    recipe = load_recipe(ROOT / "recipes" / "basic_se.yaml")
    installed = find(recipe)
    order = [name for name in recipe.plugins if name in names]
    assert tuple(order) == tuple(name for name in NAMES if name in names)
    plugins = {name: make_options(recipe, name, installed[name].load()) for name in order}
    return build_run({"images": Images(), **plugins}).transforms["train"]


def one_by_one(image, crop, rotation, shift, flip, jitter):
    """torchvision's functions on one PIL image."""
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    pil = F.resized_crop(pil, *(int(crop[k]) for k in "ijhw"), [32, 32], F.InterpolationMode.BILINEAR)
    pil = F.rotate(pil, float(rotation["angle"]))
    pil = F.crop(F.pad(pil, 2), int(shift["top"]), int(shift["left"]), 32, 32)
    pil = F.hflip(pil) if flip["flip"] else pil
    for operation, factor in zip(jitter["order"].tolist(), jitter["factor"].tolist(), strict=True):
        pil = JITTER[operation](pil, factor)
    return torch.from_numpy(np.array(pil)).permute(2, 0, 1)


def real_images(n):
    archive = ROOT.parent / "shared" / "data" / "cifar10" / "test.zip"
    if not archive.exists():
        pytest.skip("the real images are not here")
    with ZipFile(archive) as files:
        names = sorted(name for name in files.namelist() if name.endswith(".png"))
        images = [np.array(Image.open(files.open(name))) for name in names[:: len(names) // n][:n]]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def noise(n):
    return torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("images", [noise, real_images])
def test_the_whole_chain_is_torchvisions(images):
    batch = images(400)
    chain = pipeline(*NAMES[:-1])
    params = chain.draw(len(batch), (32, 32), lambda name: stream(0, name), batch.device)
    rows = [[{k: v[n] for k, v in p.items()} for p in params] for n in range(len(batch))]
    expected = torch.stack([one_by_one(image, *row) for image, row in zip(batch, rows, strict=True)])
    assert torch.equal(chain.apply(batch, params), expected.to(torch.float32).div(255))

    whole = pipeline(*NAMES)
    mean, std = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
    normalized = torch.stack([F.normalize(F.to_tensor(i.permute(1, 2, 0).numpy()), mean, std) for i in expected])
    assert torch.equal(whole(batch, lambda name: stream(0, name)), normalized)
