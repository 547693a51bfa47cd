"""Progress for people."""

from datetime import timedelta
from math import inf
from time import perf_counter
from typing import Literal

import rich.progress
from attrs import field
from rich.progress import BarColumn, TextColumn
from rich.text import Text

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["Progress"]

REFRESH = 0.25  # seconds between two pictures of the bars
LINE = 30.0  # seconds between two lines within an epoch
LOSS = 5.0  # seconds between two looks at the recorded losses: each waits for the device once


@plugin
class Progress:
    """Show how far a run is: live bars on a terminal, plain lines elsewhere.

    A step costs a look at the clock. The loss shown within an epoch is the last one that a plugin recorded
    (``metrics`` does so every 50 steps). The bars are drawn between steps, not by a thread of their own, which worker
    processes could not be forked beside safely.
    """

    _bars: rich.progress.Progress | None = field(init=False, default=None)
    _loss: float | None = field(init=False, default=None)
    _speed: str = field(init=False, default="")  # of the last training pass, as shown
    # the pass over a split that is under way: batches before and since it began or was resumed, and when that was
    _split: Literal["train", "test"] = field(init=False, default="train")
    _before: int = field(init=False, default=0)
    _batches: int = field(init=False, default=0)
    _began: float = field(init=False, default=0.0)
    # the run: how much of it was done when it began or was resumed, and when that was
    _fraction: float = field(init=False, default=0.0)
    _started: float = field(init=False, default=0.0)
    _next: float = field(init=False, default=inf)  # when to show something; never, outside of a run
    _next_loss: float = field(init=False, default=0.0)

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Start the clock, and the bars."""
        self._started, self._fraction = perf_counter(), _fraction(run)
        self._begin("train", run.batch_index)
        self._next = self._started + LINE
        if run.console.is_interactive:
            status = TextColumn("{task.fields[status]}", markup=False)
            columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[count]}"), status)
            self._bars = rich.progress.Progress(*columns, console=run.console, auto_refresh=False)
            for name in ("epoch", "train"):
                self._bars.add_task(name, count="", status="")
            self._bars.start()
            self._show(run)

    @hookimpl
    def epoch_start(self) -> None:
        """Begin to count training batches."""
        self._begin("train", 0)

    @hookimpl
    def forward_end(self, run: Run) -> None:
        """Count a batch and, when it is time, show it."""
        self._batches += 1
        if perf_counter() >= self._next:
            self._show(run)

    @hookimpl
    def metrics(self, run: Run, split: Literal["train", "test"]) -> None:
        """Go on from training to testing."""
        if split == "train":
            self._speed = self._images_per_second(run)
            self._begin("test", 0)

    @hookimpl
    def log(self, record: dict[str, float]) -> None:
        """Keep the last loss of a batch."""
        self._loss = record.get("loss", self._loss)

    @hookimpl
    def epoch_end(self, run: Run, metrics: dict[str, float]) -> None:
        """Print the line of the epoch, where there are no bars."""
        if self._bars is None:
            values = [_value(name, value) for name, value in metrics.items() if name not in ("epoch", "step", "lr")]
            self._print(run, f"epoch {metrics['epoch']:g}/{run.epochs}", *values, f"lr {metrics['lr']:g}", self._speed)

    @hookimpl
    def fit_end(self, run: Run) -> None:
        """Show the end and give the terminal back, after a stop or a failure too."""
        if self._bars is not None:
            self._next_loss = inf  # a device that failed is not asked again
            try:
                self._show(run)
            finally:
                self._bars.stop()
                self._bars = None
        self._next = inf

    def _begin(self, split: Literal["train", "test"], batch: int) -> None:
        self._split, self._before, self._batches, self._began = split, batch, 0, perf_counter()

    def _show(self, run: Run) -> None:
        now = perf_counter()
        if run.pending and now >= self._next_loss:
            run.flush_log()
            self._next_loss = now + LOSS
        epoch = f"{min(run.epoch + 1, run.epochs)}/{run.epochs}"
        done, total = self._before + self._batches, len(run.batches[self._split])
        loss = _value("loss", self._loss) if self._split == "train" and self._loss is not None else ""
        speed = self._images_per_second(run)
        if self._bars is None:
            self._print(run, f"epoch {epoch}", f"{self._split} {done}/{total}", loss, speed)
            return
        last = run.history[-1] if run.history else {}
        status = _join(self._eta(run), *(_value(k, v) for k, v in last.items() if k.startswith("test_")))
        first, second = self._bars.task_ids
        self._bars.update(first, total=1.0, completed=_fraction(run), count=epoch, status=status)
        self._bars.update(
            second,
            description=self._split,
            total=total,
            completed=done,
            count=f"{done}/{total}",
            status=_join(speed, loss),
        )
        self._bars.refresh()
        self._next = now + REFRESH

    def _print(self, run: Run, *parts: str) -> None:
        run.console.print(Text(_join(*parts, self._eta(run))), soft_wrap=True)
        self._next = perf_counter() + LINE

    def _images_per_second(self, run: Run) -> str:
        batches = run.batches[self._split]
        images = min((self._before + self._batches) * batches.batch_size, len(batches.split))
        images -= self._before * batches.batch_size
        speed = images / (perf_counter() - self._began)
        return f"{speed:,.0f} img/s" if speed >= 10 else f"{speed:.1f} img/s" if speed else ""

    def _eta(self, run: Run) -> str:
        done = _fraction(run) - self._fraction
        if done <= 0:
            return "eta -:--:--"
        seconds = (perf_counter() - self._started) * (1 - _fraction(run)) / done
        return f"eta {timedelta(seconds=round(seconds))}"


def _fraction(run: Run) -> float:
    """How much of the run is done, 0 to 1, by epochs or by steps, whichever ends it first."""
    epochs = (run.epoch + run.batch_index / run.steps_per_epoch) / run.epochs
    return max(epochs, run.step / run.recipe.max_steps) if run.recipe.max_steps else epochs


def _value(name: str, value: float) -> str:
    return f"{name} {value:#.4g}"


def _join(*parts: str) -> str:
    """One line; control characters in the name of a metric must not reach a terminal."""
    return "".join(c if c.isprintable() else "?" for c in "  ".join(filter(None, parts)))
