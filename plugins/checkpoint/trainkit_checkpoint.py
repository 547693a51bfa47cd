"""Checkpoints."""

from time import monotonic
from typing import ClassVar

from attrs import field
from attrs.validators import ge

from trainkit import Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.run import is_best_epoch
from trainkit.rundir import atomic_write, flush_folder, pack_state

__all__ = ["Checkpoint"]


@plugin
class Checkpoint:
    """Save the run at safe points: last, the one before it, and best; each whole or not at all.

    Whatever the intervals say, a run that ends or is asked to stop is saved.

    Args:
        every_epochs: save after so many epochs; 0 for never.
        every_steps: save after so many optimizer steps; 0 for never.
        every_minutes: save when so many minutes have passed since the last time; 0 for never.
        keep_every: keep a copy, ``epoch-<number>.pt``, after every so many epochs; 0 for none. From these, others can
            replay parts of the run.
        best: the metric whose best value so far makes an epoch's weights ``best.pt``: a name such as ``accuracy``, of
            the validation split where there is one, else of the test split; or with its split, such as ``train_loss``.
            An epoch's end that is the best is saved whatever the intervals.
    """

    claims: ClassVar = ("checkpoints",)
    without_effect: ClassVar = ("every_epochs", "every_steps", "every_minutes", "keep_every")

    every_epochs: int = field(default=1, validator=ge(0))
    every_steps: int = field(default=0, validator=ge(0))
    every_minutes: float = field(default=0.0, validator=ge(0))
    keep_every: int = field(default=0, validator=ge(0))
    best: str = "accuracy"
    _saved_at: float = field(init=False, default=0.0)
    _told: bool = field(init=False, default=False)  # that the metric is not reported

    @hookimpl
    def fit_start(self) -> None:
        """Start the clock; a monotonic one, which never goes back."""
        self._saved_at = monotonic()

    @hookimpl
    def safe_point(self, run: Run) -> None:
        """Save what is due."""
        best = run.epoch_ended and self._is_best(run)
        complete = run.epoch_ended and run.batch_index == 0  # not cut short by max_steps
        kept = bool(complete and self.keep_every and run.epoch % self.keep_every == 0)
        if run.rank > 0 or not (best or kept or self._is_due(run)):
            return
        assert run.dir is not None
        data = pack_state(run.state_dict())
        folder = run.dir.path / "checkpoints"
        last, previous, new = folder / "last.pt", folder / "previous.pt", folder / "new.pt"
        folder.mkdir(exist_ok=True)
        # Before last.pt: a run that is killed in between continues from an earlier one and comes here again. After
        # it, nothing would ever write best.pt of this epoch.
        if best:
            atomic_write(folder / "best.pt", data)
        if kept:
            atomic_write(folder / f"epoch-{run.epoch}.pt", data)
        atomic_write(new, data)  # whole and on the disk before an older file gives way
        if last.exists():
            last.replace(previous)
        new.replace(last)
        flush_folder(folder)
        self._saved_at = monotonic()

    def _is_due(self, run: Run) -> bool:
        if run.is_stopping() or run.finished:
            return True
        if run.batch_index == 0 and self.every_epochs and run.epoch % self.every_epochs == 0:
            return True
        if run.batch_index and self.every_steps and run.step % self.every_steps == 0:
            return True
        return self.every_minutes > 0 and monotonic() - self._saved_at >= 60 * self.every_minutes

    def _is_best(self, run: Run) -> bool:
        """Tell whether the epoch that has just ended is the best so far.

        Raises:
            RecipeError: no plugin reports the metric, or none says whether less or more of it is better.
        """
        key = run.metric_key(self.best)
        info = run.metric_info.get(key)
        evaluated = any(name.startswith(f"{run.selection_split}_") for name in run.history[-1])
        if info is None and evaluated and not self._told:
            self._told = True
            known = [name for name, other in run.metric_info.items() if other.better is not None]
            run.console.print(
                f"checkpoint: no plugin reports {key!r}, so there is no best.pt; known: {', '.join(known) or 'none'}",
                markup=False,
                soft_wrap=True,
            )
        if info is not None and info.better is None:
            raise RecipeError(f"'best': the plugin that reports {key!r} does not say whether less or more is better")
        return is_best_epoch(run, key)
