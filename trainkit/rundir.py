"""The run directory: where a run keeps what it leaves behind. Every file is written whole or not at all.

::

    runs/<recipe>/<time>-<seed>/
        recipe.yaml          resolved and complete: it runs again
        plugins.lock.json    name, version, distribution, source and options of each plugin, in call order
        environment.json     interpreter, packages, processor, devices, data, what plugins declare
        metrics.jsonl, figures/, checkpoints/     written by plugins
        result.json          how the run ended and what it reached

No file holds an absolute path, so the directory can be moved.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard

import attrs

from trainkit.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from trainkit.recipe import Recipe

if sys.platform != "win32":
    import fcntl

__all__ = [
    "MAX_JSON",
    "MAX_LOG",
    "RunDir",
    "as_mapping",
    "as_numbers",
    "atomic_write",
    "flush_folder",
    "is_number",
    "open_regular",
    "pack_state",
    "parse_json",
    "read_regular",
    "unpack_state",
]

#: The most bytes that are read of a JSON document, of a log or table with a row an epoch or a step, of a checkpoint.
MAX_JSON, MAX_LOG, MAX_CHECKPOINT = 1 << 26, 1 << 30, 1 << 36
MAX_DEPTH = 100  # levels of a JSON document
DIGEST_SIZE = 32  # bytes of a checkpoint's checksum
PART = ".part"  # the suffix of a file that is being written


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all.

    A temporary file in the same folder is written, flushed to the disk and renamed; then the folder is flushed.

    Raises:
        OSError: the disk is full or read-only, for example. The file that was there before is unchanged.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with part.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    flush_folder(path.parent)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, if it is a regular one.

    A named pipe would block for ever, and a device such as ``/dev/zero`` never ends; a stranger's folder may hold both.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    flags = ("O_NONBLOCK", "O_NOCTTY", "O_BINARY")  # opening a pipe must not wait for its writer
    handle = os.open(path, os.O_RDONLY | sum(getattr(os, flag, 0) for flag in flags))
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is no regular file", str(path))


def read_regular(path: Path, limit: int) -> bytes:
    """Return what a regular file holds. What is read counts, and not the size that the system gives.

    Args:
        path: a file.
        limit: the most bytes that it may hold.

    Raises:
        OSError: it cannot be read, is no regular file (:func:`open_regular`), or holds more.
    """
    parts, left = [], limit + 1
    with open_regular(path) as file:
        expected = os.fstat(file.fileno()).st_size + 1
        while left and (part := file.read(min(left, max(expected, 1 << 16)))):
            parts.append(part)
            left -= len(part)
            expected = 0
    if not left:
        raise OSError(errno.EFBIG, f"it is larger than {_size(limit)}", str(path))
    return b"".join(parts)


def _size(count: int) -> str:
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << bits:
            return f"{count >> bits} {unit}"
    return f"{count} bytes"


def parse_json(data: bytes | str) -> Any:
    """Return what a JSON document says.

    Raises:
        ValueError: it is none, or is nested so deeply that what walks through it would fail.
    """
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _members(outer)]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def as_mapping(value: object) -> dict[str, Any]:
    """Return an object of a JSON document; an empty one where a stranger's file says something else."""
    return value if isinstance(value, dict) else {}


def is_number(value: object) -> TypeGuard[int | float]:
    """Tell whether a value of a JSON document is a finite number, and no whole one that is too large for a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def as_numbers(value: object) -> dict[str, float]:
    """Return the finite numbers of an object of a JSON document (:func:`as_mapping`), by name."""
    return {name: number for name, number in as_mapping(value).items() if is_number(number)}


def _members(value: Any) -> list[Any]:
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [member for member in members if isinstance(member, dict | list)]


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, so that a rename survives a power failure."""
    if os.name != "posix":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_held: set[int] = set()  # descriptors of locked directories


