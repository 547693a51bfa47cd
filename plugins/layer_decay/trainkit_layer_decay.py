"""Learning rates by depth."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from attrs import field
from attrs.validators import and_, gt, le
from torch import nn
from torch.optim import Optimizer

from trainkit import Run
from trainkit.errors import RecipeError, did_you_mean
from trainkit.plugin import hookimpl, plugin

__all__ = ["LayerDecay", "layers_of"]

CONTAINERS = (nn.Sequential, nn.ModuleList)


@plugin
class LayerDecay:
    """Lower the learning rate from the last layer to the first, for fine-tuning (Clark et al., ICLR 2020).

    The last of L layers keeps the optimizer's learning rate, and layer i, counted from 1, has that times
    ``decay ** (L - i)``. Each parameter group of the optimizer is split into one group a layer with the same options
    otherwise, and a scheduler scales all of them.

    Args:
        decay: the learning rate of a layer as a part of the next one's; greater than 0, at most 1.
        groups: the layers in order from the input, each a list of the names of its parameters, such as
            ``[["stem.*"], ["stages.0.*"], ["stages.*", "fc.*"]]``: shell patterns over the whole name, so ``*`` spans
            dots too. A parameter is of the first layer that it matches. By default the layers are timm's, where the
            network has a ``group_matcher``, else its modules in order.
    """

    conflicts: ClassVar = ("one_cycle_lr",)  # it sets one learning rate for all groups

    decay: float = field(default=0.75, validator=and_(gt(0), le(1)))
    groups: list[list[str]] = field(factory=list)

    @hookimpl
    def transform_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        """Regroup the optimizer's parameters in place; it has no state yet.

        Raises:
            RecipeError: `groups` lacks a parameter or names none, or the network is a single layer.
        """
        layers = self._layers(run.model)
        last = max(layers.values())
        if last == 0:
            raise RecipeError(
                "all parameters are of one layer, so no learning rate is lowered; name layers in 'groups'"
            )
        for group in list(optimizer.param_groups):
            by_layer: dict[int, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_layer.setdefault(layers[parameter], []).append(parameter)
            # The group itself becomes the last layer's: records show the learning rate of the first group.
            first, *others = sorted(by_layer, reverse=True)
            lr = group["lr"]
            group.update(params=by_layer[first], lr=lr * self.decay ** (last - first))
            for layer in others:
                scaled = {**group, "params": by_layer[layer], "lr": lr * self.decay ** (last - layer)}
                optimizer.add_param_group(scaled)
        lowest = self.decay**last
        said = f"layer_decay: {last + 1} layers; the first has {lowest:.3g} times the learning rate of the last"
        run.console.print(said, markup=False, highlight=False, soft_wrap=True)
        return optimizer

    def _layers(self, model: nn.Module) -> dict[nn.Parameter, int]:
        """Return the layer of each parameter, counted from 0; a shared one is of the first of its layers."""
        if self.groups:
            return _matched(dict(model.named_parameters()), self.groups)
        return layers_of(model)


def layers_of(model: nn.Module) -> dict[nn.Parameter, int]:
    """Return the layer of each parameter of a network, counted from 0 from the input on.

    A network of timm says itself what its layers are. Of any other each child is a layer, in order; a Sequential or
    ModuleList stands for its own children. A child that has neither kernels nor matrices, such as a normalization,
    belongs to the layer before it, and parameters of the network itself, such as position embeddings, to the first.
    """
    named = dict(model.named_parameters())
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        of_name: Mapping[str, int] = group_parameters(model, matcher(coarse=False), reverse=True)
        return {parameter: of_name[name] for name, parameter in named.items()}
    layers = dict.fromkeys(model.parameters(recurse=False), 0)
    layer = -1
    for module in _modules(model):
        parameters = list(module.parameters())
        if any(parameter.ndim > 1 for parameter in parameters):
            layer += 1
        for parameter in parameters:
            layers.setdefault(parameter, max(layer, 0))
    return layers


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        if isinstance(child, CONTAINERS):
            yield from _modules(child)
        else:
            yield child


def _matched(named: Mapping[str, nn.Parameter], groups: list[list[str]]) -> dict[nn.Parameter, int]:
    """Return the layer of each parameter by the first pattern that its name matches."""
    layers: dict[nn.Parameter, int] = {}
    for layer, patterns in enumerate(groups):
        for pattern in patterns:
            found = [parameter for name, parameter in named.items() if fnmatchcase(name, pattern)]
            if not found:
                raise RecipeError(f"'groups': {pattern!r} matches no parameter{did_you_mean(pattern, named)}")
            for parameter in found:
                layers.setdefault(parameter, layer)
    left = [name for name, parameter in named.items() if parameter not in layers]
    if left:
        raise RecipeError(f"'groups': {left[0]} is of no layer; name it, or end with a layer of all others, ['*']")
    return layers
