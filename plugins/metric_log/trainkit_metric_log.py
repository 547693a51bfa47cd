"""A record of the numbers."""

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from attrs import field

from trainkit import Run
from trainkit.errors import RunError
from trainkit.plugin import hookimpl, plugin

__all__ = ["MetricLog"]

MAX_WAITING = 500  # so many records are written together, also before the end of the epoch


@plugin
class MetricLog:
    """Write metrics.jsonl, every record as it comes, and metrics.csv, one row an epoch.

    Records reach the disk together: at the end of an epoch, before a checkpoint and at the end of the run. A checkpoint
    counts the rows, and a resumed run cuts off those that were written after it. So no row is missing, and none is
    there twice. Numbers read back exactly. Nothing that is written depends on the time.
    """

    observer: ClassVar = True

    _path: Path | None = field(init=False, default=None)  # of metrics.jsonl, once the run has a directory
    _size: int = field(init=False, default=0)  # bytes of whole rows on the disk; a failed write may leave more
    _rows: int = field(init=False, default=0)
    _waiting: list[str] = field(init=False, factory=list)

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Go back to the rows of the checkpoint.

        Raises:
            RunError: the file has fewer rows than the checkpoint counted.
        """
        assert run.dir is not None
        path = run.dir.path / "metrics.jsonl"
        try:
            found = run.dir.read_log(path.name).splitlines(keepends=True) if path.exists() else []
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror}") from error
        kept = [row for row in found if row.endswith(b"\n")][: self._rows]
        if len(kept) < self._rows:
            raise RunError(
                f"{path} has {len(kept)} rows and the checkpoint counted {self._rows}: the file was changed or "
                "left behind; put it back as it was, or start a new run"
            )
        self._path = path
        self._size = sum(len(row) for row in kept)
        self._write()
        if run.history:
            self._write_table(run)

    @hookimpl
    def log(self, run: Run, record: dict[str, float]) -> None:
        """Take a record, and write all that wait at the end of an epoch or when they are many."""
        # JSON has no NaN and no infinity.
        row = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._waiting.append(json.dumps(row) + "\n")
        is_whole_epoch = bool(run.history) and record is run.history[-1]
        if is_whole_epoch or len(self._waiting) >= MAX_WAITING:
            self._write()

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        """Write the table anew, with the row of this epoch."""
        self._write_table(run)

    @hookimpl
    def fit_end(self, run: Run) -> None:
        """Write the records that still wait, also after a stop or a failure."""
        if self._path is None:  # the run ended before this plugin began
            return
        try:
            run.flush_log()  # a run that stops within an epoch leaves its last records on the device
        finally:
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of rows, all of which are on the disk then."""
        if self._path is not None:
            self._write()
        return {"rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember the number of rows to go back to when the run starts."""
        self._rows = state["rows"]

    def _write(self) -> None:
        """Add the waiting records to the file, behind the last whole row."""
        assert self._path is not None
        data = "".join(self._waiting).encode()
        try:
            with self._path.open("ab") as file:
                file.truncate(self._size)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self._path}: cannot be written: {error.strerror}") from error
        self._size += len(data)
        self._rows += len(self._waiting)
        self._waiting = []

    @staticmethod
    def _write_table(run: Run) -> None:
        """Write one row an epoch, with a column for each name that any epoch has."""
        assert run.dir is not None
        columns: dict[str, None] = {}  # names in the order in which they first came
        for row in run.history:
            columns.update(dict.fromkeys(row))
        table = io.StringIO()
        writer = csv.DictWriter(table, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(run.history)
        run.dir.write("metrics.csv", table.getvalue())
