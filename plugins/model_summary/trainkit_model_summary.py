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
from trainkit.run import count_parameters

__all__ = ["ModelSummary", "Part", "Summary", "render", "summarize"]


@attrs.frozen
class Part:
    """One part of a network."""

    path: str  #: its module path; empty for what belongs to the network itself and to none of its parts
    layers: dict[str, int]  #: its class; for a ``Sequential``, what it holds: number of modules by class
    output: tuple[int, ...]  #: shape of its output for one image, without N; empty where that is not one tensor
    kernels: list[tuple[int, ...]]  #: distinct kernel sizes of its convolutions, in order of appearance
    channels: list[int]  #: distinct output channels of its convolutions, in order of appearance
    parameters: int  #: number of trainable values, without those that it shares with an earlier part
    flops: int  #: operations of a forward and backward pass of one image


@attrs.frozen
class Summary:
    """A network. Parameters are counted as everywhere in trainkit: values that are trained, shared ones once."""

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
        shape = run.image_shape
        run.console.print(render(summarize(run.model, shape), f"{run.recipe.name}, {_times(shape)} images"))


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

    parts: list[Part] = []
    left = {p for p in model.parameters() if p.requires_grad}
    for path, module in _parts(model):
        own = left & set(module.parameters())
        left -= own
        convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        kernels = list(dict.fromkeys(conv.kernel_size for conv in convs))
        channels = list(dict.fromkeys(conv.out_channels for conv in convs))
        output = outputs.get(trial.get_submodule(path), ())
        flops = sum(counter.get_flop_counts().get(f"{type(trial).__name__}.{path}", {}).values())
        parts.append(Part(path, _layers(_opened(module)), output, kernels, channels, _count(own), flops))
    flops = counter.get_total_flops() - sum(part.flops for part in parts)
    if left or flops:
        parts.append(Part("", {type(model).__name__: 1}, (), [], [], _count(left), flops))
    parameters = count_parameters(model)
    used = _count(p for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)
    return Summary(parts, _layers(list(model.modules())[1:]), parameters, used - parameters, counter.get_total_flops())


def render(summary: Summary, title: str) -> Table:
    """Lay a summary out as a table for 100 columns."""
    unshared = f"; {summary.parameters + summary.shared:,} without sharing" if summary.shared else ""
    notes = f"{_listed(summary.layers)}\nparameters: trainable{unshared}\nGFLOP: one image, forward and backward"
    table = Table("module", "layers", "output", "kernels", "channels", title=title, caption=notes, box=box.SIMPLE)
    table.title_justify = table.caption_justify = "left"
    table.show_footer, table.columns[0].footer, table.columns[1].overflow = True, "total", "fold"
    table.add_column("parameters", f"{summary.parameters:,}", justify="right")
    table.add_column("GFLOP", f"{summary.flops / 1e9:,.2f}", justify="right")
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
    return table


def _parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_children():
        held = {type(child) for child in module.children()}
        if isinstance(module, nn.ModuleList) or held == {nn.Sequential}:  # a ModuleList itself is never called
            yield from _parts(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _opened(module: nn.Module) -> list[nn.Module]:
    return [m for c in module.children() for m in _opened(c)] if isinstance(module, nn.Sequential) else [module]


def _layers(modules: Iterable[nn.Module]) -> dict[str, int]:
    return Counter(type(m).__name__ for m in modules if not isinstance(m, (nn.Sequential, nn.ModuleList, nn.Identity)))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _listed(layers: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in layers.items())


def _times(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))
