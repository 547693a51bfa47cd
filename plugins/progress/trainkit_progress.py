"""Progress for people."""

from collections.abc import Mapping
from datetime import timedelta
from math import inf
from time import perf_counter
from typing import ClassVar

from attrs import field
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["Progress"]

REFRESH = 0.25  # seconds between two pictures of the bars
LINE = 30.0  # seconds between two lines within an epoch
LOSS = 5.0  # seconds between two looks at the recorded losses: each waits for the device once


@plugin
class Progress:
    """Show how far a run is: live bars on a terminal, plain lines elsewhere.

    A step costs a look at the clock. The loss shown within an epoch is the last that a plugin recorded as ``loss``. The
    bars are drawn between steps, not by a thread of their own: worker processes could not be forked safely beside it.
    """

    observer: ClassVar = True
    claims: ClassVar = ("terminal",)

    _bars: Bars | None = field(init=False, default=None)
    _loss: float | None = field(init=False, default=None)
    _speed: str = field(init=False, default="")  # of the last training pass, as shown
    _split: str = field(init=False, default="train")  # what is passed over now
    _before: int = field(init=False, default=0)  # batches of it that were done when the run was resumed
    _batches: int = field(init=False, default=0)  # batches of it since
    _began: float = field(init=False, default=0.0)
    _start: tuple[float, float] = field(init=False, default=(0.0, 0.0))  # when the run began, and how far it was then
    _next: float = field(init=False, default=inf)  # when to show something; never, outside of a run
    _next_loss: float = field(init=False, default=0.0)

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Start the clock, and the bars."""
        self._start = perf_counter(), _fraction(run)
        self._begin("train", run.batch_index)
        self._next = self._began + LINE
        if run.console.is_interactive:
            columns = TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[status]}", markup=False)
            self._bars = Bars(*columns, console=run.console, auto_refresh=False)
            for name in ("epoch", "train"):
                self._bars.add_task(name, total=1.0, status="")
            self._show(run)
            self._bars.start()

    @hookimpl
    def train_start(self, run: Run) -> None:
        """Begin to count training batches, on a resume inside an epoch from where it goes on."""
        self._begin("train", run.batch_index)

    @hookimpl
    def eval_start(self, run: Run) -> None:
        """Begin to count the batches of a split that is evaluated."""
        if self._split == "train":
            self._speed = self._speed_so_far(run)
        self._begin(run.split, 0)

    @hookimpl
    def forward_end(self, run: Run) -> None:
        """Count a batch and, when it is time, show it."""
        self._batches += 1
        if perf_counter() >= self._next:
            self._show(run)

    @hookimpl
    def log(self, record: dict[str, float]) -> None:
        """Keep the last loss of a batch."""
        self._loss = record.get("loss", self._loss)

    @hookimpl
    def epoch_end(self, run: Run, metrics: dict[str, float]) -> None:
        """Print the line of the epoch; on a terminal it stays above the bars."""
        shown = {name: value for name, value in metrics.items() if _is_shown(run, name)}
        epoch = f"epoch {round(metrics['epoch'], 2):g}/{run.epochs}"
        if self._bars is None:
            values = [_value(name, value) for name, value in shown.items()]
            self._print(run, epoch, *values, f"lr {metrics['lr']:g}", self._speed)
        else:
            run.console.print(_join(epoch, *_by_split(run, shown)), markup=False, highlight=False)

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

    def _begin(self, split: str, batch: int) -> None:
        self._split, self._before, self._batches, self._began = split, batch, 0, perf_counter()

    def _show(self, run: Run) -> None:
        now = perf_counter()
        if run.pending and now >= self._next_loss:
            run.flush_log()
            self._next_loss = now + LOSS
        done = self._before + self._batches
        total = run.batches_per_epoch if self._split == "train" else len(run.batches[self._split])
        where = f"epoch {min(run.epoch + 1, run.epochs)}/{run.epochs}", f"{self._split} {done}/{total}"
        loss = self._loss if self._split == "train" else None  # no loss is recorded in an evaluation
        pace = _join(self._speed_so_far(run), _value("loss", loss) if loss is not None else "")
        if self._bars is None:
            self._print(run, *where, pace)
            return
        last = run.history[-1] if run.history else {}
        shown = [name for name in last if _is_shown(run, name) and not name.startswith("train_")]
        status = _join(self._eta(run), *(_value(name, last[name]) for name in shown))
        epochs, batches = self._bars.task_ids
        self._bars.update(epochs, description=where[0], completed=_fraction(run), status=status)
        self._bars.update(batches, description=where[1], total=total, completed=done, status=pace)
        self._bars.refresh()
        self._next = now + REFRESH

    def _print(self, run: Run, *parts: str) -> None:
        run.console.out(_join(*parts, self._eta(run)), highlight=False)
        self._next = perf_counter() + LINE

    def _speed_so_far(self, run: Run) -> str:
        size = run.batches[self._split].batch_size
        images = run.images_per_epoch if self._split == "train" else len(run.batches[self._split].split)
        seen = min((self._before + self._batches) * size, images) - min(self._before * size, images)
        speed = seen / ((perf_counter() - self._began) or inf)
        return f"{speed:,.0f} img/s" if speed >= 10 else f"{speed:.1f} img/s"

    def _eta(self, run: Run) -> str:
        (start, before), now = self._start, _fraction(run)
        if now <= before:
            return "eta -:--:--"
        return f"eta {timedelta(seconds=round((perf_counter() - start) * (1 - now) / (now - before)))}"


def _fraction(run: Run) -> float:
    """How much of the run is done, 0 to 1, by epochs or by steps, whichever ends it first."""
    epochs = (run.epoch + run.batch_index / run.batches_per_epoch) / run.epochs
    return max(epochs, run.step / run.recipe.max_steps) if run.recipe.max_steps else epochs


def _is_shown(run: Run, name: str) -> bool:
    """Tell whether the plugin that reports a metric wants it on the line."""
    info = run.metric_info.get(name)
    return info is not None and info.progress


def _by_split(run: Run, metrics: Mapping[str, float]) -> list[str]:
    """Return metrics with the name of each split once, to fit into a terminal: ``train loss 0.542 accuracy 83.1``."""
    parts: dict[str, str] = {}
    for name, value in metrics.items():
        split = next((split for split in run.data.splits if name.startswith(f"{split}_")), "")
        shown = {"validation": "val"}.get(split, split)
        parts[split] = f"{parts.get(split, shown)} {_value(name.removeprefix(f'{split}_'), value)}"
    return [part.strip() for part in parts.values()]


def _value(name: str, value: float) -> str:
    return f"{name} {value:#.4g}"


def _join(*parts: str) -> str:
    """One line; control characters in the name of a metric must not reach a terminal."""
    return "".join(c if c.isprintable() else "?" for c in "  ".join(filter(None, parts)))
