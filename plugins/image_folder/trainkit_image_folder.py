"""Data sets that are kept as one folder a class."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import ge
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS  # type: ignore[import-untyped]
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize  # type: ignore[import-untyped]

from trainkit import Data, TensorSplit
from trainkit.errors import DataError
from trainkit.plugin import hookimpl, plugin

__all__ = ["FolderSplit", "ImageFolder"]

_IN_MEMORY = 2**30  # bytes of decoded images that are held in memory by default


@frozen(eq=False)
class FolderSplit:
    """Images that are decoded when they are asked for.

    Args:
        samples: the files and their classes, counted from 0.
        size: see :class:`ImageFolder`.
        digest: identifies the files (names, sizes, times of change), the classes and the size.
    """

    samples: list[tuple[str, int]]
    size: int | tuple[int, int]
    digest: str

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return an image, uint8 [3, H, W], and its class.

        Raises:
            DataError: the file cannot be decoded.
        """
        path, target = self.samples[index]
        try:
            with Image.open(path) as image:
                rgb = image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise many kinds
            raise DataError(f"{path}: cannot be decoded: {error}; replace or remove it") from error
        size = [self.size] if isinstance(self.size, int) else list(self.size)
        resized = resize(rgb, size)
        cropped = center_crop(resized, size)  # with height and width given, it has this size already
        return pil_to_tensor(cropped), target

    @property
    def targets(self) -> list[int]:
        """The class of each image; nothing is decoded for it."""
        return [target for _, target in self.samples]

    def fingerprint(self) -> str:
        """Return the digest."""
        return self.digest

    def decoded(self, workers: int) -> TensorSplit:
        """Return the split with every image decoded, in threads: Pillow releases the interpreter's lock."""
        first, _ = self[0]
        images = torch.empty(len(self), *first.shape, dtype=torch.uint8)
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            decoded = pool.map(self.__getitem__, range(len(self)))
            for i, (image, _) in enumerate(decoded):
                images[i] = image
        return TensorSplit(images, torch.tensor(self.targets))


def _positive(instance: object, attribute: object, value: int | tuple[int, int]) -> None:
    sides = value if isinstance(value, tuple) else (value,)
    if min(sides) < 1:
        raise ValueError(f"'size' must be at least 1, not {value}")


@plugin
class ImageFolder:
    """Any image data set that is kept as one folder a class.

    Expects ``<root>/<train>/<class>/`` and ``<root>/<test>/<class>/``; images may lie in folders below these. Hidden
    files, and files that are no images, are ignored. The classes are the folders of the training split, sorted. Images
    become RGB, resized as torchvision's ``Resize`` does with Pillow (bilinear), uint8 [3, H, W].

    Args:
        root: the folder of the data set; ``~`` is the home directory.
        train: the folder of the training split in `root`.
        test: the folder of the test split in `root`, such as ``val``; it may lack classes, but have no others.
        size: pixels. One number, ``64``: the shorter side is resized to it and a square is cropped from the centre, as
            ImageNet is evaluated. Two, ``[48, 64]``: height and width, whatever the proportions were.
        in_memory: decode all at the start (true) or as needed (false); by default at the start if 1 GiB holds all.
        workers: processes that decode as needed, or threads that decode at the start; at least 0.
    """

    without_effect: ClassVar = ("root", "train", "test", "in_memory", "workers")

    root: Path = field(converter=Path.expanduser)
    train: str = "train"
    test: str = "test"
    size: int | tuple[int, int] = field(validator=_positive)
    in_memory: bool | None = None
    workers: int = field(default=2, validator=ge(0))

    @hookimpl
    def data(self) -> Data:
        """Return both splits.

        Raises:
            DataError: a folder is missing, empty or of an unknown class, or (in memory) an image cannot be decoded.
        """
        classes = _class_folders(self.root / self.train)
        train = self._split(self.train, classes)
        test = self._split(self.test, classes)
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        shape = (3, height, width)
        in_memory = self.in_memory
        if in_memory is None:
            in_memory = (len(train) + len(test)) * 3 * height * width <= _IN_MEMORY
        if not in_memory:
            return Data(train=train, test=test, classes=classes, shape=shape, workers=self.workers)
        return Data(train=train.decoded(self.workers), test=test.decoded(self.workers), classes=classes, shape=shape)

    def _split(self, name: str, classes: tuple[str, ...]) -> FolderSplit:
        folder = self.root / name
        samples: list[tuple[str, int]] = []
        identity: list[object] = [classes, self.size]  # what the digest is taken of
        for label in _class_folders(folder):
            if label not in classes:
                raise DataError(f"{folder / label}: a class that {self.root / self.train} lacks; rename or remove it")
            files = list(_images(folder / label))
            if not files:
                raise DataError(f"{folder / label}: no images ({', '.join(IMG_EXTENSIONS)}); add some or remove it")
            target = classes.index(label)
            for file in files:
                samples.append((file.path, target))
                status = file.stat()
                path_in_split = file.path.removeprefix(str(folder))  # the split may be moved to another place
                identity.append((path_in_split, status.st_size, status.st_mtime_ns))
        digest = blake2b(repr(identity).encode(), digest_size=16).hexdigest()
        return FolderSplit(samples, self.size, digest)


def _class_folders(folder: Path) -> tuple[str, ...]:
    """Return the names of the folders in a split's folder, sorted."""
    found = tuple(entry.name for entry in _visible(folder) if entry.is_dir())
    if not found:
        raise DataError(f"{folder}: no class folders; expected {folder / '<class>' / '<image>'}")
    return found


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return a folder's entries that are not hidden, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; check plugins.image_folder.root, .train and .test") from error
    return sorted(visible, key=lambda entry: entry.name)


def _images(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Yield the images in a folder and in those below it, in the order of their names."""
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _images(entry.path)
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            yield entry
