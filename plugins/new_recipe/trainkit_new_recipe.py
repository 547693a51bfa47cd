"""Write a recipe for a folder of one's own images."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import shlex
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np

from trainkit.cli.output import printable
from trainkit.errors import DataError, UsageError
from trainkit.images import entries, find_images, open_image
from trainkit.recipe import load_recipe
from trainkit.registry import PLUGINS, installed
from trainkit.rundir import atomic_write, read_regular

__all__ = ["NEW", "Survey", "compose", "survey"]

SAMPLE = 60  # images that are opened for their size and colours
STEPS = 1500  # of the whole training, about
LARGEST = 128  # pixels of a side by default: what a CPU trains on within minutes
TEST_FOLDERS = ("test", "val", "valid", "validation")
TABLE_BYTES = 2**28
NETWORK = "resnet: {stem: 32, blocks: [2, 2, 2, 2], channels: [32, 64, 128, 256]%s}"
SMALL = 48  # pixels of a side up to which the network keeps the full resolution in its first stage
SGD = "sgd: {lr: 0.05, momentum: 0.9, weight_decay: 5.0e-4, nesterov: true}"
ADAMW = "adamw: {lr: 3.0e-4, weight_decay: 0.05}"  # where it starts from weights
HELD_OUT = 0.15  # of the training images, as validation images
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # what published weights were trained with


@attrs.frozen(kw_only=True)
class Survey:
    """What was found of a data set.

    Args:
        root: its folder.
        options: those of `image_folder` that say where training and test images are.
        classes: names.
        images: training images, or all where they are still to be divided.
        divided: whether there are test images of their own.
        validated: whether there are validation images of their own.
        size: pixels of a side that suit the images.
        mean: of each channel, 0 to 1, in a sample.
        std: the same of the standard deviation.
    """

    root: Path
    options: dict[str, object]
    classes: list[str]
    images: int
    divided: bool
    validated: bool
    size: int
    mean: list[float]
    std: list[float]


def survey(data: Path) -> Survey:
    """Look at a folder with train and test folders, at one of class folders alone, or at a table.

    Args:
        data: a folder, or a CSV file with the columns ``path`` and ``label``, and perhaps ``split``.

    Raises:
        DataError: it is none of these, or its images cannot be read.
    """
    options: dict[str, object]
    if any("\ud800" <= letter <= "\udfff" for letter in str(data)):  # bytes that the file system's encoding lacks
        raise DataError(f"{data}: a recipe is UTF-8 text and cannot hold this name; use a UTF-8 locale, or rename it")
    if data.is_file():
        root, options = data.parent, {"table": data.name}
        paths, classes, splits = _of_table(data)
    elif data.is_dir():
        root = data
        options, paths, classes, splits = _of_folder(data)
    else:
        raise DataError(f"{data}: no such file or folder")
    if len(classes) < 2:
        raise DataError(
            f"{data}: found {len(classes) or 'no'} class, and a recipe needs two; one folder a class is expected"
        )
    size, mean, std = _look(paths)
    return Survey(
        root=root,
        options=options if "test" in splits else {**options, "test_fraction": 0.2},
        classes=sorted(classes),
        images=len(paths),
        divided="test" in splits,
        validated="validation" in splits,
        size=size,
        mean=mean,
        std=std,
    )


def _of_folder(data: Path) -> tuple[dict[str, object], list[str], set[str], set[str]]:
    folders = _folders(data)
    if "train" in folders:
        test = next((name for name in TEST_FOLDERS if name in folders), None)
        options: dict[str, object] = {} if test in (None, "test") else {"test": test}
        place, splits = data / "train", {"train"} if test is None else {"train", "test"}
    else:
        options, place, splits = {"train": "."}, data, {"train"}
    classes = _folders(place)
    paths = [path for name in sorted(classes) for path in find_images(place / name).paths]
    if classes and not paths:
        raise DataError(f"{place}: its folders hold no images: {', '.join(sorted(classes)[:6])}")
    return options, paths, classes, splits


def _folders(place: Path) -> set[str]:
    return {entry.name for entry, status in entries(place) if stat.S_ISDIR(status.st_mode)}


def _of_table(path: Path) -> tuple[list[str], set[str], set[str]]:
    try:
        rows = list(csv.DictReader(io.StringIO(read_regular(path, TABLE_BYTES).decode("utf-8-sig"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a table in UTF-8: {error}") from error
    if not rows or not {"path", "label"} <= rows[0].keys():
        raise DataError(f"{path}: expected a first line with the columns path,label and perhaps split, and rows below")
    split = [(row.get("split") or "train").strip().lower() for row in rows]
    training = [row for row, of in zip(rows, split, strict=True) if of == "train"]
    names = {"val": "validation", "valid": "validation"}
    paths = [str(path.parent / (row["path"] or "")) for row in training]
    return paths, {row["label"] or "" for row in training}, {names.get(of, of) for of in split}


def _look(paths: Sequence[str]) -> tuple[int, list[float], list[float]]:
    """Return a size for the images, and mean and standard deviation of their channels, from a sample."""
    chosen = [paths[n] for n in np.linspace(0, len(paths) - 1, min(SAMPLE, len(paths))).astype(int)]
    sides, pixels = [], []
    for path in chosen:
        image = open_image(path)
        sides.append(min(image.size))
        image.thumbnail((64, 64))
        pixels.append(np.asarray(image, dtype=np.float64).reshape(-1, 3) / 255)
    usual = int(np.median(sides))
    size = usual if usual <= 32 else min(LARGEST, usual // 32 * 32)
    every = np.concatenate(pixels)
    return size, [round(float(v), 3) for v in every.mean(0)], [round(max(float(v), 0.01), 3) for v in every.std(0)]


def compose(
    found: Survey, name: str, *, model: str = "resnet", weights: Path | None = None, size: int | None = None
) -> str:
    """Return a recipe as YAML with a comment beside each line that one may want to change.

    Args:
        found: from :func:`survey`.
        name: of the recipe.
        model: ``resnet``, ``timm:NAME`` or ``torchvision:NAME``.
        weights: a file or an earlier run's directory to start from; relative to where the recipe will lie.
        size: pixels of a side, in place of what suits the images.

    Raises:
        UsageError: the model is named in another way, or what it needs is not installed.
    """
    size = size or found.size
    network = _network(model, size)
    needed = ["image_folder", _plugin(network), *(["start_weights"] if weights is not None else [])]
    here = installed(PLUGINS)
    if missing := [plugin for plugin in needed if plugin not in here]:
        raise UsageError(f"a recipe for this needs plugins that are not installed: {', '.join(missing)}")
    images = round(found.images * (1 if found.divided else 0.8) * (1 if found.validated else 1 - HELD_OUT))
    batch = 2 ** int(math.log2(min(64, max(4, images / 4))))
    epochs = min(100, max(10, round(STEPS * batch / max(images, 1))))
    mean, std, optimizer = found.mean, found.std, SGD
    if weights is not None:
        epochs, optimizer = min(epochs, 30), ADAMW
        mean, std = (mean, std) if model == "resnet" else IMAGENET
    options = {"root": str(found.root), **found.options, "size": size}
    lines = [(f"image_folder: {_flow(options)}", f"{found.images:,} images of {len(found.classes)} classes")]
    if not found.validated:
        lines.append((f"hold_out: {{fraction: {HELD_OUT}}}", "these choose the best epoch, test images do not"))
    lines += [
        (f"random_resized_crop: {{size: {size}, scale: [0.5, 1.0]}}", "augmentation; closer to 1.0 crops less"),
        ("random_horizontal_flip:", "drop it where left and right have a meaning, as in letters"),
        ("color_jitter: {brightness: 0.2, contrast: 0.2, saturation: 0.2}", "drop it where colours decide"),
        (f"normalize: {{mean: {mean}, std: {std}}}", "of the channels, 0 to 1"),
        (network, "trainkit plugins show NAME tells the options"),
    ]
    if weights is not None:
        lines.append((f"start_weights: {{file: {json.dumps(str(weights))}}}", "what the network begins with"))
    lines += [
        ("cross_entropy: {label_smoothing: 0.1}", ""),
        (optimizer, "try a third and three times"),
        ("grad_clip: {mode: norm, limit: 5.0}", ""),
        ("linear_warmup: {epochs: 2}", ""),
        ("cosine_annealing_lr: {unit: step}", "down to 0 at the last step"),
        ("channels_last:", "memory layout: faster"),
        ("autocast: {dtype: auto}", "bfloat16 where the device has it; false for float32"),
        ("model_summary:", ""),
        ("metrics:", "loss and accuracy"),
        ("metric_log:", "metrics.csv, metrics.jsonl"),
        ("figures:", "curves"),
        ("sample_images:", "what augmentation does to them"),
        ("confusion_matrix:", "which class is taken for which"),
        ("progress:", "what is shown meanwhile"),
        ("ledger:", "what `trainkit verify` checks"),
        ("weights:", "the network as it was evaluated, for use elsewhere"),
        (f"checkpoint: {{keep_every: {max(1, epochs // 4)}}}", "`trainkit resume` goes on from these"),
    ]
    written = [_commented(line, note) for line, note in lines if _plugin(line) in here]
    left_out = [_plugin(line) for line, _ in lines if _plugin(line) not in here]
    kept = f"# not installed, so not listed: {', '.join(left_out)}\n" if left_out else ""
    last = "drop_last: true  # else the last batch is one image, of which batch normalization knows no variance\n"
    return (
        f"# Train: trainkit run {name}.yaml    Try first: trainkit run {name}.yaml --dry-run\n"
        f"# Any value can be replaced there: trainkit run {name}.yaml epochs=5 batch_size=16\n{kept}"
        f"name: {name}\n"
        f"description: {json.dumps(f'{len(found.classes)} classes of {found.root.name or found.root}')}\n"
        f"epochs: {epochs}\n"
        f"batch_size: {batch}\n"
        f"{last if images % batch == 1 else ''}"
        "plugins:  # in the order in which they are called\n" + "".join(written)
    )


def _plugin(line: str) -> str:
    """Return the plugin that a line of a recipe lists."""
    return line.partition(":")[0]


def _network(model: str, size: int) -> str:
    kind, _, name = model.partition(":")
    if model == "resnet":
        return NETWORK % ("" if size <= SMALL else ", strides: [2, 2, 2, 2]")
    if kind in ("timm", "torchvision") and re.fullmatch(r"[\w.]+", name):
        return f"{kind}_model: {{name: {name}}}"
    raise UsageError(f"--model {model!r}: expected resnet, timm:NAME or torchvision:NAME, such as timm:resnet18")


def _flow(options: dict[str, object]) -> str:
    """Return options on one line, texts quoted."""
    return f"{{{', '.join(f'{key}: {json.dumps(value)}' for key, value in options.items())}}}"


def _commented(line: str, note: str) -> str:
    return f"  {line}  # {note}\n" if note else f"  {line}\n"


class _New:
    """``trainkit recipes new``."""

    HELP = "Write a recipe for a folder of one's own images, complete and commented."
    EXAMPLES = """\
