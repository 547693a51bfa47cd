"""Splits, batches and exact positions.

A split is map-style: ``len(split)`` and ``split[i] -> (uint8 [C, H, W], target)``. A :class:`TensorSplit` lives on the
device as a whole, and a batch of it is one indexing; any other split is decoded by the workers of a DataLoader, each
image under random generators that depend on seed, epoch and index alone.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainkit.errors import DataError, RunError
from trainkit.images import Size
from trainkit.processes import Processes
from trainkit.rng import stream, torch_seed

__all__ = [
    "Batch",
    "Batches",
    "Data",
    "Split",
    "Subset",
    "TensorSplit",
    "class_targets",
    "describe",
    "epoch_permutation",
    "subset",
]


@runtime_checkable
class Split(Protocol):
    """A map-style collection of images with targets."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Any]:
        """Return a uint8 image [C, H, W] and its target: a class, counted from 0, or a tensor of any shape."""
        ...


@attrs.frozen(eq=False)
class TensorSplit:
    """A split that is in memory as a whole.

    Args:
        images: uint8 [N, C, H, W].
        targets: int64 [N], classes counted from 0; or any tensor [N, ...].
        digest: identifies the content, where the files that it was decoded from do; by default pixels and targets do.
    """

    images: Tensor
    targets: Tensor
    digest: str | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise DataError(f"images must be uint8 [N, C, H, W], not {describe(self.images)}")
        if not isinstance(self.targets, Tensor) or self.targets.shape[:1] != self.images.shape[:1]:
            raise DataError(f"targets must be a tensor [{len(self.images)}, ...], not {describe(self.targets)}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        target = self.targets[index]
        return self.images[index], int(target) if is_class(target) else target

    def to(self, device: torch.device) -> TensorSplit:
        """Return the split with its tensors on `device`."""
        return TensorSplit(self.images.to(device), self.targets.to(device), digest=self.digest)

    def subset(self, indices: Tensor) -> TensorSplit:
        """Return the split of these images, in this order; `indices` is int64 [n]."""
        digest = None if self.digest is None else subset_digest(self.digest, indices.cpu().numpy())
        return TensorSplit(self.images[indices], self.targets[indices], digest=digest)

    def fingerprint(self) -> str:
        """Return the digest that was given, or one of every pixel and target, computed once."""
        return self.digest or self._digest

    @cached_property
    def _digest(self) -> str:
        digest = blake2b(repr(tuple(self.images.shape)).encode(), digest_size=16)
        for tensor in (self.images, self.targets):
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
        return digest.hexdigest()


@attrs.frozen(eq=False)
class Subset:
    """Some images of a split that is not a :class:`TensorSplit`, decoded when they are asked for.

    Args:
        split: the whole split.
        indices: int64 [n], which of its images, in which order.
    """

    split: Split
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.split[int(self.indices[index])]

    @property
    def targets(self) -> list[Any]:
        """The targets of these images; the subset has them only where the whole split does."""
        targets = self.split.targets  # type: ignore[attr-defined]
        return [targets[index] for index in self.indices.tolist()]

    def fingerprint(self) -> str:
        """Return a digest of the whole split's fingerprint and the indices."""
        from trainkit.provenance import fingerprint

        return subset_digest(fingerprint(self.split), self.indices)


def subset_digest(whole: str, indices: NDArray[np.int64]) -> str:
    """Return what identifies some images of a split, given what identifies the split."""
    digest = blake2b(whole.encode(), digest_size=16)
    digest.update(np.ascontiguousarray(indices).data)
    return digest.hexdigest()


def subset(split: Split, indices: Tensor) -> Split:
    """Return the split of these images of a split, in this order; `indices` is int64 [n]."""
    if isinstance(split, TensorSplit):
        return split.subset(indices)
    return Subset(split, indices.cpu().numpy())


def class_targets(split: Split) -> Tensor | None:
    """Return the class of each image of a split, int64 [N] on the CPU, or None where its targets are no classes.

    A split that has an attribute ``targets``, the target of each image in order, is asked for that. Of any other split
    every image is decoded.

    Raises:
        DataError: there are not as many ``targets`` as images.
    """
    known = getattr(split, "targets", None)
    if known is not None and len(known) != len(split):
        raise DataError(f"{type(split).__name__}: {len(split)} images and {len(known)} targets; mend its `targets`")
    if not is_class(split[0][1] if known is None else known[0]):
        return None
    if isinstance(known, Tensor):
        return known.cpu()
    targets = known if known is not None else (split[index][1] for index in range(len(split)))
    return torch.tensor([int(target) for target in targets])


@attrs.frozen(eq=False, kw_only=True)
class Data:
    """What the ``data`` hook provides.

    Args:
        train: the training split.
        test: the test split.
        validation: images that are held out of training; where there are any, the best epoch, early stopping and
            schedules look at them, and the test split is evaluated once, at the end.
        more: other splits by name, evaluated on request.
        classes: class names, by target; empty where targets are no classes.
        shape: channels, height and width of every image.
        workers: processes that decode a split that is not a :class:`TensorSplit`; 0 decodes in this process.
        resize: how an image file comes to `shape`, as the `size` of :func:`trainkit.images.resize_and_crop`; by default
            the height where `shape` is square, else height and width. ``trainkit.load_model`` reads files so.
    """

    train: Split
    test: Split
    validation: Split | None = None
    more: Mapping[str, Split] = attrs.field(factory=dict)
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    workers: int = 0
    resize: Size | None = None

    def __attrs_post_init__(self) -> None:
        for name, split in self.splits.items():
            if not len(split):
                raise DataError(f"the {name} split has no images; look at where the data plugin reads them")

    @property
    def splits(self) -> dict[str, Split]:
        """All splits by name, ``train`` first."""
        held_out = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.train, **held_out, "test": self.test, **self.more}

    @property
    def has_class_targets(self) -> bool:
        """Whether the targets of the training split are classes: whole numbers, counted from 0."""
        return is_class(self.first_target)

    @property
    def first_target(self) -> Any:
        """The target of the first training image, of whose kind all are.

        A split that has ``targets`` is asked for that; else the image is decoded, and no global generator is moved.
        """
        known = getattr(self.train, "targets", None)
        if known is not None and len(known) == len(self.train):
            return known[0]
        with _seeded(0):
            return self.train[0][1]

    @property
    def file_size(self) -> Size:
        """The size to which an image file is brought: `resize`, or its default."""
        _, height, width = self.shape
        return self.resize or (height if height == width else (height, width))

    def replace(self, **changes: Any) -> Data:
        """Return this data set with some of its splits, or other attributes, replaced.

        Args:
            changes: values by the names of the class's arguments.
        """
        return attrs.evolve(self, **changes)


