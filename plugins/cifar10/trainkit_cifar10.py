"""CIFAR-10."""

import io
import time
from contextlib import suppress
from hashlib import blake2b
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
from attrs import field
from torch import Tensor
from torchvision.datasets import CIFAR10, utils  # type: ignore[import-untyped]

import trainkit
from trainkit import Data, Run, TensorSplit
from trainkit.cache import Key, cache_path, file_key, save, settled
from trainkit.errors import DataError
from trainkit.images import entries, read_image
from trainkit.plugin import hookimpl, plugin

__all__ = ["CLASSES", "Cifar10"]

#: The classes by target; the published order is also the alphabetical one.
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Name, and what changes with the content, of each image of one class folder.
Listing = list[tuple[str, Key]]


@plugin
class Cifar10:
    """CIFAR-10, from its published files or from class folders (Krizhevsky, 2009).

    50,000 training and 10,000 test images, uint8 [3, 32, 32], ten classes, held in memory. `root` holds one of:

    * the published files: the folder ``cifar-10-batches-py`` or ``cifar-10-python.tar.gz``. They are pickles, so none
      is opened unless its MD5 is the published one;
    * ``train/<class>/`` and ``test/<class>/`` with PNG or JPEG files. All ten classes must be there; each may hold a
      part of its images. They are decoded once and kept in the user's cache directory (``~/.cache/trainkit``), until a
      file's name, size, inode, time of change or time of status change differs. Nothing is written into `root`.

    Images come in the order of the files. The two layouts hold the same images in different orders, so the same seed
    gives different runs.

    Args:
        root: the folder that holds the images; ``~`` is the home directory.
        download: fetch the published archive (163 MiB) when neither layout is in `root`, or its files are damaged.
    """

    without_effect: ClassVar = ("root", "download")

    root: Path = field(default=Path("data"), converter=Path.expanduser)
    download: bool = False

    @hookimpl
    def data(self, run: Run) -> Data:
        """Return both splits; in a dry run nothing is fetched.

        Raises:
            DataError: nothing is there, something is missing, damaged or of the wrong size, or cannot be fetched.
        """
        published = (self.root / CIFAR10.base_folder).exists() or (self.root / CIFAR10.filename).exists()
        folders = (self.root / "train").is_dir() or (self.root / "test").is_dir()
        if published or (self.download and not folders):
            train, test = _from_published(self.root, self.download, dry=run.dry)
        elif folders:
            train, test = _from_folders(self.root)
        else:
            raise DataError(
                f"{self.root}: no CIFAR-10 here; put {CIFAR10.filename}, or the folders train/<class>/ and "
                "test/<class>/ with PNG files, into it, name another folder with plugins.cifar10.root=FOLDER, or "
                "fetch it with plugins.cifar10.download=true"
            )
        return Data(train=train, test=test, classes=CLASSES, shape=(3, 32, 32))


def _from_published(root: Path, download: bool, *, dry: bool = False) -> list[TensorSplit]:
    """Return the training and the test split of the published files."""
    archive = root / CIFAR10.filename
    damaged = _damaged(root)
    if damaged and (download or utils.check_integrity(archive, CIFAR10.tgz_md5)):
        if dry:
            raise DataError(
                f"{damaged[0]}: missing, or not the published file, and a dry run fetches and unpacks nothing; put the "
                f"published files into {root}, or run the recipe"
            )
        _fetch_and_unpack(root)
        damaged = _damaged(root)
    if damaged:
        raise DataError(
            f"{damaged[0]}: missing, or not the published file, so it was not opened; put the published "
            f"{archive.name} (MD5 {CIFAR10.tgz_md5}) into {root}, or fetch it with plugins.cifar10.download=true"
        )
    splits = []
    for train in (True, False):
        published = CIFAR10(root, train=train)
        # torchvision turned the published [N, C, H, W] into a view [N, H, W, C]; turning it back copies nothing.
        images = torch.from_numpy(published.data).permute(0, 3, 1, 2).contiguous()
        splits.append(TensorSplit(images, torch.tensor(published.targets)))
    return splits


