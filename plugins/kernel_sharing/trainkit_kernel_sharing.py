"""Kernels shared between convolutions."""

from attrs import field
from attrs.validators import min_len
from torch import nn

from trainkit import Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, matching_modules, plugin

__all__ = ["KernelSharing"]


@plugin
class KernelSharing:
    """Share one kernel among isomorphic convolutions (Azadbakht et al., arXiv:2210.14151).

    Within each matched module, all ``nn.Conv2d`` with the same kernel size, input channels, output channels and groups
    use one parameter, the first one's. Their strides and dilations may differ, and biases are not shared. Modules
    matched apart share nothing with each other. The parameter is stored, counted and updated once; a state dict
    lists it under each of its names.

    Args:
        within: module paths to match, such as ``stages.2`` or ``stages.*``: shell patterns, component by component, so
            that ``*`` stands for one component of a path, or a part of it. Convolutions share within each matched
            module, not across.
    """

    within: list[str] = field(validator=min_len(1))

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Share the kernels in place and print one line for each that is shared.

        Raises:
            RecipeError: a pattern matches no module, or only modules in which there is nothing to share.
        """
        for pattern in self.within:
            lines = []
            for path, module in matching_modules(model, [pattern], "within").items():
                lines += _share(path, module)
            if not lines:
                raise RecipeError(
                    f"'within': there is nothing to share within {pattern!r}: no two convolutions in it have the same "
                    "kernel size, input channels, output channels and groups, or they share their kernel already"
                )
            for line in lines:
                run.console.print(f"kernel_sharing: {line}", soft_wrap=True)
        return model


def _share(path: str, within: nn.Module) -> list[str]:
    """Share kernels among the isomorphic convolutions of one module and describe each that is shared."""
    groups: dict[tuple[object, ...], list[nn.Conv2d]] = {}
    for conv in within.modules():
        if isinstance(conv, nn.Conv2d):
            kind = (conv.kernel_size, conv.in_channels, conv.out_channels, conv.groups)
            groups.setdefault(kind, []).append(conv)
    lines = []
    for first, *others in groups.values():
        replaced = {conv.weight for conv in others} - {first.weight}
        if not replaced:
            continue
        for conv in others:
            conv.weight = first.weight
        height, width = first.kernel_size
        fewer = sum(kernel.numel() for kernel in replaced)
        lines.append(
            f"{path}: {1 + len(others)} convolutions {first.in_channels}->{first.out_channels} {height}x{width} "
            f"share one kernel ({fewer:,} fewer parameters)"
        )
    return lines
