"""Training speed of a recipe beside the published notebook's loop and beside the bare loop of the same model.

The notebook's loop: PIL transforms, a DataLoader with two workers, eager float32, a ``.item()`` a step, and
squeeze-and-excitation over ``AdaptiveAvgPool2d``, as torchvision and most notebooks write it. The bare loop: forward,
backward and step of the same network in the recipe's precision on one ready batch, without data or trainer. Each
measurement has a process of its own, so that none finds the memory as another left it, and drops the first step.
``--root`` is CIFAR-10 in class folders; without it, random images take its place.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import field
from common import ROOT, alternate, arguments, report, show
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from transforms import NAMES, of_torchvision

from trainkit import Data, Run, TensorSplit, fit, load_recipe
from trainkit.build import build_with
from trainkit.hooks import LoadedPlugin, load_plugins, register
from trainkit.plugin import hookimpl, plugin
from trainkit_se import SqueezeExcitation

SKIPPED = ("figures", "checkpoint", "metric_log", "progress", "model_summary")


@plugin
class RandomImages:
    """Random images of CIFAR-10's form."""

    @hookimpl
    def data(self) -> Data:
        images = torch.randint(0, 256, (20_000, 3, 32, 32), dtype=torch.uint8)
        split = TensorSplit(images, torch.arange(20_000) % 10)
        test = TensorSplit(images[:100], split.targets[:100])
        return Data(train=split, test=test, classes=tuple("0123456789"), shape=(3, 32, 32))


def now(run: Run) -> float:
    """Return the time at which all work so far is done, on a GPU too."""
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    return time.perf_counter()


@plugin
class Clock:
    """Takes the time at the end of the first step and of the last."""

    first: float = field(init=False, default=0.0)
    last: float = field(init=False, default=0.0)

    @hookimpl
    def safe_point(self, run: Run) -> None:
        if run.batch_index and (run.step == 1 or run.finished):  # what follows the last step is testing
            self.last = now(run)
            if run.step == 1:
                self.first = self.last


def built(recipe_name: str, root: str, steps: int, *overrides: str, observer: Any = None) -> Run:
    """Build a recipe for a number of steps, with one more plugin at its end."""
    drop = [f"plugins.{name}=false" for name in SKIPPED]
    where = [f"plugins.cifar10.root={root}"] if root else ["plugins.cifar10=false"]
    recipe = load_recipe(ROOT / "recipes" / f"{recipe_name}.yaml", [*drop, *where, f"max_steps={steps}", *overrides])
    hooks = load_plugins(recipe)
    if not root:
        hooks = register([LoadedPlugin("images", RandomImages()), *hooks.plugins.values()])
    if observer is not None:
        hooks = register([*hooks.plugins.values(), LoadedPlugin("observer", observer)])
    return build_with(recipe, hooks)


def trainkit_speed(recipe: str, root: str, steps: int) -> float:
    """Return training images a second of the recipe through the trainer."""
    clock = Clock()
    run = built(recipe, root, steps + 1, observer=clock)
    with tempfile.TemporaryDirectory() as folder:
        fit(run, folder, test_batches=1)
    return steps * run.recipe.batch_size / (clock.last - clock.first)


def bare_speed(recipe: str, root: str, steps: int) -> float:
    """Return images a second of forward, backward and step on one batch, in the recipe's precision and format."""
    run = built(recipe, root, steps)
    batch = next(run.batches["train"].iterate())
    images = run.transforms["train"](batch.images, run.rng).contiguous(memory_format=torch.channels_last)
    run.forward.train()
    start = 0.0
    for step in range(steps + 1):
        if step == 1:
            start = now(run)
        with run.context:
            loss = run.loss(run.forward(images), batch.targets)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    return steps * len(images) / (now(run) - start)


class Pictures(Dataset[Any]):
    """PIL images and the notebook's transforms."""

    def __init__(self, split: Any) -> None:
        self.images, self.targets = split.images, split.targets
        self.transform = of_torchvision(v1, NAMES)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.images[index].permute(1, 2, 0).numpy())), self.targets[index]


def squeeze_excitation(module: SqueezeExcitation, x: torch.Tensor) -> torch.Tensor:
    """Compute squeeze-and-excitation with torch's average pooling."""
    means = torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
    return x * torch.sigmoid(module.fc2(torch.relu(module.fc1(means))))[:, :, None, None]


def notebook_speed(recipe: str, root: str, steps: int) -> float:
    """Return images a second of the notebook's loop."""
    run = built(recipe, root, steps, "plugins.channels_last=false", "plugins.autocast=false")
    for module in run.model.modules():
        if isinstance(module, SqueezeExcitation):
            module.forward = partial(squeeze_excitation, module)  # type: ignore[method-assign]
    loader = DataLoader(Pictures(run.data.train), batch_size=128, shuffle=True, num_workers=2)
    optimizer, seen, start, total = run.optimizer, 0, 0.0, 0.0
    run.model.train()
    for step, (images, targets) in enumerate(loader):
        if step == 1:
            start = now(run)
        optimizer.zero_grad()
        loss = run.loss(run.model(images.to(run.device)), targets.to(run.device))
        loss.backward()
        torch.nn.utils.clip_grad_value_(run.model.parameters(), 0.1)
        optimizer.step()
        total += loss.item()
        seen += len(images) * (step > 0)
        if step == steps:
            break
    return seen / (now(run) - start)


def alone(contender: str, recipe: str, root: str, steps: int) -> float:
    """Return what one of the functions above returns, in a new process."""
    code = f"import sys, end_to_end as e; print(e.{contender}(sys.argv[1], sys.argv[2], int(sys.argv[3])))"
    command = [sys.executable, "-c", code, recipe, root, str(steps)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, recipe="basic_se", root="", steps=8, rounds=5)
    root = str(Path(args.root).resolve()) if args.root else ""
    contenders = {
        "the notebook's loop": lambda: alone("notebook_speed", args.recipe, root, args.steps),
        "trainkit run": lambda: alone("trainkit_speed", args.recipe, root, args.steps),
        "bare loop, same precision": lambda: alone("bare_speed", args.recipe, root, args.steps),
    }
    found = alternate(contenders, args.rounds, warm_up=0)
    rows = []
    for name, values in found.items():
        beside = [
            show([v / p for v, p in zip(values, found[other], strict=True)], 2)
            for other in ("the notebook's loop", "bare loop, same precision")
        ]
        rows.append((name, show(values), *beside))
    columns = ["loop", "images/s", "times the notebook", "times the bare loop"]
    report(args, f"{args.recipe}, batch 128, {torch.get_num_threads()} threads: median (least-greatest)", columns, rows)


if __name__ == "__main__":
    main()
