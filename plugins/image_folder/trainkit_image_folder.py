"""Data sets that are kept as one folder a class."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

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

_IN_MEMORY = 1 << 30  # bytes of decoded images


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
        return pil_to_tensor(center_crop(resize(rgb, size), size)), target  # two sizes: there is nothing left to crop

    def fingerprint(self) -> str:
        """Return the digest."""
        return self.digest

    def decoded(self, workers: int) -> TensorSplit:
        """Return the split with every image decoded, by threads: Pillow lets them run side by side."""
        images = torch.empty(len(self), *self[0][0].shape, dtype=torch.uint8)
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            for i, (image, _) in enumerate(pool.map(self.__getitem__, range(len(self)))):
                images[i] = image
        return TensorSplit(images, torch.tensor([target for _, target in self.samples]))


def _positive(instance: object, attribute: object, value: int | tuple[int, int]) -> None:
    if min(value if isinstance(value, tuple) else (value,)) < 1:
        raise ValueError(f"'size' must be at least 1, not {value}")


@plugin
class ImageFolder:
    """Any image data set that is kept as one folder a class.

    Expects ``<root>/<train>/<class>/`` and ``<root>/<test>/<class>/``; images may lie in folders below these, hidden
    files and other files are passed over. The classes are the folders of the training split, sorted. Images become RGB,
    resized as torchvision's ``Resize`` does with Pillow (bilinear), uint8 [3, H, W].

    Args:
        root: the folder of the data set; ``~`` is the home directory.
        train: the folder of the training split in `root`.
        test: the folder of the test split in `root`, such as ``val``; it may lack classes, but have no others.
        size: pixels. One number, ``64``: the shorter side is resized to it and a square is cropped from the centre, as
            ImageNet is evaluated. Two, ``[48, 64]``: height and width, whatever the proportions were.
        in_memory: decode all at the start (true) or as needed (false); by default at the start if 1 GiB holds all.
        workers: processes that decode as needed, or threads that decode at the start; at least 0.
    """

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
        classes = _folders(self.root / self.train)
        train, test = self._split(self.train, classes), self._split(self.test, classes)
        shape = (3, self.size, self.size) if isinstance(self.size, int) else (3, *self.size)
        fits = (len(train) + len(test)) * 3 * shape[1] * shape[2] <= _IN_MEMORY
        if fits if self.in_memory is None else self.in_memory:
            held = [split.decoded(self.workers) for split in (train, test)]
            return Data(train=held[0], test=held[1], classes=classes, shape=shape)
        return Data(train=train, test=test, classes=classes, shape=shape, workers=self.workers)

    def _split(self, name: str, classes: tuple[str, ...]) -> FolderSplit:
        folder = self.root / name
        samples: list[tuple[str, int]] = []
        stats: list[object] = [classes, self.size]
        for label in _folders(folder):
            if label not in classes:
                raise DataError(f"{folder / label}: a class that {self.root / self.train} lacks; rename or remove it")
            if not (files := list(_images(folder / label))):
                raise DataError(f"{folder / label}: no images ({', '.join(IMG_EXTENSIONS)}); add some or remove it")
            target = classes.index(label)
            samples += [(file.path, target) for file in files]
            stats += [(f.path[len(str(folder)) :], f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return FolderSplit(samples, self.size, blake2b(repr(stats).encode(), digest_size=16).hexdigest())


def _folders(folder: Path) -> tuple[str, ...]:
    if not (found := tuple(entry.name for entry in _visible(folder) if entry.is_dir())):
        raise DataError(f"{folder}: no class folders; expected {folder / '<class>' / '<image>'}")
    return found


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; check plugins.image_folder.root, .train and .test") from error


def _images(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _images(entry.path)
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            yield entry
