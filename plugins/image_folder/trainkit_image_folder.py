"""Data sets that are kept as one folder a class."""

import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import torch
from attrs import Attribute, field, frozen
from attrs.validators import ge
from torch import Tensor
from torchvision.transforms import RandomResizedCrop  # type: ignore[import-untyped]
from torchvision.transforms.functional import resized_crop  # type: ignore[import-untyped]

from trainkit import Data, Run, TensorSplit
from trainkit.cache import file_digests
from trainkit.errors import DataError
from trainkit.images import IMAGE_SUFFIXES, Size, entries, find_images, open_image, resize_and_crop, to_tensor
from trainkit.plugin import hookimpl, plugin

__all__ = ["Crop", "FolderSplit", "ImageFolder"]

_IN_MEMORY = 2**30  # bytes of decoded images that are held in memory by default
_WORTH_SAYING = 2**30  # bytes of files that take long enough to read that a line says so
_NAMED = 10  # files that cannot be decoded, and kinds of files that are passed over


def _positive(instance: object, attribute: object, value: Size) -> None:
    sides = value if isinstance(value, tuple) else (value,)
    if min(sides) < 1:
        raise ValueError(f"'size' must be at least 1, not {value}")


def _range(instance: object, attribute: "Attribute[Any]", value: tuple[float, float]) -> None:
    least, greatest = value
    if not 0 < least <= greatest < float("inf"):
        raise ValueError(f"{attribute.name!r} must be [least, greatest], both greater than 0, not {value}")


@frozen
class Crop:
    """Which part of an image is cropped, by the options of torchvision's ``RandomResizedCrop``.

    Args:
        scale: the least and the greatest area of the part, as parts of the image's.
        ratio: the least and the greatest width of the part, as multiples of its height.
    """

    scale: tuple[float, float] = field(default=(0.08, 1.0), validator=_range)
    ratio: tuple[float, float] = field(default=(3 / 4, 4 / 3), validator=_range)


