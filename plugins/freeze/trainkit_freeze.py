"""Frozen parts of the network."""

from attrs import field
from attrs.validators import ge, min_len, optional
from torch import nn

from trainkit import Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, matching_modules, plugin

__all__ = ["Freeze"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@plugin
class Freeze:
    """Freeze parts of the network, for some epochs or for ever.

    Parameters of the matched modules, and of the modules in them, get no gradient, so that no optimizer moves them:
    neither momentum nor weight decay does. They stay in the optimizer, and take part again when the time is over. A
    parameter that a frozen module shares with another one is frozen.

    Args:
        modules: module paths to match, such as ``stem`` or ``stages.*``: shell patterns, component by component, so
            that ``*`` stands for one component of a path.
        epoch: frozen for so many epochs, at least 1: with 5 the sixth is the first that trains them. By default for
            ever.
        batch_norm: keep the running statistics of batch normalizations in these modules, too, and normalize with them,
            as in evaluation.
    """

    modules: list[str] = field(validator=min_len(1))
    epoch: int | None = field(default=None, validator=optional(ge(1)))
    batch_norm: bool = True
    _parameters: list[nn.Parameter] = field(init=False, factory=list)  # those that the run would train
    _batch_norms: list[nn.Module] = field(init=False, factory=list)

    @hookimpl
    def built(self, run: Run) -> None:
        """Find the parts.

        Raises:
            RecipeError: a pattern matches nothing, there is nothing to freeze in the parts, or nothing is left to
                train.
        """
        matched = matching_modules(run.model, self.modules, "modules").values()
        parameters = dict.fromkeys(p for module in matched for p in module.parameters() if p.requires_grad)
        inner = dict.fromkeys(part for module in matched for part in module.modules())
        self._parameters = list(parameters)
        self._batch_norms = [part for part in inner if self.batch_norm and isinstance(part, BATCH_NORMS)]
        if not (self._parameters or self._batch_norms):
            raise RecipeError(f"'modules': {', '.join(self.modules)}: no parameters there are trained")
        if all(p in parameters for p in run.model.parameters() if p.requires_grad):
            raise RecipeError(f"'modules': {', '.join(self.modules)}: no parameters are left to train; match fewer")

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        """Let the parts train again when the time is over; what another plugin freezes too is frozen after this."""
        if not self._is_frozen(run):
            for parameter in self._parameters:
                parameter.requires_grad_(True)

    @hookimpl
    def train_start(self, run: Run) -> None:
        """Freeze the parts; the network has just been put into training mode."""
        if self._is_frozen(run):
            for parameter in self._parameters:
                parameter.requires_grad_(False)
            for batch_norm in self._batch_norms:
                batch_norm.eval()

    def _is_frozen(self, run: Run) -> bool:
        return self.epoch is None or run.epoch < self.epoch
