"""Early stopping."""

import math

from attrs import field
from attrs.validators import ge

from trainkit import Run
from trainkit.errors import RecipeError, did_you_mean
from trainkit.plugin import hookimpl, plugin
from trainkit.run import Better, is_better

__all__ = ["EarlyStopping"]


@plugin
class EarlyStopping:
    """Stop when a metric has not become better for some epochs (Prechelt, 1998).

    Whether less or more is better is what the metric's plugin says; what is not a number is never better. The weights
    stay those of the last epoch; a checkpoint plugin keeps the best.

    Args:
        metric: name of the metric: ``loss`` or ``accuracy`` (of the validation split where there is one, else of the
            test split), or with its split, such as ``train_loss``.
        patience: evaluations without a better value after which the run stops; at least 1.
        min_delta: by how much a value must be better than the best so far to count; at least 0.
    """

    metric: str = "loss"
    patience: int = field(default=10, validator=ge(1))
    min_delta: float = field(default=0.0, validator=ge(0))

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        """Ask for a stop when patience is over and epochs are left.

        Raises:
            RecipeError: nothing reports the metric, or what reports it does not say what is better.
        """
        key = run.metric_key(self.metric)
        info = run.metric_info.get(key)
        if info is None:
            if run.recipe.eval_every > 1 and run.epoch + 1 < run.recipe.eval_every:
                return  # not evaluated yet
            known = list(run.metric_info)
            raise RecipeError(
                f"'metric': no plugin reports {key!r}{did_you_mean(key, known)}; known: {', '.join(known) or 'none'}"
            )
        if info.better is None:
            raise RecipeError(f"'metric': the plugin that reports {key!r} does not say whether less or more is better")
        is_last = run.finished or run.epoch + 1 == run.epochs  # and completes the run
        values = [row[key] for row in run.history if key in row]
        if not is_last and key in run.history[-1] and self.waited(values, info.better) >= self.patience:
            run.end(f"early_stopping: no better {key} for {self.patience} evaluations")

    def waited(self, values: list[float], better: Better) -> int:
        """Return how many values came since the last better one; all of them if there never was a number."""
        best = math.nan
        found_at = 0
        for number, value in enumerate(values, start=1):
            improved = is_better(better, value, best) and abs(value - best) > self.min_delta
            if improved or (math.isnan(best) and not math.isnan(value)):
                best, found_at = value, number
        return len(values) - found_at
