"""Checkpoints."""

from time import monotonic

from attrs import field
from attrs.validators import ge

from trainkit import Run
from trainkit.plugin import hookimpl, plugin
from trainkit.run import best_of
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
        best: the metric whose best value so far makes an epoch's weights ``best.pt``: the least value for names that
            end in loss or error, else the greatest. An epoch's end that is the best is saved whatever the intervals.
    """

    every_epochs: int = field(default=1, validator=ge(0))
    every_steps: int = field(default=0, validator=ge(0))
    every_minutes: float = field(default=0.0, validator=ge(0))
    best: str = "test_accuracy"
    _saved_at: float = field(init=False, default=0.0)

    @hookimpl
    def fit_start(self) -> None:
        """Start the clock; a monotonic one, which never goes back."""
        self._saved_at = monotonic()

    @hookimpl
    def safe_point(self, run: Run) -> None:
        """Save what is due."""
        best = run.batch_index == 0 and self._is_best(run)
        if not (best or self._is_due(run)):
            return
        assert run.dir is not None
        data = pack_state(run.state_dict())
        folder = run.dir.path / "checkpoints"
        last, previous, new = folder / "last.pt", folder / "previous.pt", folder / "new.pt"
        folder.mkdir(exist_ok=True)
        atomic_write(new, data)  # whole and on the disk before an older file gives way
        if last.exists():
            last.replace(previous)
        new.replace(last)
        flush_folder(folder)
        if best:
            atomic_write(folder / "best.pt", data)
        self._saved_at = monotonic()

    def _is_due(self, run: Run) -> bool:
        if run.stop_reason is not None or (run.finished and run.batch_index == 0):
            return True
        if run.batch_index == 0 and self.every_epochs and run.epoch % self.every_epochs == 0:
            return True
        if run.batch_index and self.every_steps and run.step % self.every_steps == 0:
            return True
        return self.every_minutes > 0 and monotonic() - self._saved_at >= 60 * self.every_minutes

    def _is_best(self, run: Run) -> bool:
        if self.best not in run.history[-1]:
            if run.epoch == 1:
                known = ", ".join(k for k in run.history[-1] if k.startswith("test_")) or "none"
                run.console.print(f"checkpoint: no metric {self.best!r}, so no best.pt; known: {known}", markup=False)
            return False
        return best_of(run.history).get(self.best, {}).get("epoch") == run.epoch
