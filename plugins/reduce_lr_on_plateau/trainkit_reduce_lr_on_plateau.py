"""Learning rate by a metric."""

from typing import ClassVar, Literal

from attrs import field
from attrs.validators import and_, ge, gt, lt
from torch.optim import Optimizer, lr_scheduler

from trainkit import Run, Schedule
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin

__all__ = ["ReduceLROnPlateau"]


@plugin
class ReduceLROnPlateau:
    """Lower the learning rate when a metric stops improving, as torch's ReduceLROnPlateau does.

    It looks at the metric after each evaluation. Whether less or more is better is what the metric's plugin says, so
    there is no ``mode``; the other options are those of ``torch.optim.lr_scheduler.ReduceLROnPlateau``, with its
    defaults.

    Args:
        metric: name of the metric: ``loss`` or ``accuracy`` (of the validation split where there is one, else of the
            test split), or with its split, such as ``train_loss``.
        factor: the learning rate is multiplied by it; between 0 and 1.
        patience: evaluations without a better value that change nothing; after one more the rate is lowered.
        threshold: by how much a value must be better than the best so far to count; at least 0.
        threshold_mode: whether `threshold` is relative to the best value, ``rel``, or an amount, ``abs``.
        cooldown: evaluations after a lowering that do not count; at least 0.
        min_lr: the lowest learning rate; or a list, one for each parameter group of the optimizer.
        eps: a lowering by less than this is left out; at least 0.
    """

    claims: ClassVar[tuple[str, ...]] = ("lr_schedule",)

    metric: str = "loss"
    factor: float = field(default=0.1, validator=and_(gt(0), lt(1)))
    patience: int = field(default=10, validator=ge(0))
    threshold: float = field(default=1e-4, validator=ge(0))
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = field(default=0, validator=ge(0))
    min_lr: int | float | list[float] = 0
    eps: float = field(default=1e-8, validator=ge(0))
    _scheduler: lr_scheduler.ReduceLROnPlateau = field(init=False)

    @hookimpl
    def scheduler(self, optimizer: Optimizer) -> Schedule:
        """Return torch's scheduler, for now one for which less is better."""
        self._scheduler = self._made(optimizer, "min")
        return Schedule(self._scheduler, "epoch", metric=self.metric)

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        """Learn what is better once the metric is reported, which is before the scheduler sees its first value.

        Raises:
            RecipeError: the plugin that reports the metric does not say what is better.
        """
        key = run.metric_key(self.metric)
        info = run.metric_info.get(key)
        if info is None:  # not evaluated yet
            return
        if info.better is None:
            raise RecipeError(f"'metric': the plugin that reports {key!r} does not say whether less or more is better")
        mode: Literal["min", "max"] = "min" if info.better == "less" else "max"
        if mode != self._scheduler.mode:
            self._scheduler.load_state_dict(self._made(run.optimizer, mode).state_dict())

    def _made(self, optimizer: Optimizer, mode: Literal["min", "max"]) -> lr_scheduler.ReduceLROnPlateau:
        return lr_scheduler.ReduceLROnPlateau(
            optimizer,
            mode,
            factor=self.factor,
            patience=self.patience,
            threshold=self.threshold,
            threshold_mode=self.threshold_mode,
            cooldown=self.cooldown,
            min_lr=self.min_lr,
            eps=self.eps,
        )
