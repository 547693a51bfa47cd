"""Splits, batches and exact positions.

A split is map-style: ``len(split)`` and ``split[i] -> (uint8 [C, H, W], int)``. A :class:`TensorSplit` lives on the
device as a whole, and a batch of it is one indexing; any other split is decoded by the workers of a DataLoader.
"""

import re
import signal
import threading
from collections.abc import Iterator
from functools import cached_property
from hashlib import blake2b
from typing import Any, Protocol, runtime_checkable

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainkit.errors import DataError, RunError
from trainkit.rng import stream

__all__ = ["Batch", "Batches", "Data", "Split", "TensorSplit", "epoch_permutation"]


@runtime_checkable
class Split(Protocol):
    """A map-style collection of labelled images."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """Return a uint8 image [C, H, W] and its class, counted from 0."""
        ...


@attrs.frozen(eq=False)
class TensorSplit:
    """A split that is in memory as a whole.

    Args:
        images: uint8 [N, C, H, W].
        targets: int64 [N], classes counted from 0.
    """

    images: Tensor
    targets: Tensor

    def __attrs_post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise DataError(f"images must be uint8 [N, C, H, W], not {describe(self.images)}")
        if self.targets.dtype != torch.int64 or self.targets.shape != self.images.shape[:1]:
            raise DataError(f"targets must be int64 [{len(self.images)}], not {describe(self.targets)}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.targets[index])

    def to(self, device: torch.device) -> "TensorSplit":
        """Return the split with its tensors on `device`."""
        return TensorSplit(self.images.to(device), self.targets.to(device))

    def fingerprint(self) -> str:
        """Return a digest of every pixel and target, computed once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = blake2b(repr(tuple(self.images.shape)).encode(), digest_size=16)
        for tensor in (self.images, self.targets):
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
        return digest.hexdigest()


@attrs.frozen(eq=False, kw_only=True)
class Data:
    """What the ``data`` hook provides.

    Args:
        train: the training split.
        test: the test split.
        classes: class names, by target.
        shape: channels, height and width of every image.
        workers: processes that decode a split that is not a :class:`TensorSplit`; 0 decodes in this process.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    workers: int = 0

    def __attrs_post_init__(self) -> None:
        for name in ("train", "test"):
            if not len(getattr(self, name)):
                raise DataError(f"the {name} split has no images; look at where the data plugin reads them")

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name."""
        return {"train": self.train, "test": self.test}


@attrs.define(eq=False)
class Batch:
    """Images and targets on the device.

    Args:
        images: [N, C, H, W]: uint8 as they come, float32 after the transforms.
        targets: int64 [N], or float probabilities [N, classes] after a plugin mixed them.
    """

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]  # a tensor's own len() costs three times as much


def epoch_permutation(seed: int, epoch: int, n: int) -> Tensor:
    """Return the order of a training epoch, int64 [n], a function of seed and epoch alone."""
    return torch.from_numpy(stream(seed, "order", epoch).permutation(n))


class Batches:
    """The batches of one split, in any order, from any position.

    Args:
        split: the split; a TensorSplit is moved to the device once.
        batch_size: images a batch; the last batch holds what is left.
        device: where batches are wanted.
        workers: worker processes for a split that must be decoded.
    """

    def __init__(self, split: Split, batch_size: int, device: torch.device, workers: int = 0) -> None:
        self.split = split.to(device) if isinstance(split, TensorSplit) else split
        self.batch_size = batch_size
        self.device = device
        self._sampler = _Positions()
        self._loader: DataLoader[Any] | None = None
        if not isinstance(self.split, TensorSplit):
            self._loader = DataLoader(
                _Decoded(self.split),
                batch_sampler=self._sampler,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=device.type == "cuda",
                worker_init_fn=_leave_signals_to_the_run,
            )

    def __len__(self) -> int:
        return (len(self.split) + self.batch_size - 1) // self.batch_size

    def iterate(self, order: Tensor | None = None, start: int = 0) -> Iterator[Batch]:
        """Yield the batches from number `start` on.

        Args:
            order: int64 indices of an epoch; None for the split's own order.
            start: the first batch wanted, counted from 0.
        """
        first = start * self.batch_size
        if isinstance(self.split, TensorSplit):
            images, targets = self.split.images, self.split.targets
            if order is None:  # slices are views: nothing is copied
                for i in range(first, len(images), self.batch_size):
                    yield Batch(images[i : i + self.batch_size], targets[i : i + self.batch_size])
                return
            order = order.to(self.device)
            for i in range(first, len(order), self.batch_size):
                index = order[i : i + self.batch_size]
                yield Batch(images[index], targets[index])
            return
        assert self._loader is not None
        indices = range(len(self.split)) if order is None else order.tolist()
        self._sampler.batches = [
            list(indices[i : i + self.batch_size]) for i in range(first, len(indices), self.batch_size)
        ]
        try:
            passing = iter(self._loader)
            if self._loader.num_workers and threading.current_thread() is threading.main_thread():
                # torch's handler raises wherever Python happens to be; a dead worker is found at its next batch anyway
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for images, targets in passing:
                yield Batch(images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True))
        except Exception as error:
            if told := _from_worker(str(error)):
                raise told from error
            # an end of file or of a connection is what is seen of a worker that dies while it hands over a batch
            died = isinstance(error, EOFError | ConnectionError) or "DataLoader worker" in str(error)
            if not (died and self._loader.num_workers):
                raise
            reason = str(error).partition("\n")[0] or "its connection ended"
            raise RunError(f"a process that decodes images died: {reason}") from error

    def close(self) -> None:
        """End the worker processes, if there are any; the next iteration starts new ones."""
        passing: Any = getattr(self._loader, "_iterator", None)
        if passing is not None:  # left to the interpreter's exit, they die of signals that it reports as errors
            passing._shutdown_workers()
            self._loader._iterator = None  # type: ignore[union-attr]


def _from_worker(text: str) -> DataError | None:
    """Return what a worker's error said without its traceback, or None where `text` is not that of a worker's error."""
    if not text.startswith("Caught "):
        return None
    said = " ".join(re.split(r"^ .*\n", text, flags=re.MULTILINE)[-1].split())  # a traceback's lines are indented
    own = said.removeprefix("trainkit.errors.DataError: ")
    return DataError(own if own != said else f"reading images failed: {said}")


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C reaches the whole process group; a worker that died of it would fail a run that is about to save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Decoded(Dataset[tuple[Tensor, int]]):
    """A split as the Dataset that DataLoader's types ask for."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.split[index]


class _Positions:
    """The batch sampler of a DataLoader whose workers outlive an epoch: the batches of the coming pass."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def describe(value: object) -> str:
    """Return a short description of a value for an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
