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
    """One part of a network.

    Args:
        path: its module path; empty for what belongs to the network itself and to none of its parts.
        layers: its class; for a ``Sequential``, how many modules of which classes it contains.
        output: shape of its output for one image, without the batch dimension; empty where that is not one tensor.
        kernels: distinct kernel sizes of the convolutions and pooling in it, in order of appearance.
        channels: distinct output channels of the convolutions in it, in order of appearance.
        parameters: number of values in its parameters, without those that an earlier part shares and has counted.
        flops: operations of a forward and backward pass of one image.
    """

    path: str
    layers: dict[str, int]
    output: tuple[int, ...] = ()
    kernels: tuple[tuple[int, ...], ...] = ()
    channels: tuple[int, ...] = ()
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

    parts: tuple[Part, ...]
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

    rows: list[Part] = []
    left = set(model.parameters())
    for (path, module), (_, traced) in zip(_parts(model), _parts(trial), strict=True):
        inside, own = list(module.modules()), left & set(module.parameters())
        left -= own
        row = Part(
            path=path,
            layers=_contents(module),
            output=outputs.get(traced, ()),
            kernels=tuple(dict.fromkeys(_pair(m.kernel_size) for m in inside if hasattr(m, "kernel_size"))),
            channels=tuple(dict.fromkeys(m.out_channels for m in inside if isinstance(m, nn.Conv2d))),
            parameters=_count(own),
            flops=sum(counter.get_flop_counts().get(f"{type(trial).__name__}.{path}", {}).values()),
        )
        rows.append(row)
    flops = counter.get_total_flops() - sum(row.flops for row in rows)
    if left or flops:
        rows.append(Part(path="", layers={type(model).__name__: 1}, parameters=_count(left), flops=flops))
    _, *below = model.modules()
    total = _count(model.parameters())
    return Summary(
        parts=tuple(rows),
        layers=Counter(type(m).__name__ for m in below if type(m) not in (*_CONTAINERS, nn.Identity)),
        parameters=total,
        trainable=_count(p for p in model.parameters() if p.requires_grad),
        shared=_count(p for _, p in model.named_parameters(remove_duplicate=False)) - total,
        flops=counter.get_total_flops(),
    )


def render(summary: Summary, title: str) -> Table:
    """Lay a summary out as a table for 100 columns, with totals below."""
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE)
    for name in ("module", "layers", "output", "kernels", "channels", "parameters", "GFLOP"):
        table.add_column(name, justify="right" if name in ("parameters", "GFLOP") else "left")
    for part in summary.parts:
        table.add_row(
            part.path,
            ", ".join(f"{count} {name}" if count > 1 else name for name, count in part.layers.items()),
            "x".join(map(str, part.output)),
            ", ".join("x".join(map(str, size)) for size in part.kernels),
            "-".join(map(str, part.channels)),
            f"{part.parameters:,}" if part.parameters else "",
            f"{part.flops / 1e9:,.2f}" if part.flops else "",
        )
    ...
    return table


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_children():
        children = list(module.children())
        only_containers = all(isinstance(child, nn.Sequential) for child in children)
        # lists are never called: their members are
        if type(module) in _CONTAINERS[1:] or (type(module) is nn.Sequential and children and only_containers):
            yield from _parts(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _contents(module: nn.Module) -> Counter[str]:
    if type(module) is nn.Sequential:
        return sum(map(_contents, module.children()), Counter())
    return Counter([type(module).__name__])


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _pair(size: Any) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size, size)
