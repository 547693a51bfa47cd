"""Compilation of the network."""

import textwrap
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException, Unsupported
from torch._functorch import config as functorch

from trainkit import Run
from trainkit.errors import RecipeError, RunError
from trainkit.plugin import hookimpl, plugin

__all__ = ["Compile"]


@plugin
class Compile:
    """Compile the network with torch.compile, or say why not and train without (Ansel et al., ASPLOS 2024).

    ``run.model`` stays as it is, and so do the names in its state dict. Compilation happens in the first forward pass,
    and again for evaluation and for another batch size.

    Args:
        mode: what to spend compile time or memory on, as in ``torch.compile``.
        dynamic: true compiles for any batch size, false for each one anew; left out, a second size is compiled for
            any, as in ``torch.compile``.
        fullgraph: whether code that cannot be compiled as one graph is an error.
    """

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    dynamic: bool | None = None
    fullgraph: bool = False

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Refuse what CUDA graphs cannot do.

        Raises:
            RecipeError: a step adds up the gradients of several batches, which a CUDA graph would overwrite.
        """
        uses_graphs = run.device.type == "cuda" and self.mode in ("reduce-overhead", "max-autotune")
        if uses_graphs and run.batches_per_step > 1:
            raise RecipeError(
                f"'mode': {self.mode} records CUDA graphs, which overwrite the gradients of one batch with the next, "
                f"and this run adds up those of {run.batches_per_step}; set default or max-autotune-no-cudagraphs"
            )

    @hookimpl
    def wrap_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Return what compiles the network when it is first called."""

        def warn(error: RuntimeError) -> None:
            line = f"compile: warning: compilation failed, the run goes on without it: {_reason(error)}"
            run.console.print(line, markup=False, highlight=False, soft_wrap=True)

        try:
            compiled = torch.compile(model, mode=self.mode, dynamic=self.dynamic, fullgraph=self.fullgraph)
        except RuntimeError as error:  # torch does not compile under this version of Python
            warn(error)
            return model
        return _Compiled(model, compiled, warn)


class _Compiled(nn.Module):
    """Calls the compiled network, or the network itself once its compilation has failed.

    A missing compiler shows in the first call only, and code that cannot be compiled perhaps in a later one. Training
    and evaluation mode reach the network because it is a child of this module.
    """

    def __init__(self, model: nn.Module, compiled: Callable[..., Tensor], warn: Callable[[RuntimeError], None]) -> None:
        super().__init__()
        self.model = model
        self.compiled: Callable[..., Tensor] | None = compiled
        self.warn = warn
        # Compile the backward pass together with the forward pass: a failure in the middle of a backward pass could not
        # be made good.
        self.backward_too = functorch.patch(force_non_lazy_backward_lowering=True)

    def forward(self, images: Tensor) -> Tensor:
        if self.compiled is not None:
            try:
                with self.backward_too:
                    return self.compiled(images)
            except Unsupported as error:  # raised with fullgraph only
                raise RunError(
                    f"compile: 'fullgraph': the network cannot be compiled as one graph: {_reason(error)}; "
                    "set fullgraph: false"
                ) from error
            except TorchDynamoException as error:
                self.compiled = None
                self.warn(error)
        return self.model(images)  # type: ignore[no-any-return]


def _reason(error: Exception) -> str:
    """Return the first paragraph of torch's error, in at most 300 characters; the others explain how to debug torch."""
    return textwrap.shorten(str(error).partition("\n\n")[0], 300)