def _drop_inherited() -> None:
    """Close the locks that a forked process inherits: a worker that outlives the run would keep them."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_inherited)


@attrs.frozen
class RunDir:
    """The directory of one run.

    Args:
        path: as it was given: relative to the current folder, or absolute.
    """

    path: Path

    @classmethod
    def create(cls, recipe: Recipe, path: Path | None = None) -> RunDir:
        """Make a new, empty directory.

        Args:
            recipe: its name and its seed name the directory.
            path: where to make it; by default ``runs/<recipe>/<time>-<seed>`` in the current folder.

        Raises:
            UsageError: `path` is not empty, or cannot be made.
        """
        if path is None:
            return cls(_make_numbered(Path("runs") / recipe.name / f"{datetime.now():%Y%m%d-%H%M%S}-{recipe.seed}"))
        try:
            path.mkdir(parents=True, exist_ok=True)
            occupied = any(path.iterdir())
        except OSError as error:
            raise UsageError(f"run directory {path}: cannot be made: {error.strerror}") from error
        if occupied:
            raise UsageError(f"run directory {path}: not empty; give a new directory")
        return cls(path)

    def write(self, name: str, data: bytes | str) -> Path:
        """Write a file whole or not at all, and return its path.

        Args:
            name: relative to the directory; its folders are made.
            data: what the file holds; text is encoded as UTF-8.
        """
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file whole or not at all; NaN and infinity become null."""
        return self.write(name, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")

    def add(self, name: str, data: str) -> Path:
        """Write a file beside its earlier versions, none of which is overwritten: ``name.yaml``, ``name.2.yaml``, ...

        Nothing is written where the latest version says the same.
        """
        latest = self.latest(name)
        if latest is None:
            return self.write(name, data)
        if self._says(latest, data):
            return latest
        stem, _, suffix = name.rpartition(".")
        return self.write(f"{stem}.{len(self.versions(name)) + 1}.{suffix}", data)

    @staticmethod
    def _says(path: Path, data: str) -> bool:
        try:
            return read_regular(path, MAX_JSON) == data.encode()
        except OSError:  # whatever stands there is left as it is
            return False

    def add_json(self, name: str, value: Any) -> Path:
        """Write a JSON file beside its earlier versions (:meth:`add`)."""
        return self.add(name, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")

    def versions(self, name: str) -> list[Path]:
        """Return the versions of a file that sessions of the run added, the first one first."""
        stem, _, suffix = name.rpartition(".")
        found = [self.path / name]
        while found[-1].is_file():
            found.append(self.path / f"{stem}.{len(found) + 1}.{suffix}")
        return found[:-1]

    def latest(self, name: str) -> Path | None:
        """Return the latest version of a file that sessions of the run added, or None where there is none."""
        versions = self.versions(name)
        return versions[-1] if versions else None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep every other process from writing to the directory.

        The system releases the lock of a process that dies. On Windows there is no lock.

        Raises:
            UsageError: another process holds the lock.
        """
        if sys.platform == "win32":  # locks files only
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        _held.add(handle)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"{self.path}: another process is writing to this run directory") from error
            yield
        finally:
            _held.discard(handle)
            os.close(handle)

    def remove_parts(self) -> None:
        """Remove the temporary files of writes that were killed. Only the holder of :meth:`exclusive` may do this."""
        if sys.platform == "win32":  # without a lock, another process may be writing them
            return
        for part in self.path.rglob(f".*{PART}"):
            part.unlink(missing_ok=True)

    def recipe_path(self) -> Path:
        """Return the resolved recipe of the run: the latest, where it was continued with another one.

        Raises:
            UsageError: there is none, so this is not the directory of a run.
        """
        path = self.latest("recipe.yaml")
        if path is None:
            raise UsageError(f"{self.path}: not the directory of a run: it holds no recipe.yaml")
        return path

    def load_state(self, name: str) -> dict[str, Any]:
        """Read ``checkpoints/<name>.pt``, whose checksum is verified first. Nothing in it can run code.

        Raises:
            CheckpointError: it is missing, truncated or altered, or holds more than tensors and plain values.
        """
        path = self.path / "checkpoints" / f"{name}.pt"
        try:
            data = read_regular(path, MAX_CHECKPOINT)
        except FileNotFoundError as error:
            others = ", ".join(sorted(other.name for other in path.parent.glob("*.pt")))
            cure = f"there are {others}" if others else "a run saves them when its recipe lists a plugin that does"
            raise CheckpointError(f"{path}: no checkpoint: {error.strerror}; {cure}") from error
        except OSError as error:
            raise CheckpointError(f"{path}: no checkpoint: {error.strerror}") from error
        body, digest = data[:-DIGEST_SIZE], data[-DIGEST_SIZE:]
        if blake2b(body, digest_size=DIGEST_SIZE).digest() != digest:
            raise CheckpointError(f"{path}: damaged: its checksum does not match its {len(data):,} bytes")
        state = unpack_state(path, data)
        if not isinstance(state, dict):
            raise CheckpointError(f"{path}: not a checkpoint of trainkit")
        return state

    def load_latest(self) -> tuple[dict[str, Any], str]:
        """Read the last checkpoint that is whole.

        Returns:
            Its state, and a message for the user: empty where that checkpoint is ``last.pt``.

        Raises:
            CheckpointError: neither ``last.pt`` nor ``previous.pt`` can be read.
        """
        try:
            return self.load_state("last"), ""
        except CheckpointError as error:
            try:
                return self.load_state("previous"), f"{error}; continuing from the one before it, previous.pt"
            except CheckpointError:
                raise error from None

    def read_json(self, name: str) -> Any:
        """Read a JSON file.

        Raises:
            UsageError: it is missing, or not JSON.
        """
        path = self.path / name
        try:
            return parse_json(read_regular(path, MAX_JSON))
        except OSError as error:
            raise UsageError(f"{path}: not the file of a run: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"{path}: not the file of a run: {error}") from error

    def read_log(self, name: str) -> bytes:
        """Return what a log or a table of the run holds.

        Raises:
            OSError: it is missing, no regular file, or larger than anything that a run writes.
        """
        return read_regular(self.path / name, MAX_LOG)


def unpack_state(path: Path, data: bytes) -> Any:
    """Return what ``torch.save`` packed. Nothing in it can run code, or take more memory than its own size.

    Args:
        path: where it was read, for the error.
        data: the file's content.

    Raises:
        CheckpointError: it is compressed, or holds more than tensors and plain values.
    """
    import torch

    _refuse_inflated(path, data)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # its message advises to load without protection, so none of it is repeated
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {named[1]}, and loading that could run code" if named else "torch cannot read it"
        raise CheckpointError(
            f"{path}: refused: not a checkpoint of tensors and plain values: {reason}; use one that trainkit wrote"
        ) from error


def _refuse_inflated(path: Path, data: bytes) -> None:
    """Refuse an archive that would take more memory than its own size: torch stores what it writes, uncompressed.

    Raises:
        CheckpointError: a member is compressed, members lie over each other, or it is no archive.
    """
    try:
        members = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
        raise CheckpointError(f"{path}: refused: not the archive that torch writes") from error
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    if not stored or sum(member.file_size for member in members) > len(data):
        raise CheckpointError(f"{path}: refused: it would be larger in memory than its {len(data):,} bytes")


def _make_numbered(path: Path) -> Path:
    """Make a directory, and return its path; where it exists, ``-2``, ``-3``, ... is added to its name."""
    for attempt in range(1, 1000):
        made = path if attempt == 1 else path.with_name(f"{path.name}-{attempt}")
        try:
            made.mkdir(parents=True)
        except FileExistsError:  # another run of this recipe and seed was started within the same second
            continue
        except OSError as error:
            raise UsageError(f"{made}: cannot be made: {error.strerror}; choose a place with --run-dir") from error
        return made
    raise UsageError(f"{path}: exists, and so do 998 numbered ones")


def _plain(value: Any) -> Any:
    """Return a value with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pack_state(state: Mapping[str, Any]) -> bytes:
    """Return the bytes of a checkpoint file: what ``torch.save`` writes, and at its end a checksum of all before it.

    A file of torch is a zip archive, and a zip archive may end in a comment. The checksum is that comment, so
    ``torch.load`` reads the file as it is. The archive's last two bytes are the length of the comment.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    body = buffer.getvalue()[:-2] + DIGEST_SIZE.to_bytes(2, "little")
    return body + blake2b(body, digest_size=DIGEST_SIZE).digest()