def _fetch_and_unpack(root: Path) -> None:
    """Fetch the archive, unless it is there and intact, and unpack it."""
    try:
        utils.download_and_extract_archive(CIFAR10.url, root, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataError(
            f"{CIFAR10.url}: cannot be fetched and unpacked into {root}: {error}; fetch it by other means and "
            f"put it at {root / CIFAR10.filename}"
        ) from error


def _damaged(root: Path) -> list[Path]:
    """Return which of the published files are missing or have another checksum."""
    published = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    damaged = []
    for name, md5 in published:
        path = root / CIFAR10.base_folder / name
        if not utils.check_integrity(path, md5):
            damaged.append(path)
    return damaged


def _from_folders(root: Path) -> list[TensorSplit]:
    """Return the training and the test split of the class folders, from their cache where it is still right."""
    now = time.time_ns()
    listings = {name: [_list_images(root / name / label) for label in CLASSES] for name in ("train", "test")}
    targets = [_targets(listing) for listing in listings.values()]
    made_by = trainkit.__version__, version("pillow")
    key = blake2b(repr([made_by, listings]).encode(), digest_size=16).hexdigest()
    path = cache_path("cifar10", root, ".pt")
    splits = _load_cache(path, key, targets)
    if splits is None:
        splits = [_decode(root / name, listing) for name, listing in listings.items()]
        keys = [key for of_split in listings.values() for of_class in of_split for _, key in of_class]
        if settled(keys, now):
            _save_cache(path, key, splits)
    return splits


def _targets(listings: list[Listing]) -> Tensor:
    return torch.arange(len(CLASSES)).repeat_interleave(torch.tensor([len(listing) for listing in listings]))


def _load_cache(path: Path, key: str, targets: list[Tensor]) -> list[TensorSplit] | None:
    """Return what was saved under this key, or None where it is absent, of other files or damaged in whatever way."""
    with suppress(Exception):
        saved = torch.load(path, weights_only=True, mmap=True)
        splits = [TensorSplit(images, labels) for images, labels in zip(saved["images"], targets, strict=True)]
        fits = all(split.images.shape == (len(split.targets), 3, 32, 32) for split in splits)
        # torch.load verifies no checksum, so a flipped bit shows in the fingerprints only.
        if fits and saved["key"] == key and saved["fingerprints"] == [split.fingerprint() for split in splits]:
            return splits
    return None


def _save_cache(path: Path, key: str, splits: list[TensorSplit]) -> None:
    """Save the splits under this key; where that cannot be written, the next run decodes them again."""
    content = {
        "key": key,
        "fingerprints": [split.fingerprint() for split in splits],
        "images": [split.images for split in splits],
    }
    file = io.BytesIO()
    torch.save(content, file)
    save(path, file.getvalue())


def _list_images(folder: Path) -> Listing:
    """List the images of one class folder, sorted by name."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; train/ and test/ must each hold the folders {', '.join(CLASSES)}")
    found = [
        (entry.name, file_key(status))
        for entry, status in entries(folder)
        if entry.name.lower().endswith((".png", ".jpg", ".jpeg"))
    ]
    if not found:
        raise DataError(f"{folder}: no PNG or JPEG files; every class needs some in train/ and in test/")
    return found


def _decode(folder: Path, listings: list[Listing]) -> TensorSplit:
    """Decode the images of one split.

    Args:
        folder: holds the class folders.
        listings: the images of each class, in the order of the classes.
    """
    targets = _targets(listings)
    images = torch.empty(len(targets), 3, 32, 32, dtype=torch.uint8)
    paths = (folder / label / name for label, listing in zip(CLASSES, listings, strict=True) for name, _ in listing)
    # One thread: opening so small a file takes longer than decoding it, and it holds the interpreter's lock.
    for i, path in enumerate(paths):
        image = read_image(path)
        _, height, width = image.shape
        if (height, width) != (32, 32):
            raise DataError(
                f"{path}: {width}x{height} pixels, not 32x32; the plugin image_folder takes images of any size"
            )
        images[i] = image
    return TensorSplit(images, targets)
