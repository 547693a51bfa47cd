"""A table of the network."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["ModelSummary", "Part", "Summary", "render", "summarize"]

_NO_LAYERS = (nn.Sequential, nn.ModuleList, nn.Identity)


@attrs.frozen(kw_only=True)
class Part:
    """One part of a network.

    Args:
        path: its module path; empty for what belongs to the network itself and to none of its parts.
        layers: its class; for a ``Sequential``, how many modules of which classes it holds.
        output: shape of its output for one image, without the batch dimension; empty where that is not one tensor.
        kernels: distinct kernel sizes of the convolutions and pooling in it, in order of appearance.
        channels: distinct output channels of the convolutions in it, in order of appearance.
        parameters: number of values in its parameters, without those shared with an earlier part.
        flops: operations of a forward and backward pass of one image.
    """

    path: str
    layers: dict[str, int]
    output: tuple[int, ...] = ()
    kernels: list[tuple[int, ...]] = []
    channels: list[int] = []
    parameters: int
    flops: int


@attrs.frozen(kw_only=True)
class Summary:
    """A network.

    Args:
        parts: its parts, in the order in which they are registered.
        layers: number of modules by class, without containers and identities.
        parameters: number of values in its parameters, shared ones once.
        trainable: how many of them are trained.
        shared: how many more there would be if no parameter were shared.
        flops: operations of a forward and backward pass of one image, two for each multiply-add, as torch's
            FlopCounterMode counts them: convolutions, matrix products and attention.
    """

    parts: list[Part]
    layers: dict[str, int]
    parameters: int
    trainable: int
    shared: int
    flops: int


@plugin
class ModelSummary:
    """Print layers, shapes, parameters and GFLOP of the network when a run starts."""

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Print the table."""
        size = run.data.shape[1:]
        for _, step in run.transforms["train"].steps:
            size = step.out_size(size)
        run.console.print(render(summarize(run.model, (run.data.shape[0], *size)), run.recipe.name))


def summarize(model: nn.Module, shape: tuple[int, int, int]) -> Summary:
    """Describe a network by its top-level modules, or by what is in them where they only hold other containers.

    Shapes and operations come from a pass of one image through a copy in evaluation mode on the meta device, where
    nothing is computed; the network itself is not touched.

    Args:
        model: a network from images [N, C, H, W] to one tensor, such as logits.
        shape: channels, height and width of an image.
    """
    trial = copy.deepcopy(model).to("meta").eval()
    outputs: dict[nn.Module, tuple[int, ...]] = {}

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        # An identity must not return the tensor that it got, or the counter never sees its backward pass end.
        return tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in inputs)

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        outputs[module] = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()

    for _, part in _parts(trial):
        part.register_forward_pre_hook(enter)
        part.register_forward_hook(leave)
    with FlopCounterMode(display=False) as counter:
        trial(torch.zeros(1, *shape, device="meta")).sum().backward()

    parts: list[Part] = []
    left, flops = set(model.parameters()), counter.get_total_flops()
    for path, module in _parts(model):
        own, inside = left & set(module.parameters()), list(module.modules())
        kernels = [m.kernel_size for m in inside if hasattr(m, "kernel_size")]
        part = Part(
            path=path,
            layers=_contents(module),
            output=outputs.get(trial.get_submodule(path), ()),
            kernels=list(dict.fromkeys(k if isinstance(k, tuple) else (k, k) for k in kernels)),
            channels=list(dict.fromkeys(m.out_channels for m in inside if isinstance(m, nn.Conv2d))),
            parameters=_count(own),
            flops=sum(counter.get_flop_counts().get(f"{type(trial).__name__}.{path}", {}).values()),
        )
        parts.append(part)
        left, flops = left - own, flops - part.flops
    if left or flops:
        parts.append(Part(path="", layers=_contents(model), parameters=_count(left), flops=flops))
    total = _count(model.parameters())
    return Summary(
        parts=parts,
        layers=Counter(type(m).__name__ for m in list(model.modules())[1:] if not isinstance(m, _NO_LAYERS)),
        parameters=total,
        trainable=_count(p for p in model.parameters() if p.requires_grad),
        shared=_count(p for _, p in model.named_parameters(remove_duplicate=False)) - total,
        flops=counter.get_total_flops(),
    )


def render(summary: Summary, title: str) -> Table:
    """Lay a summary out as a table for 100 columns, with totals and all layers below it."""
    total, gflop = f"{summary.parameters:,}", f"{summary.flops / 1e9:,.2f}"
    table = Table("module", "layers", "output", "kernels", "channels", title=title, box=box.SIMPLE, show_footer=True)
    table.add_column("parameters", total, justify="right")
    table.add_column("GFLOP", gflop, justify="right")
    for part in summary.parts:
        table.add_row(
            part.path,
            _listed(part.layers),
            _times(part.output),
            ", ".join(map(_times, part.kernels)),
            ", ".join(map(str, part.channels)),
            f"{part.parameters:,}" if part.parameters else "",
            f"{part.flops / 1e9:,.2f}" if part.flops else "",
        )
    trainable = "all trainable" if summary.trainable == summary.parameters else f"{summary.trainable:,} trainable"
    saved = f", {summary.shared:,} saved by sharing" if summary.shared else ""
    table.caption = f"{total} parameters, {trainable}{saved}; {gflop} GFLOP forward and backward an image\n{_listed(summary.layers)}"
    table.title_justify = table.caption_justify = "left"
    return table


def _listed(layers: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in layers.items())


def _parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_children():
        children = list(module.children())
        # a ModuleList is never called itself
        if isinstance(module, nn.ModuleList) or (children and all(type(child) is nn.Sequential for child in children)):
            yield from _parts(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _contents(module: nn.Module) -> Counter[str]:
    if isinstance(module, nn.Sequential):
        return sum(map(_contents, module.children()), Counter())
    return Counter([type(module).__name__])


def _times(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
