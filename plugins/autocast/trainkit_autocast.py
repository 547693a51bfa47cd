"""Automatic mixed precision."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from attrs import field
from torch import Tensor
from torch.amp import GradScaler

from trainkit import Run
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin

__all__ = ["Autocast"]


class _Scaling:
    """Loss scaling (Micikevicius et al., section 3.2), so that small gradients do not become 0 in float16."""

    scaler: GradScaler

    @hookimpl
    def backward(self, run: Run, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if run.completes_step:  # only once a step, and already here, so that gradients_ready sees true gradients
            self.scaler.unscale_(run.optimizer)

    @hookimpl
    def optimizer_step(self, run: Run) -> None:
        self.scaler.step(run.optimizer)  # left out where a gradient is not finite
        self.scaler.update()


@plugin
class Autocast:
    """Run forward passes in automatic mixed precision (Micikevicius et al., ICLR 2018).

    Convolutions and linear layers compute in `dtype`; the loss and the parameters stay float32. With float16 the loss
    is scaled before the backward pass, and the plugin provides ``backward`` and ``optimizer_step`` for it. With
    bfloat16, which has the range of float32, it leaves them to others.

    Args:
        dtype: ``bfloat16``; ``float16``, on a GPU; or ``auto``: bfloat16 where the device computes in it natively,
            else no mixed precision.
    """

    dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    # Each of these two hooks takes one plugin of a run. What is None is no hook: only float16 takes them.
    backward: Callable[..., None] | None = field(init=False, default=None)
    optimizer_step: Callable[..., None] | None = field(init=False, default=None)
    _scaling: _Scaling | None = field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        if self.dtype == "float16":
            self._scaling = _Scaling()
            self.backward, self.optimizer_step = self._scaling.backward, self._scaling.optimizer_step

    @hookimpl
    def contexts(self, run: Run) -> torch.autocast | None:
        """Return torch's autocast, and print which it is.

        Raises:
            RecipeError: float16 is asked for on a CPU.
        """
        dtype = self.dtype
        if dtype == "auto":
            if not _has_bfloat16(run.device):
                _say(run, f"off, because this {run.device.type} does not compute in bfloat16 natively")
                return None
            dtype = "bfloat16"
        if dtype == "float16" and run.device.type == "cpu":
            raise RecipeError("'dtype': float16 is for GPUs, and this run is on the CPU; set auto or bfloat16")
        if self._scaling:
            self._scaling.scaler = GradScaler(run.device.type)
        _say(run, f"{dtype} on {run.device.type}")
        return torch.autocast(run.device.type, getattr(torch, dtype))

    def state_dict(self) -> dict[str, Any]:
        """Return the scale of float16 and what it depends on; nothing for bfloat16."""
        return self._scaling.scaler.state_dict() if self._scaling else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        if self._scaling:
            self._scaling.scaler.load_state_dict(state)


def _has_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for bfloat16, rather than computing by way of float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if torch.cpu._is_avx512_supported():  # oneDNN says yes to all of these, also where it has to emulate
        return torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _say(run: Run, what: str) -> None:
    run.console.print(f"autocast: {what}", markup=False, highlight=False, soft_wrap=True)
