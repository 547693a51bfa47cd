"""Early stopping."""

import math

from attrs import field
from attrs.validators import ge

from trainkit import Run
from trainkit.errors import RecipeError, did_you_mean
from trainkit.plugin import hookimpl, plugin
from trainkit.run import is_better

__all__ = ["EarlyStopping"]


@plugin
class EarlyStopping:
    """Stop when a metric has not become better for some epochs (Prechelt, 1998).

    Better is less for metrics whose names end in loss or error, else greater; what is not a number is never better.
    The weights stay those of the last epoch; a checkpoint plugin keeps the best.

    Args:
        metric: name of the metric, such as ``test_loss`` or ``test_accuracy``.
        patience: epochs without a better value after which the run stops; at least 1.
        min_delta: by how much a value must be better than the best so far to count; at least 0.
    """

    metric: str = "test_loss"
    patience: int = field(default=10, validator=ge(1))
    min_delta: float = field(default=0.0, validator=ge(0))

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        """Ask for a stop when patience is over and epochs are left.

        Raises:
            RecipeError: no epoch has reported the metric.
        """
        if not any(self.metric in row for row in run.history):
            known = [name for name in run.history[-1] if name.startswith(("train_", "test_"))]
            raise RecipeError(
                f"'metric': no plugin reports {self.metric!r}{did_you_mean(self.metric, known)}; "
                f"known: {', '.join(known) or 'none'}"
            )
        is_last = run.finished or run.epoch + 1 == run.epochs  # and completes the run
        if not is_last and self.waited(run.history) >= self.patience:
            run.stop(f"early_stopping: no better {self.metric} for {self.patience} epochs")

    def waited(self, history: list[dict[str, float]]) -> int:
        """Return the number of epochs since the metric last became better; all of them if it never had a value."""
        best = math.nan
        found_at = 0
        for number, row in enumerate(history, start=1):
            value = row.get(self.metric, math.nan)
            better = is_better(self.metric, value, best) and abs(value - best) > self.min_delta
            if better or (math.isnan(best) and not math.isnan(value)):
                best, found_at = value, number
        return len(history) - found_at
