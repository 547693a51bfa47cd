"""Convolutions that start as the identity."""

from attrs import field
from attrs.validators import min_len
from torch import nn

from trainkit import Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, matching_modules, plugin

__all__ = ["Dirac"]


@plugin
class Dirac:
    """Start convolutions as the identity (Zagoruyko and Komodakis, arXiv:1706.00388; Jordan, arXiv:2404.00498).

    The first output channels of a convolution, as many as it has input channels, begin as copies of these: their
    kernels are those of torch's ``nn.init.dirac_``. Further output channels, and the bias, keep their initial values.
    So what is in an image reaches deep layers from the first step on.

    Args:
        modules: module paths to match, such as ``stages.*.*.conv2``: shell patterns, component by component, so that
            ``*`` stands for one component of a path, or a part of it. All convolutions within a matched module count.
    """

    modules: list[str] = field(validator=min_len(1))

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Set the kernels in place.

        Raises:
            RecipeError: a pattern matches nothing, or only modules without convolutions.
        """
        for pattern in self.modules:
            matched = matching_modules(model, [pattern], "modules").values()
            convs = [part for module in matched for part in module.modules() if isinstance(part, CONVS)]
            if not convs:
                raise RecipeError(f"'modules': there is no convolution in what {pattern!r} matches")
            for conv in convs:
                _start_as_identity(conv)
        return model


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _start_as_identity(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    """Set the kernels of the first output channels of each group."""
    for kernels in conv.weight.detach().chunk(conv.groups):
        nn.init.dirac_(kernels[: kernels.shape[1]])
