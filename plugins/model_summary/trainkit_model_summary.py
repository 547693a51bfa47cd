"""A table of the network."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainkit import Run
from trainkit.cli.output import table
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

    observer: ClassVar = True

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Print the table."""
        summary = summarize(run.model, run.image_shape)
        title = f"{run.recipe.name}, {_times(run.image_shape)} images"
        run.console.print(render(summary, title, run.console.width))


def summarize(model: nn.Module, shape: tuple[int, int, int]) -> Summary:
    """Describe a network by its top-level modules; a module that only holds containers is replaced by these.

    Shapes and operations come from a pass of one image through a copy in evaluation mode on the meta device, where
    nothing is computed; the network itself is not touched.

    Args:
        model: a network from images [N, C, H, W] to one tensor, such as logits.
        shape: channels, height and width of an image.
    """
    outputs, flops, total_flops = _trace(model, shape)
    parts: list[Part] = []
    uncounted = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for path, module in _parts(model):
        own = uncounted & set(module.parameters())  # without those that an earlier part has, too
        uncounted -= own
        convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        part = Part(
            path=path,
            layers=_layers(_opened(module)),
            output=outputs.get(path, ()),
            kernels=list(dict.fromkeys(conv.kernel_size for conv in convs)),
            channels=list(dict.fromkeys(conv.out_channels for conv in convs)),
            parameters=_count(own),
            flops=flops[path],
        )
        parts.append(part)
    rest_flops = total_flops - sum(part.flops for part in parts)
    if uncounted or rest_flops:
        parts.append(
            Part(
                path="",
                layers={type(model).__name__: 1},
                output=(),
                kernels=[],
                channels=[],
                parameters=_count(uncounted),
                flops=rest_flops,
            )
        )
    parameters = count_parameters(model)
    named = model.named_parameters(remove_duplicate=False)  # a shared one comes under each of its names
    unshared = _count(parameter for _, parameter in named if parameter.requires_grad)
    modules = list(model.modules())[1:]  # without the network itself
    return Summary(
        parts=parts,
        layers=_layers(modules),
        parameters=parameters,
        shared=unshared - parameters,
        flops=total_flops,
    )


def _trace(model: nn.Module, shape: tuple[int, int, int]) -> tuple[dict[str, tuple[int, ...]], dict[str, int], int]:
    """Pass one image forward and backward through a copy of the network on the meta device.

    Returns:
        The shape of each part's output, without N, by path; the operations of each part, by path; all operations.
    """
    copied = copy.deepcopy(model).to("meta").eval()
    outputs: dict[str, tuple[int, ...]] = {}

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        # FlopCounterMode (torch 2.14) takes a module's backward pass to begin at the gradients of its outputs and to
        # end at those of its inputs. In a module that returns its input, as an identity does, both are one tensor, and
        # it misses the end. A view makes them two tensors.
        return tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in inputs)

    def leave(path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        outputs[path] = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()

    parts = dict(_parts(copied))
    for path, part in parts.items():
        part.register_forward_pre_hook(enter)
        part.register_forward_hook(partial(leave, path))
    with FlopCounterMode(display=False) as counter:
        copied(torch.zeros(1, *shape, device="meta")).sum().backward()
    counts = counter.get_flop_counts()
    flops = {path: sum(counts.get(f"{type(copied).__name__}.{path}", {}).values()) for path in parts}
    return outputs, flops, counter.get_total_flops()


def render(summary: Summary, title: str, width: int) -> Any:
    """Lay a summary out as a rich table; what a narrow terminal has no room for is left out."""
    columns = ["module", "layers", "output", "kernels", "channels", "parameters", "GFLOP"]
    rows = [
        (
            part.path,
            _listed(part.layers),
            _times(part.output),
            ", ".join(map(_times, part.kernels)),
            ", ".join(map(str, part.channels)),
            f"{part.parameters:,}" if part.parameters else "",
            f"{part.flops / 1e9:,.2f}" if part.flops else "",
        )
        for part in summary.parts
    ]
    total = ("total", "", "", "", "", f"{summary.parameters:,}", f"{summary.flops / 1e9:,.2f}")
    made = table(
        columns, [*rows, total], right=["parameters", "GFLOP"], optional=["channels", "kernels", "output"], width=width
    )
    made.rows[-2].end_section = True
    unshared = f"; {summary.parameters + summary.shared:,} without sharing" if summary.shared else ""
    made.title, made.title_justify = title, "left"
    made.caption = f"{_listed(summary.layers)}\nparameters: trainable{unshared}\nGFLOP: one image, forward and backward"
    made.caption_justify = "left"
    return made


def _parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the top-level modules by path; in place of one that only holds containers, yield these."""
    for name, module in model.named_children():
        children = {type(child) for child in module.children()}
        # A ModuleList itself is never called, so it has no output.
        if isinstance(module, nn.ModuleList) or children == {nn.Sequential}:
            yield from _parts(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _opened(module: nn.Module) -> list[nn.Module]:
    """Return a module alone, or what a ``Sequential`` holds, at any depth."""
    if not isinstance(module, nn.Sequential):
        return [module]
    opened = []
    for child in module.children():
        opened += _opened(child)
    return opened


def _layers(modules: Iterable[nn.Module]) -> dict[str, int]:
    """Count modules by class, without containers and identities."""
    passive = (nn.Sequential, nn.ModuleList, nn.Identity)
    return Counter(type(module).__name__ for module in modules if not isinstance(module, passive))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _listed(layers: dict[str, int]) -> str:
    """Return counted layers as "2 Conv2d, ReLU"."""
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in layers.items())


def _times(sizes: Iterable[int]) -> str:
    """Return sizes as 3x32x32."""
    return "x".join(map(str, sizes))
