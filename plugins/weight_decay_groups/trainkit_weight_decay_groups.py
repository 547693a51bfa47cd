"""Parameter groups without weight decay."""

from fnmatch import fnmatchcase

from attrs import field
from torch import nn
from torch.optim import Optimizer

from trainkit import Run
from trainkit.errors import RecipeError, did_you_mean
from trainkit.plugin import hookimpl, plugin

__all__ = ["WeightDecayGroups"]


@plugin
class WeightDecayGroups:
    """No weight decay on biases and normalization parameters (He et al., CVPR 2019).

    Each parameter group of the optimizer that has a weight decay is split in two: parameters with at most one
    dimension, and those named by `skip`, go to a group of weight decay 0 with the same options otherwise.

    Args:
        skip: names of further parameters without decay, such as ``fc.weight`` or ``stem.*``: shell patterns over the
            whole name, so ``*`` spans dots too.
    """

    skip: list[str] = field(factory=list)

    @hookimpl
    def transform_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        """Regroup the optimizer's parameters in place; it has no state yet.

        Raises:
            RecipeError: a pattern matches no parameter, or there is no weight decay to take away.
        """
        undecayed = self._undecayed(run.model)
        regrouped = False
        for group in list(optimizer.param_groups):
            without = [parameter for parameter in group["params"] if parameter in undecayed]
            rest = [parameter for parameter in group["params"] if parameter not in undecayed]
            if not without or not group.get("weight_decay"):
                continue
            regrouped = True
            if rest:
                group["params"] = rest
                optimizer.add_param_group({**group, "params": without, "weight_decay": 0.0})
            else:
                group["weight_decay"] = 0.0
        if not regrouped:
            raise RecipeError(
                "there is no weight decay to take away: the optimizer has none, or it has no parameter with at most "
                "one dimension or named by `skip`; set its weight_decay, or drop weight_decay_groups"
            )
        return optimizer

    def _undecayed(self, model: nn.Module) -> set[nn.Parameter]:
        """Return the parameters that get no weight decay."""
        # A shared parameter has several names, and `skip` may give any of them.
        named = dict(model.named_parameters(remove_duplicate=False))
        undecayed = {parameter for parameter in named.values() if parameter.ndim <= 1}
        for pattern in self.skip:
            found = {parameter for name, parameter in named.items() if fnmatchcase(name, pattern)}
            if not found:
                raise RecipeError(f"'skip': {pattern!r} matches no parameter{did_you_mean(pattern, named)}")
            undecayed |= found
        return undecayed
