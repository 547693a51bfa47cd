"""CIFAR-10."""

import io
import os
from contextlib import suppress
from hashlib import blake2b
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from attrs import field
from PIL import Image
from torchvision.datasets import CIFAR10, utils  # type: ignore[import-untyped]

from trainkit import Data, TensorSplit
from trainkit.errors import DataError
from trainkit.plugin import hookimpl, plugin
from trainkit.rundir import atomic_write

__all__ = ["CLASSES", "Cifar10"]

#: The classes by target; the published order is also the alphabetical one.
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_CACHE = ".trainkit-cifar10.pt"


@plugin
class Cifar10:
    """CIFAR-10, from its published files or from class folders (Krizhevsky, 2009).

    50,000 training and 10,000 test images, uint8 [3, 32, 32], ten classes, held in memory. `root` holds one of:

    * the published files: the folder ``cifar-10-batches-py`` or ``cifar-10-python.tar.gz``. They are pickles, so none
      is opened unless its MD5 is the published one;
    * ``train/<class>/`` and ``test/<class>/`` with PNG or JPEG files. A part of the images will do, all ten classes
      must be there. Decoded once and kept in the one file ``.trainkit-cifar10.pt`` in `root`, where that can be
      written; it is made again when a name, size or time of change differs.

    Images come in the order of the files: the two layouts hold the same images in different order, so the same seed
    gives different runs.

    Args:
        root: the folder that holds the images; ``~`` is the home directory.
        download: fetch the published archive (163 MiB) when neither layout is in `root`, or its files are damaged.
    """

    root: Path = field(default=Path("data"), converter=Path.expanduser)
    download: bool = False

    @hookimpl
    def data(self) -> Data:
        """Return both splits.

        Raises:
            DataError: nothing is there, something is missing, damaged or of the wrong size, or cannot be fetched.
        """
        published = (self.root / CIFAR10.base_folder).exists() or (self.root / CIFAR10.filename).exists()
        folders = (self.root / "train").is_dir() or (self.root / "test").is_dir()
        if published or (self.download and not folders):
            train, test = _published(self.root, self.download)
        elif folders:
            train, test = _folders(self.root)
        else:
            raise DataError(
                f"{self.root}: no CIFAR-10 here; put {CIFAR10.filename}, or the folders train/<class>/ and "
                "test/<class>/ with PNG files, into it, name another folder with plugins.cifar10.root=FOLDER, or "
                "fetch it with plugins.cifar10.download=true"
            )
        return Data(train=train, test=test, classes=CLASSES, shape=(3, 32, 32))


def _published(root: Path, download: bool) -> list[TensorSplit]:
    archive, damaged = root / CIFAR10.filename, _damaged(root)
    if damaged and (download or utils.check_integrity(archive, CIFAR10.tgz_md5)):
        try:  # an archive that is already there and intact is only unpacked
            utils.download_and_extract_archive(CIFAR10.url, root, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
        except (OSError, RuntimeError, HTTPException) as error:
            raise DataError(
                f"{CIFAR10.url}: cannot be fetched and unpacked into {root}: {error}; fetch it by other means and "
                f"put it at {archive}"
            ) from error
        damaged = _damaged(root)
    if damaged:
        raise DataError(
            f"{damaged[0]}: missing, or not the published file, so it was not opened; put the published "
            f"{archive.name} (MD5 {CIFAR10.tgz_md5}) into {root}, or fetch it with plugins.cifar10.download=true"
        )
    splits = [CIFAR10(root, train=train) for train in (True, False)]
    # torchvision shows the published [N, C, H, W] as [N, H, W, C]; turning it back copies nothing.
    return [
        TensorSplit(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in splits
    ]


def _damaged(root: Path) -> list[Path]:
    published = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    paths = [(root / CIFAR10.base_folder / name, md5) for name, md5 in published]
    return [path for path, md5 in paths if not utils.check_integrity(path, md5)]


def _folders(root: Path) -> list[TensorSplit]:
    listings = [[_list(root / split / name) for name in CLASSES] for split in ("train", "test")]
    key = blake2b(repr(listings).encode(), digest_size=16).hexdigest()
    with suppress(Exception):  # absent, or damaged in whatever way: made again below
        saved = torch.load(root / _CACHE, weights_only=True, mmap=True)
        splits = [TensorSplit(images, targets) for images, targets in saved["splits"]]
        # Loading does not read the pixels; the fingerprints are what notices a flipped bit.
        if saved["key"] == key and saved["fingerprints"] == [s.fingerprint() for s in splits]:
            return splits
    splits = [_decode(root / split, files) for split, files in zip(("train", "test"), listings, strict=True)]
    tensors = [(s.images, s.targets) for s in splits]
    file = io.BytesIO()
    torch.save({"key": key, "fingerprints": [s.fingerprint() for s in splits], "splits": tensors}, file)
    with suppress(OSError):  # a folder that cannot be written only costs the next run its decoding
        atomic_write(root / _CACHE, file.getvalue())
    return splits


def _list(folder: Path) -> list[tuple[str, int, int]]:
    try:
        with os.scandir(folder) as entries:
            images = [e for e in entries if e.name.lower().endswith((".png", ".jpg", ".jpeg")) and e.name[0] != "."]
            found = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in images)
    except OSError as error:
        raise DataError(
            f"{folder}: {error.strerror}; train/ and test/ must each hold the folders {', '.join(CLASSES)}"
        ) from error
    if not found:
        raise DataError(f"{folder}: no PNG or JPEG files; every class needs some in train/ and in test/")
    return found


def _decode(folder: Path, listing: list[list[tuple[str, int, int]]]) -> TensorSplit:
    targets = [target for target, files in enumerate(listing) for _ in files]
    paths = [folder / label / name for label, files in zip(CLASSES, listing, strict=True) for name, _, _ in files]
    images = np.empty((len(paths), 3, 32, 32), np.uint8)
    # One thread: opening so small a file takes longer than decoding it and holds the interpreter's lock.
    for i, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise many kinds
            raise DataError(f"{path}: cannot be decoded: {error}; replace or remove it") from error
        if pixels.shape != (32, 32, 3):
            size = "x".join(map(str, pixels.shape[1::-1]))
            raise DataError(f"{path}: {size} pixels, not 32x32; the plugin image_folder takes images of any size")
        images[i] = pixels.transpose(2, 0, 1)
    return TensorSplit(torch.from_numpy(images), torch.tensor(targets))
