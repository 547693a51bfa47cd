"""A ledger of a run: a chain of hashes over its states and records."""

import json
import math
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

from attrs import field
from attrs.validators import ge

from trainkit import Run
from trainkit.errors import RunError
from trainkit.plugin import hookimpl, plugin

__all__ = ["FILE", "START", "Ledger", "chain_of", "link", "material", "record_line"]

FILE = "ledger.jsonl"
START = "0" * 32  # what stands before the first entry


@plugin
class Ledger:
    """Chain hashes of the run's states and records, which anybody can check by replaying parts of the run.

    ``ledger.jsonl`` has an entry at the start, after every so many steps, and after every epoch: the position, a digest
    of the state (weights, optimizer, schedules, plugins), one of the records so far, and the hash of the entry before
    with all of this. So no entry, record or checkpoint can be changed later without changing all hashes that follow, of
    which the last stands in ``result.json``. ``trainkit verify`` checks that, and replays parts of the run.

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
    _step: int = field(init=False, default=-1)  # of the last entry
    _ended: bool = field(init=False, default=False)  # whether that entry is the one of an epoch's end
    _interval: int = field(init=False, default=1)  # steps

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Go back to the entries of the checkpoint, or make the first one.

        Raises:
            RunError: the file has fewer entries than the checkpoint counted.
        """
        assert run.dir is not None
        self._path = run.dir.path / FILE
        self._interval = self.every_steps or max(1, run.steps_per_epoch // 4)
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
        if self._entries == 0:
            from trainkit.provenance import digest

            self._add(run, {"record": digest(material(run.provenance))})
        run.evidence["ledger"] = {"entries": self._entries, "chain": self._chain}

    @hookimpl
    def log(self, record: dict[str, float]) -> None:
        """Take a record into the hash of all records."""
        self._rows += 1
        self._records = link(self._records, record_line(record))

    @hookimpl
    def safe_point(self, run: Run) -> None:
        """Make an entry after every so many steps, and after every epoch."""
        ended = run.epoch_ended
        due = ended or run.step % self._interval == 0 or run.is_stopping()
        if due and (self._step, self._ended) != (run.step, ended):
            self._add(run, {})

    def state_dict(self) -> dict[str, Any]:
        """Return what the entries so far have come to."""
        return {
            "entries": self._entries,
            "chain": self._chain,
            "rows": self._rows,
            "records": self._records,
            "step": self._step,
            "ended": self._ended,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._entries, self._chain = state["entries"], state["chain"]
        self._rows, self._records = state["rows"], state["records"]
        self._step, self._ended = state["step"], state["ended"]

    def _add(self, run: Run, more: dict[str, Any]) -> None:
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
            **more,
        }
        self._chain = chain_of(self._chain, entry)
        with self._path.open("a") as file:
            file.write(json.dumps({**entry, "chain": self._chain}) + "\n")
        self._entries += 1
        self._step, self._ended = run.step, run.epoch_ended
        run.evidence["ledger"] = {"entries": self._entries, "chain": self._chain}


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


def material(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a provenance record that a run's numbers depend on, and that its directory repeats."""
    plugins = [plugin for plugin in record["plugins"] if not plugin["observer"]]
    return {
        "recipe": {name: value for name, value in record["recipe"].items() if name not in ("description", "source")},
        "plugins": [{name: plugin[name] for name in ("name", "version", "code", "options")} for plugin in plugins],
        "data": record["data"]["splits"],
        "classes": record["data"]["classes"],
    }