def is_class(target: object) -> bool:
    """Tell whether one image's target is a class: an integer, or an int64 tensor without dimensions."""
    if isinstance(target, Tensor):
        return target.dim() == 0 and target.dtype == torch.int64
    return isinstance(target, int | np.integer) and not isinstance(target, bool)


@attrs.define(eq=False)
class Batch:
    """Images and targets on the device.

    Args:
        images: [N, C, H, W]: uint8 as they come, float32 after the transforms.
        targets: [N, ...]: int64 [N] classes, or float probabilities [N, classes] after a plugin mixed them, or what
            the data have.
        indices: int64 [N], each image's place in its split; None in a batch that a plugin made without them.
        share: where several processes share a batch, the place of this one's first image in the whole of it, and how
            many images that has; None where all of it is here.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor | None = None
    share: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.images.shape[0]


def epoch_permutation(seed: int, epoch: int, n: int) -> Tensor:
    """Return the order of a training epoch, int64 [n], a function of seed and epoch alone."""
    return torch.from_numpy(stream(seed, "order", epoch).permutation(n))


class Batches:
    """The batches of one split, in any order, from any position.

    ``asked`` and ``arrived`` tell when the last batch was asked for and when it was there, in seconds of
    ``time.perf_counter``: the time between them is what was spent waiting for data.

    Args:
        split: the split; a TensorSplit is moved to the device once.
        batch_size: images a batch; the last batch holds what is left.
        device: where batches are wanted.
        workers: worker processes for a split that must be decoded.
        name: the split's name.
        seed: of the random generators under which images are decoded.
        drop_last: whether a last batch with fewer images is left out.
        processes: those that share each batch.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        *,
        name: str = "train",
        seed: int = 0,
        drop_last: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.split = split.to(device) if isinstance(split, TensorSplit) else split
        self.batch_size = batch_size
        self.device = device
        self.drop_last = drop_last
        self.asked = self.arrived = 0.0
        self.workers = workers
        self.name = name
        self.seed = seed
        self._loader: DataLoader[Any] | None = None if isinstance(self.split, TensorSplit) else self._new_loader()
        self._in_use = False

    def __len__(self) -> int:
        """Return the number of batches of one pass over the split in its own order."""
        return self.count(len(self.split))

    def count(self, images: int) -> int:
        """Return the number of batches that so many images make."""
        return images // self.batch_size if self.drop_last else -(-images // self.batch_size)

    def iterate(
        self, order: Tensor | None = None, start: int = 0, epoch: int = 0, *, whole: bool = False
    ) -> Iterator[Batch]:
        """Yield the batches from number `start` on: this process's share of each, but for those of which it has none.

        Args:
            order: int64 indices of an epoch; None for the split's own order.
            start: the first batch wanted, counted from 0.
            epoch: seeds the random generators under which images are decoded.
            whole: yield whole batches, whatever other processes do.
        """
        in_memory = isinstance(self.split, TensorSplit)
        if order is None:  # made on the device: a copy to it would wait for what it still does
            order = torch.arange(len(self.split), device=self.device if in_memory else None)
        stop = self.count(len(order)) * self.batch_size
        first = start * self.batch_size
        if isinstance(self.split, TensorSplit):
            batches = self._index(self.split, order.to(self.device), range(first, stop, self.batch_size), whole)
        else:
            chunks = [order[i : i + self.batch_size].tolist() for i in range(first, stop, self.batch_size)]
            batches = self._decode(chunks, order[:first], epoch, whole)
        self.asked = perf_counter()
        for batch in batches:
            self.arrived = perf_counter()
            yield batch
            self.asked = perf_counter()

    def _share(self, images: int, whole: bool) -> tuple[slice, tuple[int, int] | None]:
        """Return which part of a batch of so many images is wanted, and the batch's `share`."""
        if whole or self.processes.world == 1:
            return slice(images), None
        part = self.processes.share(images)
        return part, (part.start, images)

    def _index(self, split: TensorSplit, order: Tensor, places: range, whole: bool) -> Iterator[Batch]:
        for place in places:
            chunk = order[place : place + self.batch_size]
            part, share = self._share(len(chunk), whole)
            if part.start == part.stop:
                continue
            indices = chunk[part]
            yield Batch(split.images[indices], split.targets[indices], indices, share)

    def _new_loader(self) -> DataLoader[Any]:
        return DataLoader(
            _Decoded(self.split, self.name, self.seed),
            batch_sampler=_Positions(),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_run,
            generator=torch.Generator(),  # else each pass draws from the global one, to seed its workers
        )

    def _decode(self, chunks: list[list[int]], before: Tensor, epoch: int, whole: bool) -> Iterator[Batch]:
        assert self._loader is not None
        # Workers can be at one pass only: a pass within another one (Run.iterate in a step) has workers of its own.
        within = self._in_use
        loader = self._new_loader() if within else self._loader
        self._in_use = True
        seen = Counter(before.tolist())  # an image that is drawn again in one epoch gets other random numbers
        batches: list[list[tuple[int, int, int]]] = []
        shares: list[tuple[int, int] | None] = []
        for chunk in chunks:
            draws = []
            for index in chunk:
                draws.append((epoch, index, seen[index]))
                seen[index] += 1
            part, share = self._share(len(draws), whole)
            if draws[part]:
                batches.append(draws[part])
                shares.append(share)
        try:
            loader.batch_sampler.batches = batches  # type: ignore[union-attr]
            passing = iter(loader)
            has_handler = self.workers and hasattr(signal, "SIGCHLD")  # Windows has no such signal
            if has_handler and threading.current_thread() is threading.main_thread():
                # torch's handler raises wherever Python happens to be; a dead worker is found at its next batch anyway
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for share, (images, targets, indices) in zip(shares, passing, strict=True):
                moved = (tensor.to(self.device, non_blocking=True) for tensor in (images, targets, indices))
                batch = Batch(*moved)
                batch.share = share
                yield batch
        except Exception as error:
            if told := _from_worker(str(error)):
                raise told from error
            # an end of file or of a connection is what is seen of a worker that dies while it hands over a batch
            died = isinstance(error, EOFError | ConnectionError) or "DataLoader worker" in str(error)
            if not (died and self.workers):
                raise
            reason = str(error).partition("\n")[0] or "its connection ended"
            raise RunError(f"a process that decodes images died: {reason}") from error
        finally:
            if within:
                _end_workers(loader)
            else:
                self._in_use = False

    def close(self) -> None:
        """End the worker processes, if there are any; the next iteration starts new ones."""
        self._in_use = False
        if self._loader is not None:
            _end_workers(self._loader)


