"""What a training step spends its time on."""

import csv
import io
from time import perf_counter
from typing import ClassVar

from attrs import field
from rich import box
from rich.table import Table
from torch import Tensor

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["PARTS", "StepTimes"]

#: The parts of a step, and what each is, in the order of a step.
PARTS = {
    "data_wait": "waiting for the next batch",
    "forward": "image transforms, forward pass, loss",
    "backward": "backward pass",
    "optimizer": "optimizer, step-wise schedules",
    "plugins": "plugins around these, saving too",
}
FILE = "step_times.csv"


@plugin
class StepTimes:
    """Measure what a training step spends its time on: data, forward, backward, optimizer, plugins.

    Means over the steps of each epoch go to ``step_times.csv`` in the run directory, and a table of shares is printed
    at the end. It is the time of the host, which is not made to wait for a GPU: there, a part is the time that it takes
    to start the GPU's work, and any part may hold a wait for earlier work. Evaluation is not measured.
    """

    observer: ClassVar = True

    _rows: list[dict[str, float]] = field(init=False, factory=list)  # one an epoch: epoch, steps, ms of each part
    _seconds: dict[str, float] = field(init=False, factory=dict)  # of this epoch
    _steps: int = field(init=False, default=0)  # of this epoch
    _total: dict[str, float] = field(init=False, factory=dict)  # seconds of this session
    _total_steps: int = field(init=False, default=0)
    _part: str = field(init=False, default="plugins")  # what is going on
    _since: float = field(init=False, default=0.0)
    _step_ended: bool = field(init=False, default=False)  # and its safe point is still to come

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Keep the rows of epochs that were completed before the run was resumed."""
        assert run.dir is not None
        path = run.dir.path / FILE
        self._rows = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
            self._rows = [row for row in rows if row["epoch"] <= run.epoch]
        self._total, self._total_steps = dict.fromkeys(PARTS, 0.0), 0

    @hookimpl
    def train_start(self) -> None:
        """Begin an epoch, or what is left of one."""
        self._seconds, self._steps = dict.fromkeys(PARTS, 0.0), 0
        self._part, self._since = "plugins", perf_counter()

    @hookimpl
    def forward_end(self, run: Run) -> None:
        """End the wait for the batch, and the forward pass."""
        if run.split == "train":
            batches = run.batches["train"]
            self._end(self._part, batches.asked)
            self._end("data_wait", batches.arrived)
            self._end("forward", perf_counter())
            self._part = "plugins"

    @hookimpl
    def transform_loss(self, loss: Tensor) -> Tensor:
        """Begin the backward pass."""
        self._end("plugins", perf_counter())
        self._part = "backward"
        return loss

    @hookimpl
    def gradients_ready(self) -> None:
        """End the last backward pass of a step."""
        self._end("backward", perf_counter())

    @hookimpl
    def step_end(self) -> None:
        """End the optimizer's step."""
        self._end("optimizer", perf_counter())
        self._part, self._step_ended = "plugins", True
        self._steps += 1

    @hookimpl
    def safe_point(self) -> None:
        """End what plugins do after a step; what they do at other safe points is no part of a step."""
        if self._step_ended:
            self._end("plugins", perf_counter())
            self._step_ended = False

    @hookimpl
    def epoch_end(self, run: Run, metrics: dict[str, float]) -> None:
        """Write the file anew, with the row of this epoch."""
        if not self._steps:
            return
        assert run.dir is not None
        milliseconds = {part: round(self._seconds[part] / self._steps * 1000, 4) for part in PARTS}
        self._rows.append({"epoch": metrics["epoch"], "steps": self._steps, **milliseconds})
        self._add_up()
        table = io.StringIO()
        writer = csv.DictWriter(table, ["epoch", "steps", *PARTS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        run.dir.write(FILE, table.getvalue())

    @hookimpl
    def fit_end(self, run: Run) -> None:
        """Print the table, after a stop or a failure too."""
        self._add_up()
        if self._total_steps:
            run.console.print(self._table(run))

    def _end(self, part: str, now: float) -> None:
        """Give the time since the last call to a part."""
        self._seconds[part] += now - self._since
        self._since = now

    def _add_up(self) -> None:
        """Add this epoch to the session."""
        for part, seconds in self._seconds.items():
            self._total[part] += seconds
        self._total_steps += self._steps
        self._seconds, self._steps = {}, 0

    def _table(self, run: Run) -> Table:
        total = sum(self._total.values()) or 1.0
        host = " of the host, which does not wait for the GPU" if run.device.type != "cpu" else ""
        table = Table(title=f"Time of {self._total_steps:,} training steps{host}", box=box.SIMPLE, show_footer=True)
        table.title_justify = "left"
        table.add_column("part", "all")
        table.add_column("ms a step", f"{total / self._total_steps * 1000:.2f}", justify="right")
        table.add_column("share", "100.0 %", justify="right")
        table.add_column("what it is")
        for part, seconds in self._total.items():
            share = f"{100 * seconds / total:.1f} %"
            table.add_row(part, f"{seconds / self._total_steps * 1000:.2f}", share, PARTS[part])
        return table
