"""Data sets that are kept as one folder a class, or listed in a table."""

import csv
import io
import os
import shlex
import stat
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import torch
from attrs import Attribute, field, frozen
from attrs.validators import and_, ge, gt, lt, optional
from torch import Tensor
from torchvision.transforms import RandomResizedCrop  # type: ignore[import-untyped]
from torchvision.transforms.functional import resized_crop  # type: ignore[import-untyped]

from trainkit import Data, Run, TensorSplit
from trainkit.cache import file_digests
from trainkit.errors import DataError
from trainkit.images import IMAGE_SUFFIXES, Size, entries, find_images, open_image, resize_and_crop, to_tensor
from trainkit.plugin import hookimpl, plugin
from trainkit.rundir import read_regular

__all__ = ["Crop", "FolderSplit", "ImageFolder"]

_IN_MEMORY = 2**30  # bytes of decoded images that are held in memory by default
_WORTH_SAYING = 2**30  # bytes of files that take long enough to read that a line says so
_TABLE_BYTES = 2**28  # of a table: a million rows and more
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


@frozen
class _Files:
    """The files of a split.

    Args:
        base: the folder that they lie in, or below.
        named: paths and labels.
    """

    base: Path
    named: list[tuple[str, str]]


@plugin
class ImageFolder:
    """Any image data set that is kept as one folder a class, or listed in a table.

    Expects ``<root>/<train>/<class>/`` and ``<root>/<test>/<class>/``; images may lie in folders below these. Hidden
    files are ignored, and files that are no images are passed over and counted. The classes are the folders of the
    training split, sorted; there must be two or more. Images become RGB, uint8 [3, H, W], as ``trainkit.images`` reads
    them: upright, on white where they are transparent, 16 bits and floats scaled. They are resized as torchvision's
    ``Resize`` and ``CenterCrop`` do with Pillow (bilinear).

    A `table` is a CSV file with the columns ``path`` and ``label``, and perhaps ``split``: ``train``, ``validation`` or
    ``test``.

    Args:
        root: the folder of the data set; ``~`` is the home directory.
        train: the folder of the training split in `root`; ``.`` where the class folders lie in `root` itself.
        test: the folder of the test split in `root`, such as ``val``; it may lack classes, but have no others.
        test_fraction: in place of a test folder: the share of each class that is set aside as test images, between 0
            and 1. Which images these are depends on the names of the files alone, so every run has the same ones.
        table: a CSV file in `root`, whose paths are relative to `root`, in place of folders. Without a column ``split``
            it needs `test_fraction`.
        size: pixels. One number, ``64``: the shorter side is resized to it and a square is cropped from the centre, as
            ImageNet is evaluated. Two, ``[48, 64]``: height and width, whatever the proportions were.
        random_resized_crop: ``{}``, or ``{scale: [0.08, 1.0], ratio: [0.75, 1.3333]}``: crop a random part of each
            training image as it is stored, and resize that, as torchvision's ``RandomResizedCrop`` does. It depends on
            seed, epoch and image alone. Training images are then decoded as needed, in every epoch. Test images are
            resized as without it.
        in_memory: decode all at the start (true) or as needed (false); by default at the start if 1 GiB holds all.
        workers: processes that decode as needed, or threads that decode at the start; at least 0.
    """

    without_effect: ClassVar = ("root", "train", "test", "table", "in_memory", "workers")

    root: Path = field(converter=Path.expanduser)
    train: str = "train"
    test: str = "test"
    test_fraction: float | None = field(default=None, validator=optional(and_(gt(0), lt(1))))
    table: str | None = None
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
        files = self._from_folders(passed_over) if self.table is None else self._from_table(self.root / self.table)
        if self.test_fraction is not None:
            if files.get("test"):
                raise DataError(
                    f"{self.root / str(self.table)}: it has test images; drop plugins.image_folder.test_fraction"
                )
            files["train"], files["test"] = _set_aside(files["train"], self.test_fraction)
        classes = self._classes(files)
        train = self._split(run, "train", files, classes, self.random_resized_crop)
        test = self._split(run, "test", files, classes)
        validation = self._split(run, "validation", files, classes) if files.get("validation") else None
        if passed_over:
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in passed_over.most_common(_NAMED))
            more = ", ..." if len(passed_over) > _NAMED else ""
            count = passed_over.total()
            noun = "file" if count == 1 else "files"
            _say(run, f"{self.root}: passed over {count:,} {noun}: {kinds}{more}")
        evaluated = [test] if validation is None else [test, validation]
        to_hold = evaluated if self.random_resized_crop else [train, *evaluated]
        height, width = sides(self.size)
        in_memory = self.in_memory
        if in_memory is None:
            in_memory = sum(map(len, to_hold)) * 3 * height * width <= _IN_MEMORY
        held = _decode(to_hold, self.workers) if in_memory else {}
        return Data(
            train=held.get(train, train),
            test=held.get(test, test),
            validation=None if validation is None else held.get(validation, validation),
            classes=classes,
            shape=(3, height, width),
            resize=self.size,
            workers=0 if in_memory and train in held else self.workers,
        )

    def _from_folders(self, passed_over: Counter[str]) -> dict[str, _Files]:
        """Return the files of each split, with the names of their class folders."""
        files: dict[str, _Files] = {}
        for split, place in {"train": self.train, "test": self.test}.items():
            if split == "test" and self.test_fraction is not None:
                continue
            folder = self.root / place
            if split == "train" and not folder.is_dir() and (self.root / self.test).is_dir():
                raise DataError(
                    f"{folder}: no such folder, and {self.root / self.test} is there; what a network makes of test "
                    f"images alone says `trainkit evaluate RUN_DIR --images {shlex.quote(str(self.root))}`"
                )
            named = []
            for label in _class_folders(folder, passed_over):
                if split == "test" and label not in {name for _, name in files["train"].named}:
                    raise DataError(
                        f"{folder / label}: a class that {self.root / self.train} lacks; rename or remove it"
                    )
                found = find_images(folder / label)
                if not found.paths:
                    raise DataError(f"{folder / label}: no images ({', '.join(IMAGE_SUFFIXES)}); add some or remove it")
                named += [(path, label) for path in found.paths]
                for suffix, count in found.passed_over.items():
                    passed_over[_kind(suffix)] += count
            files[split] = _Files(folder, named)
            if split == "train":
                self._refuse_one_class(files[split])
        return files

    def _from_table(self, path: Path) -> dict[str, _Files]:
        """Return the files of each split that a table lists, with their labels.

        Raises:
            DataError: it cannot be read, a row is not one of a table, or a path leads out of `root`.
        """
        files: dict[str, _Files] = {}
        try:
            rows = csv.DictReader(io.StringIO(read_regular(path, _TABLE_BYTES).decode("utf-8-sig"), newline=""))
            columns = {str(name).strip().lower(): name for name in rows.fieldnames or ()}
            if not {"path", "label"} <= columns.keys():
                raise DataError(f"{path}: expected a first line with the columns path,label and perhaps split")
            for row in rows:
                name, label = (row[columns[column]] or "" for column in ("path", "label"))
                split = (row[columns["split"]] or "train").strip().lower() if "split" in columns else "train"
                split = {"val": "validation", "valid": "validation"}.get(split, split)
                if not name or not label or split not in ("train", "validation", "test"):
                    raise DataError(
                        f"{path}, line {rows.line_num}: expected a path, a label and train, validation or test"
                    )
                if os.path.isabs(name) or ".." in Path(name).parts:
                    raise DataError(f"{path}, line {rows.line_num}: {name!r} leads out of {self.root}")
                files.setdefault(split, _Files(self.root, [])).named.append((os.path.join(self.root, name), label))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; check plugins.image_folder.table") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: not a table in UTF-8: {error}") from error
        if "train" not in files:
            raise DataError(f"{path}: it lists no training images")
        if "test" not in files and self.test_fraction is None:
            raise DataError(f"{path}: it lists no test images; set plugins.image_folder.test_fraction, such as 0.2")
        self._refuse_one_class(files["train"])
        return files

    def _refuse_one_class(self, train: _Files) -> None:
        labels = {label for _, label in train.named}
        if len(labels) > 1:
            return
        (label,) = labels
        cure = "add a folder for each class"
        if self.table is not None:
            cure = "add rows of other labels"
        elif any(stat.S_ISDIR(status.st_mode) for _, status in entries(train.base / label)):
            inside = train.base / label
            cure += f", or if those in {inside} are the classes, set plugins.image_folder.train and .test to "
            cure += f"{self.train}/{label} and so on"
        raise DataError(f"{train.base}: one class alone, {label!r}, of which any network is right; {cure}")

    def _classes(self, files: Mapping[str, _Files]) -> tuple[str, ...]:
        classes = tuple(sorted({label for _, label in files["train"].named}))
        for of_split in files.values():
            if strange := sorted({label for _, label in of_split.named} - {*classes}):
                raise DataError(f"{of_split.base}: {strange[0]!r} is a class of which there are no training images")
        return classes

    def _split(
        self,
        run: Run,
        name: str,
        files: Mapping[str, _Files],
        classes: tuple[str, ...],
        crop: Crop | None = None,
    ) -> FolderSplit:
        folder = files[name].base
        samples = [(path, classes.index(label)) for path, label in files[name].named]
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


def _set_aside(files: _Files, fraction: float) -> tuple[_Files, _Files]:
    """Return the files that are left for training, and the share of each class that is set aside.

    Files are ordered by a hash of their names, so it does not matter which others there are.
    """
    by_label: dict[str, list[str]] = {}
    for path, label in files.named:
        by_label.setdefault(label, []).append(path)
    start = len(os.path.join(files.base, ""))
    aside: set[str] = set()
    for label, paths in by_label.items():
        count = max(1, round(len(paths) * fraction))
        if count >= len(paths):
            raise DataError(
                f"{files.base}: the class {label!r} has {len(paths)} images, of which test_fraction leaves none"
            )
        names = {path: path[start:].replace(os.sep, "/") for path in paths}
        ordered = sorted(paths, key=lambda path: blake2b(names[path].encode(errors="surrogateescape")).digest())
        aside.update(ordered[:count])
    left = [(path, label) for path, label in files.named if path not in aside]
    return _Files(files.base, left), _Files(files.base, [pair for pair in files.named if pair[0] in aside])


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
