"""Parameter groups with rates and decays of their own."""

from fnmatch import fnmatchcase

import attrs
from attrs import field
from attrs.validators import ge, gt, min_len, optional
from torch import nn
from torch.optim import Optimizer

from trainkit import Run
from trainkit.errors import RecipeError, did_you_mean
from trainkit.plugin import hookimpl, plugin

__all__ = ["Group", "ParameterGroups"]


@attrs.define(kw_only=True)
class Group:
    """Some parameters, and what is different for them.

    Args:
        parameters: their names: shell patterns over the whole name, so that ``*`` spans dots too.
        lr_scale: their learning rate is that of the others times this; greater than 0.
        weight_decay: their weight decay, at least 0; None for that of the others.
    """

    parameters: list[str] = field(validator=min_len(1))
    lr_scale: float = field(default=1.0, validator=gt(0))
    weight_decay: float | None = field(default=None, validator=optional(ge(0)))

    def __attrs_post_init__(self) -> None:
        if self.lr_scale == 1 and self.weight_decay is None:
            raise ValueError(f"the group of {', '.join(self.parameters)} needs an lr_scale or a weight_decay")


@plugin
class ParameterGroups:
    """Give parameters a learning rate or a weight decay of their own, by patterns of their names (torch.optim).

    Each of the optimizer's parameter groups is split where some of its parameters are matched. The new group has the
    same options but for its learning rate and weight decay. Schedules keep the proportions of the rates.

    Args:
        groups: each has ``parameters``, a list of names such as ``fc.weight`` or of shell patterns such as
            ``*.bn?.bias`` (``*`` spans dots too), and ``lr_scale`` (greater than 0), ``weight_decay`` (at least 0), or
            both. A parameter belongs to the first group that matches it.
    """

    groups: list[Group] = field(validator=min_len(1))

    @hookimpl
    def transform_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        """Regroup the optimizer's parameters in place; it has no state yet.

        Raises:
            RecipeError: a pattern matches no parameter, a group is left without any, or the optimizer has no weight
                decay.
        """
        free = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for number, group in enumerate(self.groups):
            matched = _matched(run.model, group.parameters, f"groups[{number}].parameters") & free
            if not matched:
                raise RecipeError(
                    f"'groups[{number}].parameters': earlier groups have all parameters that "
                    f"{', '.join(group.parameters)} matches; move it up, or drop it"
                )
            free -= matched
            _split(optimizer, matched, group)
        return optimizer


def _matched(model: nn.Module, patterns: list[str], key: str) -> set[nn.Parameter]:
    """Return the parameters whose names match one of the patterns.

    Raises:
        RecipeError: a pattern matches none.
    """
    named = dict(model.named_parameters(remove_duplicate=False))  # a shared parameter may be given by any of its names
    matched = set()
    for pattern in patterns:
        found = {parameter for name, parameter in named.items() if fnmatchcase(name, pattern)}
        if not found:
            raise RecipeError(f"{key!r}: {pattern!r} matches no parameter{did_you_mean(pattern, named)}")
        matched |= found
    return matched


def _split(optimizer: Optimizer, matched: set[nn.Parameter], options: Group) -> None:
    """Move the matched parameters of each of the optimizer's groups to a group with options of their own."""
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if parameter in matched]
        if not own:
            continue
        changes = {"lr": group["lr"] * options.lr_scale}
        if options.weight_decay is not None:
            if "weight_decay" not in group:
                raise RecipeError(
                    f"'groups': {type(optimizer).__name__} has no weight decay; leave weight_decay out, and set "
                    "lr_scale"
                )
            changes["weight_decay"] = options.weight_decay
        rest = [parameter for parameter in group["params"] if parameter not in matched]
        if rest:
            group["params"] = rest
            optimizer.add_param_group({**group, "params": own, **changes})
        else:
            group.update(changes)