@frozen(eq=False)
class FolderSplit:
    """Images that are decoded when they are asked for.

    Args:
        samples: the files and their classes, counted from 0.
        size: see :class:`ImageFolder`.
        digest: identifies the files (names and contents), the classes and the size.
        crop: what is cropped from each image at random, where anything is.
    """

    samples: list[tuple[str, int]]
    size: Size
    digest: str
    crop: Crop | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, uint8 [3, H, W], and its class.

        Raises:
            DataError: the file cannot be decoded.
        """
        path, target = self.samples[index]
        image = open_image(path)
        if self.crop is None:
            return resize_and_crop(image, self.size), target
        # The core seeds torch's generator for each image, by seed, epoch and index.
        box = RandomResizedCrop.get_params(image, list(self.crop.scale), list(self.crop.ratio))
        return to_tensor(resized_crop(image, *box, list(sides(self.size)))), target

    @property
    def targets(self) -> list[int]:
        """The class of each image; nothing is decoded for it."""
        return [target for _, target in self.samples]

    def fingerprint(self) -> str:
        """Return the digest."""
        return self.digest


@plugin
class ImageFolder:
    """Any image data set that is kept as one folder a class.

    Expects ``<root>/<train>/<class>/`` and ``<root>/<test>/<class>/``; images may lie in folders below these. Hidden
    files are ignored, and files that are no images are passed over and counted. The classes are the folders of the
    training split, sorted; there must be two or more. Images become RGB, uint8 [3, H, W], as ``trainkit.images`` reads
    them: upright, on white where they are transparent, 16 bits and floats scaled. They are resized as torchvision's
    ``Resize`` and ``CenterCrop`` do with Pillow (bilinear).

    Args:
        root: the folder of the data set; ``~`` is the home directory.
        train: the folder of the training split in `root`.
        test: the folder of the test split in `root`, such as ``val``; it may lack classes, but have no others.
        size: pixels. One number, ``64``: the shorter side is resized to it and a square is cropped from the centre, as
            ImageNet is evaluated. Two, ``[48, 64]``: height and width, whatever the proportions were.
        random_resized_crop: ``{}``, or ``{scale: [0.08, 1.0], ratio: [0.75, 1.3333]}``: crop a random part of each
            training image as it is stored, and resize that, as torchvision's ``RandomResizedCrop`` does. It depends on
            seed, epoch and image alone. Training images are then decoded as needed, in every epoch. Test images are
            resized as without it.
        in_memory: decode all at the start (true) or as needed (false); by default at the start if 1 GiB holds all.
        workers: processes that decode as needed, or threads that decode at the start; at least 0.
    """

    without_effect: ClassVar = ("root", "train", "test", "in_memory", "workers")

    root: Path = field(converter=Path.expanduser)
    train: str = "train"
    test: str = "test"
    size: int | tuple[int, int] = field(validator=_positive)
    random_resized_crop: Crop | None = None
    in_memory: bool | None = None
    workers: int = field(default=2, validator=ge(0))

    @hookimpl
    def data(self, run: Run) -> Data:
        """Return both splits.

        Raises:
            DataError: a folder is missing, empty or of an unknown class, there is one class alone, or (in memory)
                images cannot be decoded.
        """
        passed_over: Counter[str] = Counter()
        classes = self._classes()
        train = self._split(run, self.train, classes, passed_over, self.random_resized_crop)
        test = self._split(run, self.test, classes, passed_over)
        if passed_over:
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in passed_over.most_common(_NAMED))
            more = ", ..." if len(passed_over) > _NAMED else ""
            count = passed_over.total()
            files = "file" if count == 1 else "files"
            _say(run, f"{self.root}: passed over {count:,} {files}: {kinds}{more}")
        to_hold = [test] if self.random_resized_crop else [train, test]
        height, width = sides(self.size)
        in_memory = self.in_memory
        if in_memory is None:
            in_memory = sum(map(len, to_hold)) * 3 * height * width <= _IN_MEMORY
        held = _decode(to_hold, self.workers) if in_memory else {}
        return Data(
            train=held.get(train, train),
            test=held.get(test, test),
            classes=classes,
            shape=(3, height, width),
            resize=self.size,
            workers=0 if in_memory and train in held else self.workers,
        )

    def _classes(self) -> tuple[str, ...]:
        folder = self.root / self.train
        classes = _class_folders(folder, Counter())
        if len(classes) == 1:
            inside = folder / classes[0]
            cure = "add a folder for each class"
            if any(stat.S_ISDIR(status.st_mode) for _, status in entries(inside)):
                cure += f", or if those in {inside} are the classes, set plugins.image_folder.train and .test to "
                cure += f"{self.train}/{classes[0]} and so on"
            raise DataError(f"{folder}: one class alone, {classes[0]!r}, of which any network is right; {cure}")
        return classes

    def _split(
        self, run: Run, name: str, classes: tuple[str, ...], passed_over: Counter[str], crop: Crop | None = None
    ) -> FolderSplit:
        folder = self.root / name
        samples: list[tuple[str, int]] = []
        for label in _class_folders(folder, passed_over):
            if label not in classes:
                raise DataError(f"{folder / label}: a class that {self.root / self.train} lacks; rename or remove it")
            found = find_images(folder / label)
            if not found.paths:
                raise DataError(f"{folder / label}: no images ({', '.join(IMAGE_SUFFIXES)}); add some or remove it")
            samples += [(path, classes.index(label)) for path in found.paths]
            for suffix, count in found.passed_over.items():
                passed_over[_kind(suffix)] += count
        start = len(os.path.join(folder, ""))
        names = [path[start:] for path, _ in samples]

        def announce(files: int, size: int) -> None:
            if size >= _WORTH_SAYING:
                _say(run, f"{folder}: reading {files:,} files ({size / 2**30:,.1f} GiB), once, to identify them")

        contents = file_digests(folder, names, self.workers, announce)
        # Neither where the files lie nor when they were copied: what they hold.
        identity = classes, self.size, [(n.replace(os.sep, "/"), c) for n, c in zip(names, contents, strict=True)]
        digest = blake2b(repr(identity).encode(), digest_size=16).hexdigest()
        return FolderSplit(samples, self.size, digest, crop)


def sides(size: Size) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else size


def _say(run: Run, line: str) -> None:
    run.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _class_folders(folder: Path, passed_over: Counter[str]) -> tuple[str, ...]:
    """Return the names of the folders in a split's folder, sorted, and count the files beside them."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; check plugins.image_folder.root, .train and .test")
    found = []
    for entry, status in entries(folder):
        if stat.S_ISDIR(status.st_mode):
            found.append(entry.name)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            passed_over["in no class folder"] += 1
        else:
            passed_over[_kind(os.path.splitext(entry.name)[1])] += 1
    if not found:
        raise DataError(f"{folder}: no class folders; expected {folder / '<class>' / '<image>'}")
    return tuple(found)


def _kind(suffix: str) -> str:
    """Return how a line calls files whose names end so."""
    return suffix.lower() if suffix.isprintable() and 1 < len(suffix) <= 10 else "others"


def _decode(splits: list[FolderSplit], workers: int) -> dict[FolderSplit, TensorSplit]:
    """Decode every image, in threads: Pillow releases the interpreter's lock.

    Raises:
        DataError: some cannot be decoded; it names them together.
    """
    held = {}
    bad: list[str] = []

    def attempt(sample: tuple[FolderSplit, int]) -> Tensor | DataError:
        split, index = sample
        try:
            return split[index][0]
        except DataError as error:
            return error

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for split in splits:
            images = torch.empty(len(split), 3, *sides(split.size), dtype=torch.uint8)
            for i, result in enumerate(pool.map(attempt, [(split, i) for i in range(len(split))])):
                if isinstance(result, DataError):
                    bad.append(str(result))
                else:
                    images[i] = result
            held[split] = TensorSplit(images, torch.tensor(split.targets), digest=split.digest)
    if len(bad) == 1:
        raise DataError(bad[0])
    if bad:
        named = "; ".join(reason.removesuffix("; replace or remove it") for reason in bad[:_NAMED])
        more = f"; and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
        raise DataError(f"{len(bad):,} images cannot be used; replace or remove them: {named}{more}")
    return held