def _end_workers(loader: DataLoader[Any]) -> None:
    passing: Any = getattr(loader, "_iterator", None)
    if passing is not None:  # left to the interpreter's exit, they die of signals that it reports as errors
        passing._shutdown_workers()
        loader._iterator = None


def _from_worker(text: str) -> DataError | None:
    """Return what a worker's error said without its traceback, or None where `text` is not that of a worker's error."""
    if not text.startswith("Caught "):
        return None
    said = " ".join(re.split(r"^ .*\n", text, flags=re.MULTILINE)[-1].split())  # a traceback's lines are indented
    own = said.removeprefix("trainkit.errors.DataError: ")
    return DataError(own if own != said else f"reading images failed: {said}")


def _leave_signals_to_the_run(worker: int) -> None:
    """Leave the process group: Ctrl-C, ``timeout`` and others signal all of it, and a run that saves needs its workers.

    The workers of a run that ends are told to end, and those of one that died notice it by themselves.
    """
    if hasattr(os, "setpgid"):  # Windows has no process groups
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler that is inherited from the run
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


class _Decoded(Dataset[tuple[Tensor, Any, int]]):
    """A split as the Dataset that DataLoader wants: checked, and each image under generators of its own."""

    def __init__(self, split: Split, name: str, seed: int) -> None:
        self.split = split
        self.name = name
        self.seed = seed

    def __getitem__(self, draw: tuple[int, int, int]) -> tuple[Tensor, Any, int]:
        """Return an image, its target and its index.

        Args:
            draw: epoch, index, and how often the image was drawn before in this epoch.
        """
        epoch, index, repetition = draw
        with _seeded(torch_seed(self.seed, f"data/{self.name}/{repetition}", epoch, index)):
            image, target = self.split[index]
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.dim() != 3:
            raise DataError(f"image {index} of the {self.name} split must be uint8 [C, H, W], not {describe(image)}")
        if isinstance(target, float | np.floating):
            target = torch.tensor(target, dtype=torch.float32)
        if not isinstance(target, int | np.integer | Tensor):
            raise DataError(
                f"the target of image {index} of the {self.name} split must be a class or a tensor, not "
                f"{describe(target)}"
            )
        return image, target, index


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (on the CPU), numpy and random within the block; put them back after it."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


class _Positions:
    """The batch sampler of a DataLoader whose workers outlive an epoch: the batches of the coming pass."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def describe(value: object) -> str:
    """Return a short description of a value for an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
