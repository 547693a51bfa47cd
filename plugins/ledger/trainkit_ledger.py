"""A ledger of a run: a chain of hashes over its states and records."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field
from attrs.validators import ge

from trainkit.errors import RunError
from trainkit.plugin import hookimpl, plugin

if TYPE_CHECKING:  # verify imports this module, and torch must not be loaded before it knows the recipe's numerics
    from trainkit import Run

__all__ = ["FILE", "START", "Ledger", "chain_of", "link", "record_line", "recorded_files"]

FILE = "ledger.jsonl"
START = "0" * 32  # what stands before the first entry
RECORDED = (
    "recipe*.yaml",
    "plugins.lock*.json",
    "environment*.json",
    "data*.json",
    "result.session-*.json",
    "files/*/*",
)


@plugin
class Ledger:
    """Chain hashes of the run's states and records, which anybody can check by replaying parts of the run.

    ``ledger.jsonl`` has an entry at the start, after every so many steps, and after every epoch: the position, a digest
    of the state (weights, optimizer, schedules, plugins), one of the records so far, and the hash of the entry before
    with all of this. So no entry, record or checkpoint can be changed later without changing all hashes that follow, of
    which the last stands in ``result.json``. ``trainkit verify`` checks that, and replays parts of the run.

    The first entry holds a digest of recipe, code and data, and so does the first entry after a run was continued with
    changes. Nothing of the time or the machine is in the chain: the same recipe, code and data have the same last hash
    wherever the bits are the same, also when the run was killed and resumed.

    Args:
        every_steps: optimizer steps between two entries within an epoch; 0 for a quarter of an epoch.
    """

    observer: ClassVar = True
    before: ClassVar = ("checkpoint",)  # a checkpoint holds the entry of its own position

    every_steps: int = field(default=0, validator=ge(0))
    _path: Path | None = field(init=False, default=None)
    _entries: int = field(init=False, default=0)
    _chain: str = field(init=False, default=START)
    _rows: int = field(init=False, default=0)  # records so far
    _records: str = field(init=False, default=START)  # chained hash of them
    _last: tuple[int, bool, int] = field(init=False, default=(-1, False, 0))  # of the last entry: see _position
    _session: str = field(
        init=False, default=""
    )  # digest of the record, machine included, that entries were made under
    _now: tuple[str, str] = field(init=False, default=("", ""))  # that of this session, and of its material alone
    _interval: int = field(init=False, default=1)  # steps
    _files: dict[str, str] = field(init=False, factory=dict)  # digests of what the sessions recorded
    _open: dict[str, Any] | None = field(init=False, default=None)  # state before the entry that closed a session

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Go back to the entries of the checkpoint, or make the first one.

        Raises:
            RunError: the file has fewer entries than the checkpoint counted.
        """
        from trainkit.provenance import digest, machine, material

        assert run.dir is not None
        if self._open is not None:  # fitted again, without a checkpoint in between
            self.load_state_dict(self._open)
            self._open = None
        self._path = run.dir.path / FILE
        self._interval = self.every_steps or max(1, run.steps_per_epoch // 4)
        self._files = recorded_files(run.dir.path)
        try:
            lines = run.dir.read_log(FILE).splitlines(keepends=True) if self._path.exists() else []
        except OSError as error:
            raise RunError(f"{self._path}: cannot be read: {error.strerror}") from error
        if len(lines) < self._entries:
            raise RunError(
                f"{self._path} has {len(lines)} entries and the checkpoint counted {self._entries}: the file was "
                "changed or left behind; put it back as it was, or start a new run"
            )
        if len(lines) > self._entries:
            run.dir.write(FILE, b"".join(lines[: self._entries]))
        decisive = material(run.provenance)
        self._now = digest([decisive, machine(run.provenance)]), digest(decisive)
        if self._entries == 0:
            self._add(run)
        self._tell(run)

    @hookimpl
    def log(self, record: dict[str, float]) -> None:
        """Take a record into the hash of all records."""
        self._rows += 1
        self._records = link(self._records, record_line(record))

    @hookimpl
    def safe_point(self, run: Run) -> None:
        """Make an entry after every so many steps, and after every epoch."""
        ended = run.ended is not None  # for good
        due = run.epoch_ended or run.step % self._interval == 0 or ended
        if due and self._last[:2] != (run.step, run.epoch_ended):
            self._add(run)

    @hookimpl
    def fit_end(self, run: Run, error: BaseException | None) -> None:
        """Make an entry of where the session ended. Whoever continues it goes back to the one before."""
        if error is not None or self._path is None:
            return
        run.flush_log()
        if self._last != self._position(run):
            self._open = self.state_dict()
            self._add(run)

    def state_dict(self) -> dict[str, Any]:
        """Return what the entries so far have come to."""
        return {
            "entries": self._entries,
            "chain": self._chain,
            "rows": self._rows,
            "records": self._records,
            "last": self._last,
            "session": self._session,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._entries, self._chain = state["entries"], state["chain"]
        self._rows, self._records = state["rows"], state["records"]
        self._last, self._session = tuple(state["last"]), state["session"]

    def _position(self, run: Run) -> tuple[int, bool, int]:
        return run.step, run.epoch_ended, self._rows

    def _add(self, run: Run) -> None:
        from trainkit.provenance import state_digest

        assert self._path is not None
        state = run.state_dict()  # hands pending records to the log hook
        entry = {
            "entry": self._entries,
            "epoch": run.epoch,
            "batch_index": run.batch_index,
            "step": run.step,
            "state": state_digest(state),
            "rows": self._rows,
            "records": self._records,
        }
        session, decisive = self._now
        if session != self._session:  # the first entry, or continued with changes
            entry["record"] = decisive
        self._chain = chain_of(self._chain, entry)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**entry, "chain": self._chain}) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before a checkpoint counts it
        except OSError as error:
            raise RunError(f"{self._path}: cannot be written: {error.strerror}") from error
        self._entries += 1
        self._session = session
        self._last = self._position(run)
        self._tell(run)

    def _tell(self, run: Run) -> None:
        run.evidence["ledger"] = {"entries": self._entries, "chain": self._chain, "files": self._files}


def recorded_files(folder: Path) -> dict[str, str]:
    """Return a digest of each file in which the sessions of a run say what produced it, and what each had come to."""
    from trainkit.provenance import file_digest

    found = sorted(path for pattern in RECORDED for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in found}


def chain_of(before: str, entry: Mapping[str, Any]) -> str:
    """Return the hash of an entry: over the hash before it and all that it says, but for its own hash."""
    plain = {name: value for name, value in entry.items() if name != "chain"}
    return link(before, json.dumps(plain, sort_keys=True))


def link(before: str, text: str) -> str:
    """Return the hash of a text behind a hash."""
    return blake2b(f"{before} {text}".encode(), digest_size=16).hexdigest()


def record_line(record: Mapping[str, Any]) -> str:
    """Return a record as one text, as metrics.jsonl has it: JSON has no NaN and no infinity."""
    plain = {name: value if value is None or math.isfinite(value) else None for name, value in sorted(record.items())}
    return json.dumps(plain)
