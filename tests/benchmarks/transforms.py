"""What the paper's augmentation costs an image, beside PIL, torchvision's v2 transforms and kornia; one thread, 32x32.

``--kornia DIR`` measures kornia, too, in a virtual environment that is made in DIR. ``--compile 1`` adds our pipeline
under torch.compile.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from common import ROOT, alternate, arguments, peers, report, show
from PIL import Image
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import v2

from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import load_recipe, make_options
from trainkit.registry import find
from trainkit.rng import stream
from trainkit.testing import build_run, fake_data

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
NAMES = ("random_resized_crop", "random_rotation", "random_crop", "random_horizontal_flip", "color_jitter", "normalize")
CROP_FLIP = ("random_crop", "random_horizontal_flip", "normalize")


@plugin
class _Images:
    @hookimpl
    def data(self) -> Any:
        return fake_data(size=32)


def ours(*names: str) -> Any:
    """Return our pipeline of the recipe's transforms."""
    recipe = load_recipe(ROOT / "recipes" / "basic_se.yaml")
    installed = find(recipe)
    chosen = {n: make_options(recipe, n, installed[n].load()) for n in recipe.plugins if n in names}
    return build_run({"images": _Images(), **chosen}).transforms["train"]


def of_torchvision(module: Any, names: tuple[str, ...]) -> Any:
    """Return the same transforms of torchvision, v1 or v2, for one PIL image."""
    made = {
        "random_resized_crop": module.RandomResizedCrop(32, scale=(0.95, 1.0), ratio=(0.9, 1.1)),
        "random_rotation": module.RandomRotation(10),
        "random_crop": module.RandomCrop(32, padding=2),
        "random_horizontal_flip": module.RandomHorizontalFlip(),
        "color_jitter": module.ColorJitter(0.1, 0.1, 0.1, 0.1),
    }
    last = [module.ToTensor()] if module is v1 else [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return module.Compose([*(made[n] for n in names if n in made), *last, module.Normalize(MEAN, STD)])


def timed(function: Callable[[], object], images: int) -> float:
    """Return microseconds an image."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) / images * 1e6


KORNIA = """
import json, sys, time, torch
import kornia.augmentation as K
torch.set_num_threads(1)
n = int(sys.argv[1])
chain = K.AugmentationSequential(
    K.RandomResizedCrop((32, 32), scale=(0.95, 1.0), ratio=(0.9, 1.1)), K.RandomRotation(10.0),
    K.RandomCrop((32, 32), padding=2), K.RandomHorizontalFlip(), K.ColorJitter(0.1, 0.1, 0.1, 0.1),
    K.Normalize(torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])))
images = torch.rand(n, 3, 32, 32)
chain(images)
start = time.perf_counter(); chain(images)
print(json.dumps((time.perf_counter() - start) / n * 1e6))
"""


def contenders(names: tuple[str, ...], batch: int, compiled: bool) -> dict[str, Callable[[], float]]:
    """Return what is measured for one chain of transforms."""
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    pil = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images]
    pipeline, old, new = ours(*names), of_torchvision(v1, names), of_torchvision(v2, names)
    numbers = count()

    def eager() -> Tensor:
        number = next(numbers)
        result: Tensor = pipeline(images, lambda name: stream(0, name, 0, number))
        return result

    made: dict[str, Callable[[], float]] = {
        "torchvision v1 on PIL images": lambda: timed(lambda: [old(p) for p in pil], batch),
        "torchvision v2 on PIL images": lambda: timed(lambda: [new(p) for p in pil], batch),
        "trainkit": lambda: timed(eager, batch),
    }
    if compiled:
        apply = torch.compile(pipeline.apply, dynamic=False)

        def fast() -> None:
            number = next(numbers)
            apply(images, pipeline.draw(batch, (32, 32), lambda name: stream(0, name, 0, number), images.device))

        fast()
        made["trainkit, compiled"] = lambda: timed(fast, batch)
    return made


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, batch=128, rounds=7, kornia="", compile=0)
    torch.set_num_threads(1)
    rows = []
    for title, names in (("the paper's chain", NAMES), ("crop and flip", CROP_FLIP)):
        measured = contenders(names, args.batch, bool(args.compile))
        if args.kornia and names is NAMES:
            command = [str(peers(Path(args.kornia), "kornia")), "-c", KORNIA, str(args.batch)]
            measured["kornia"] = lambda command=command: float(json.loads(subprocess.check_output(command, text=True)))
        found = alternate(measured, args.rounds)
        reference = found["torchvision v1 on PIL images"]
        for name, values in found.items():
            ratios = [r / v for r, v in zip(reference, values, strict=True)]
            rows.append((f"{title}: {name}", show(values), show(ratios)))
    report(args, "microseconds an image: median (least-greatest)", ["transforms", "us an image", "times PIL"], rows)


if __name__ == "__main__":
    main()
