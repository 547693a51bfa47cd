"""Predict the classes of images with a run's network."""

from __future__ import annotations

import argparse
import csv
import io
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray

from trainkit import numerics
from trainkit.cli.output import add_allow_local, error, print_json, printable, table, terminal
from trainkit.errors import DataError, UsageError
from trainkit.images import find_images
from trainkit.recipe import load_recipe
from trainkit.rundir import RunDir, atomic_write

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from trainkit import LoadedModel

__all__ = ["PREDICT", "Prediction", "predict"]

BATCH = 100  # images on the device at once
SHOWN = 20  # predictions that a table shows where they are written to a file


@attrs.frozen
class Prediction:
    """What the network says of one image.

    Args:
        id: the path of a file, or the number of an image in an array, from 0.
        probabilities: float32 [classes].
    """

    id: str
    probabilities: NDArray[np.float32]

    def top(self, number: int) -> list[int]:
        """Return the most probable classes, the first one first; of equal ones the one that is counted first."""
        return [int(index) for index in np.argsort(-self.probabilities, kind="stable")[:number]]


@attrs.frozen
class _Source:
    """Images that are asked for: files, or an array of images."""

    paths: list[Path] = attrs.field(factory=list)
    array: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.paths) if self.array is None else len(self.array)

    def batches(self, model: LoadedModel, bad: list[str]) -> Iterator[tuple[list[str], Tensor]]:
        """Yield names and images, uint8 [N, C, H, W]; files that cannot be decoded are noted and passed over."""
        import torch

        if self.array is not None:
            for start in range(0, len(self.array), BATCH):
                part = torch.from_numpy(np.array(self.array[start : start + BATCH], order="C"))
                yield [str(number) for number in range(start, start + len(part))], part
            return
        waiting = iter(self.paths)
        while batch := list(islice(waiting, BATCH)):
            names, images = [], []
            for path in batch:
                try:
                    images.append(model.read(path))
                    names.append(str(path))
                except DataError as problem:
                    bad.append(str(problem))
            if images:
                yield names, torch.stack(images)


def predict(model: LoadedModel, paths: list[Path], bad: list[str], console: Console) -> Iterator[Prediction]:
    """Yield what a network says of each image, in the order of the paths; within a folder in the order of names.

    Args:
        model: from :func:`trainkit.load_model`.
        paths: image files, folders of them, ``.npy`` arrays of uint8 images, [N, H, W, C], [N, C, H, W] or [N, H, W].
        bad: gets a line for each image that has no prediction: a file that cannot be decoded, which is passed over, or
            one for which the network's output is not finite.
        console: where a bar shows how far it is, if it is a terminal.

    Raises:
        DataError: a path does not exist, a folder holds no image, or an array is of another type or shape.
    """
    from rich.progress import Progress

    sources = [_source(path, model.shape) for path in paths]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("images", total=sum(map(len, sources)))
        for source in sources:
            for names, images in source.batches(model, bad):
                for name, probabilities in zip(names, model.predict(images).numpy(), strict=True):
                    if np.isfinite(probabilities).all():
                        yield Prediction(name, probabilities)
                    else:
                        bad.append(f"{name}: the network's output is not finite")
                progress.advance(task, len(names))


def _source(path: Path, shape: tuple[int, int, int]) -> _Source:
    if path.is_dir():
        found = find_images(path).paths
        if not found:
            raise DataError(f"{path}: no images here")
        return _Source([Path(name) for name in found])
    if path.suffix == ".npy":
        return _Source(array=_array(path, shape))
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    return _Source([path])