examples:
  trainkit recipes new --data photos
  trainkit recipes new --data photos/labels.csv --model timm:resnet18 --weights resnet18.safetensors -o birds.yaml
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        meaning = "a folder with train/ and test/, or with a folder for each class, or a CSV file of path,label"
        parser.add_argument("--data", metavar="DIR", type=Path, required=True, help=meaning)
        parser.add_argument("--model", default="resnet", metavar="M", help="resnet, timm:NAME or torchvision:NAME")
        parser.add_argument(
            "--weights", metavar="FILE", type=Path, help="start from a file or an earlier run's directory"
        )
        parser.add_argument("--size", metavar="N", type=int, help="pixels of a side (default: what suits the images)")
        parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="default: the folder's name and .yaml")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Look at the data, write the recipe, and say what comes next.

        Raises:
            UsageError: the file exists, or an option is wrong.
        """
        if args.size is not None and args.size < 8:
            raise UsageError("--size: at least 8 pixels")
        if args.weights is not None and not args.weights.exists():
            raise UsageError(f"--weights: {args.weights}: no such file or folder")
        found = survey(args.data)
        output = args.output or Path(f"{_name(found.root.resolve().name)}.yaml")
        if output.exists():
            raise UsageError(f"{output}: exists; name another file with -o")
        weights = None if args.weights is None else _relative(args.weights, output.resolve().parent)
        text = compose(found, _name(output.stem), model=args.model, weights=weights, size=args.size)
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(output, text)
        recipe = load_recipe(output)
        for line in _told(found, output, recipe.epochs):
            print(printable(line))
        return 0


def _told(found: Survey, output: Path, epochs: int) -> Iterator[str]:
    some = ", ".join(found.classes[:6]) + (", ..." if len(found.classes) > 6 else "")
    yield f"{found.root}: {found.images:,} images of {len(found.classes)} classes: {some}"
    if not found.divided:
        yield "a fifth of each class is set aside as test images; which these are follows from their names"
    if not found.validated:
        yield "15 % of the training images are held out: they choose the best epoch"
    yield f"{output}: {epochs} epochs of {found.size} pixels; read it, then"
    yield f"  trainkit run {shlex.quote(str(output))} --dry-run"
    yield f"  trainkit run {shlex.quote(str(output))}"


def _name(text: str) -> str:
    """Return a text as the name of a recipe may be."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_.-")[:100] or "mine"


def _relative(path: Path, folder: Path) -> Path:
    """Return a path relative to a folder, where that is below it or beside it."""
    try:
        return path.resolve().relative_to(folder)
    except ValueError:
        return path.resolve()


NEW = _New
