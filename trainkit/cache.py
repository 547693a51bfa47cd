"""What is kept between runs so that data are not read again: digests of files, and what plugins keep.

It lies in the user's cache directory (``$XDG_CACHE_HOME/trainkit``, by default ``~/.cache/trainkit``), never in a data
folder, where a stranger's data could bring it along. It may be deleted at any time. Where it cannot be written, the
next run reads the data again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from trainkit.images import read_file
from trainkit.rundir import atomic_write

__all__ = ["Key", "cache_path", "file_digests", "file_key", "save", "settled"]

#: What changes with a file's content: inode, size, time of change and, which no user can set back, of status change.
Key = tuple[int, int, int, int]

# File systems tell times to at most two seconds, so a file that has just changed could change again unseen.
SETTLE_NS = 2 * 10**9


def cache_path(kind: str, folder: str | os.PathLike[str], suffix: str) -> Path:
    """Return the file that holds what is kept of a data folder.

    Args:
        kind: a folder in the cache directory; a plugin takes its own name.
        folder: the data folder; its absolute path counts.
        suffix: how the file's name ends.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~")) / ".cache"
    name = blake2b(os.fsencode(os.path.abspath(folder)), digest_size=16).hexdigest()
    return home / "trainkit" / kind / f"{name}{suffix}"


def save(path: Path, data: bytes | str) -> None:
    """Write a file of the cache, whole, if the cache directory can be written."""
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write(path, data)


def file_key(status: os.stat_result) -> Key:
    """Return what changes with a file's content."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def settled(keys: Iterable[Key], now_ns: int) -> bool:
    """Tell whether any later change of these files shows in their keys.

    Args:
        keys: of files.
        now_ns: when the keys were taken, by ``time.time_ns``.
    """
    return all(now_ns - changed > SETTLE_NS for *_, changed in keys)


def file_digests(
    folder: Path, names: Sequence[str], workers: int = 1, announce: Callable[[int, int], None] | None = None
) -> list[str]:
    """Return a digest of the content of each file, from the cache where the file did not change.

    Args:
        folder: the data folder.
        names: of the files, relative to it.
        workers: threads that read.
        announce: called with the number and the bytes of the files that must be read, before they are.

    Raises:
        DataError: a file cannot be read.
    """
    path = cache_path("digests", folder, ".json")
    within = os.path.join(folder, "")  # joined as text: Path takes longer than asking for the file's status
    known = _load(path)
    digests: dict[str, str] = {}
    kept: dict[str, tuple[Key, str]] = {}
    changed: list[str] = []
    size = 0
    for name in names:
        try:
            key = file_key(os.stat(within + name))
        except OSError:  # reading it says why
            key = (0, 0, 0, 0)
        entry = known.get(name)
        if entry is not None and entry[0] == key:
            kept[name] = entry
            digests[name] = entry[1]
        else:
            changed.append(name)
            size += key[1]
    if changed and announce is not None:
        announce(len(changed), size)
    now = time.time_ns()

    def read(name: str) -> tuple[Key, str]:
        content, status = read_file(within + name)
        return file_key(status), blake2b(content, digest_size=16).hexdigest()

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for name, (key, digest) in zip(changed, pool.map(read, changed), strict=True):
            digests[name] = digest
            if settled([key], now):
                kept[name] = (key, digest)
    if kept != known:
        save(path, json.dumps({name: [*key, digest] for name, (key, digest) in kept.items()}))
    return [digests[name] for name in names]


def _load(path: Path) -> dict[str, tuple[Key, str]]:
    """Return the keys and digests that were kept; nothing where the file is absent or damaged."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: ((int(inode), int(size), int(modified), int(changed)), str(digest))
            for name, (inode, size, modified, changed, digest) in saved.items()
        }
    return {}
