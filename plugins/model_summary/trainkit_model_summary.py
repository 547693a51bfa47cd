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


@attrs.frozen(kw_only=True)
class Part:
    """One part of a network."""

    path: str  #: its module path; empty for what belongs to the network itself and to none of its parts
    layers: dict[str, int]  #: its class; of a ``Sequential`` how many modules of which classes it holds
    output: tuple[int, ...] = ()  #: shape of its output for one image, without N; empty where that is not one tensor
    kernels: tuple[tuple[int, ...], ...] = ()  #: distinct kernel sizes of its convolutions, in order of appearance
    channels: tuple[int, ...] = ()  #: distinct output channels of its convolutions, ascending
    parameters: int  #: number of trainable values, without those that it shares with an earlier part
    flops: int  #: operations of a forward and backward pass of one image


@attrs.frozen(kw_only=True)
class Summary:
    """A network. Parameters are counted as everywhere in trainkit: values that are trained, shared ones once."""

    shape: tuple[int, int, int]  #: channels, height and width of the images
    parts: list[Part]  #: in the order in which they are registered
    layers: dict[str, int]  #: number of modules by class, without containers and identities
    parameters: int  #: number of trainable values
    shared: int  #: how many more there would be if no parameter were shared
    flops: int  #: operations of a forward and backward pass of one image, as torch's FlopCounterMode counts them


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
    """Describe a network by its top-level modules; a module that only holds containers is replaced by these.

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

    for _, traced in _parts(trial):
        traced.register_forward_pre_hook(enter)
        traced.register_forward_hook(leave)
    with FlopCounterMode(display=False) as counter:
        trial(torch.zeros(1, *shape, device="meta")).sum().backward()
    counts, name = counter.get_flop_counts(), type(trial).__name__

    parts: list[Part] = []
    left, flops = {p for p in model.parameters() if p.requires_grad}, counter.get_total_flops()
    for path, module in _parts(model):
        own = left & set(module.parameters())
        convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        part = Part(
            path=path,
            layers=_contents(module),
            output=outputs.get(trial.get_submodule(path), ()),
            kernels=tuple(dict.fromkeys(conv.kernel_size for conv in convs)),
            channels=tuple(sorted({conv.out_channels for conv in convs})),
            parameters=sum(p.numel() for p in own),
            flops=sum(counts.get(f"{name}.{path}", {}).values()),
        )
        parts.append(part)
        left, flops = left - own, flops - part.flops
    if left or flops:
        parts.append(Part(path="", layers={name: 1}, parameters=sum(p.numel() for p in left), flops=flops))

    total = _count(model.parameters())
    _, *below = model.modules()
    return Summary(
        shape=shape,
        parts=parts,
        layers=Counter(
            type(m).__name__ for m in below if not isinstance(m, (nn.Sequential, nn.ModuleList, nn.Identity))
        ),
        parameters=total,
        shared=_count(p for _, p in model.named_parameters(remove_duplicate=False)) - total,
        flops=counter.get_total_flops(),
    )


def render(summary: Summary, title: str) -> Table:
    """Lay a summary out as a table for 100 columns."""
    total = f"{summary.parameters:,}"
    table = Table("module", "layers", "output", "kernels", "channels", title=title, box=box.SIMPLE, show_footer=True)
    table.add_column("parameters", total, justify="right")
    table.add_column("GFLOP", f"{summary.flops / 1e9:,.2f}", justify="right")
    for part in summary.parts:
        table.add_row(
            part.path,
            _listed(part.layers),
            _times(part.output),
            ", ".join(map(_times, part.kernels)),
            "-".join(map(str, part.channels[:1] + part.channels[1:][-1:])),
            f"{part.parameters:,}" if part.parameters else "",
            f"{part.flops / 1e9:,.2f}" if part.flops else "",
        )
    shared = f", {summary.shared:,} fewer than without sharing" if summary.shared else ""
    table.caption = (
        f"{_listed(summary.layers)}\nGFLOP: forward and backward of one {_times(summary.shape)} image\n"
        f"{total} trainable parameters{shared}"
    )
    table.title_justify = table.caption_justify = "left"
    return table


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


def _listed(layers: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in layers.items())


def _times(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))