def _array(path: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Open an array of images without reading it, as [N, C, H, W]."""
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file, or no regular one")
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as problem:
        raise DataError(f"{path}: not an array of images: {str(problem).splitlines()[0]}") from problem
    channels, height, width = shape
    if array.dtype == np.uint8 and array.shape[1:] == (height, width, channels):
        array = array.transpose(0, 3, 1, 2)
    elif array.dtype == np.uint8 and array.shape[1:] == (height, width) and channels == 1:
        array = array[:, None]
    if array.dtype != np.uint8 or array.shape[1:] != shape:
        raise DataError(
            f"{path}: expected uint8 [N, {height}, {width}, {channels}] or [N, {channels}, {height}, {width}], "
            f"got {array.dtype} {list(array.shape)}"
        )
    images: NDArray[np.uint8] = array
    return images


class _Predict:
    """``trainkit predict``."""

    HELP = "Predict the classes of images with a run's network, as it was evaluated."
    EXAMPLES = """\
examples:
  trainkit predict runs/mine/20260101-120000-0 photos/ --output predictions.csv
  trainkit predict runs/mine/20260101-120000-0 cat.jpg dog.jpg --top 3
  trainkit predict runs/basic_se/20260101-120000-0 test.npy --output predictions.csv --index
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a run")
        parser.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="images, folders, .npy arrays")
        parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write a table there, ID,Label, as CSV")
        parser.add_argument("--top", metavar="K", type=int, default=1, help="the K most probable classes (default: 1)")
        parser.add_argument("--probabilities", action="store_true", help="the probability of each class")
        parser.add_argument("--index", action="store_true", help="label by the class's number, counted from 0")
        parser.add_argument(
            "--checkpoint", default="best", choices=["best", "last"], help="which weights (default: best)"
        )
        parser.add_argument("--device", metavar="D", help="where to compute (default: as the recipe says)")
        add_allow_local(parser)
        parser.add_argument("--json", action="store_true", help="print JSON")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Predict, and print or write; return 1 if an image has none.

        Raises:
            UsageError: `--top` is not at least 1.
        """
        if args.top < 1:
            raise UsageError("--top: at least 1")
        numerics.prepare(load_recipe(RunDir(args.run_dir).recipe_path()))
        from trainkit.inference import load_model

        console = terminal(stderr=args.json)
        model = load_model(args.run_dir, args.checkpoint, device=args.device)
        bad: list[str] = []
        found = list(predict(model, args.paths, bad, terminal(stderr=True)))
        names = [str(n) for n in range(len(model.classes))] if args.index else list(model.classes)
        if args.output is not None:
            text = _csv(found, names, args.top, probabilities=args.probabilities)
            atomic_write(args.output, text.encode(errors="surrogateescape"))  # names of files are bytes
        if args.json:
            print_json([_plain(one, names, args.top, probabilities=args.probabilities) for one in found])
        else:
            _show(console, found, names, args.top, args.output)
        for line in bad:
            error(line)
        if bad:
            error(f"{len(bad)} of {len(bad) + len(found)} images have no prediction")
        return 1 if bad else 0


def _row(one: Prediction, names: list[str], top: int, *, probabilities: bool) -> list[str]:
    chosen = one.top(top)
    cells = [one.id, names[chosen[0]]]
    if top > 1:
        cells += [cell for n in chosen for cell in (names[n], f"{one.probabilities[n]:.6f}")]
    if probabilities:
        cells += [f"{value:.6f}" for value in one.probabilities]
    return cells


def _csv(found: list[Prediction], names: list[str], top: int, *, probabilities: bool) -> str:
    """Return a table: ``ID,Label``, then what was asked for besides."""
    top = min(top, len(names))
    columns = ["ID", "Label"]
    if top > 1:
        columns += [column for n in range(1, top + 1) for column in (f"Label_{n}", f"Probability_{n}")]
    if probabilities:
        columns += [f"Probability_{name}" for name in names]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(_row(one, names, top, probabilities=probabilities) for one in found)
    return text.getvalue()


def _plain(one: Prediction, names: list[str], top: int, *, probabilities: bool) -> dict[str, Any]:
    chosen = [{"label": names[n], "probability": float(one.probabilities[n])} for n in one.top(top)]
    every = {name: float(value) for name, value in zip(names, one.probabilities, strict=True)}
    return {"id": one.id, **chosen[0], "top": chosen, **({"probabilities": every} if probabilities else {})}


def _show(console: Console, found: list[Prediction], names: list[str], top: int, output: Path | None) -> None:
    shown = found if output is None else found[:SHOWN]
    rows = []
    for one in shown:
        chosen = [f"{names[n]} {100 * one.probabilities[n]:.1f} %" for n in one.top(top)]
        rows.append((one.id, ", ".join(chosen)))
    console.print(table(["image", "class, probability"], rows))
    if output is not None:
        more = f" (the first {SHOWN} are shown)" if len(found) > SHOWN else ""
        console.print(printable(f"{len(found):,} predictions: {os.fspath(output)}{more}"), markup=False, soft_wrap=True)


PREDICT = _Predict
