"""Guard against losses and gradients that are not finite."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
from attrs import field
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit import Run
from trainkit.errors import RunError
from trainkit.plugin import hookimpl, plugin

__all__ = ["NonFinite"]

NAMED = 5  # parameters that the message names


@attrs.frozen(eq=False)
class _Reading:
    """The norms and losses of one step, perhaps still on their way to the host."""

    step: int  # this one and the next count from 1
    epoch: int
    lr: float | None  # of the update before this step, if this process made one
    names: tuple[str, ...]  # of the parameters that have gradients
    values: Tensor  # float32: one norm for each of the names, and the losses of the step's batches
    copied: torch.cuda.Event | None  # None where the values are here already


@plugin
class NonFinite:
    """Fail the run when a loss or a gradient is not finite; no such step reaches a checkpoint.

    Each step's losses and the 2-norm of each parameter's gradient are looked at, before gradients are clipped. A norm
    beyond the range of float32 counts as not finite. On a processor that happens before the update, which is not made.
    On a GPU that would stall it: the values are copied without waiting, and looked at in the first step that finds them
    arrived, as many steps later as the host runs ahead. Updates are made meanwhile, but the weights that they reach are
    neither saved nor evaluated: saving the run, the end of an epoch's training and a stop do wait for the values.
    """

    observer: ClassVar = True

    before: ClassVar[tuple[str, ...]] = ("grad_clip",)  # which makes infinite elements finite

    _parameters: list[tuple[str, nn.Parameter]] = field(init=False, factory=list)
    _losses: list[Tensor] = field(init=False, factory=list)  # of the batches since the last step
    _readings: deque[_Reading] = field(init=False, factory=deque)  # not yet looked at
    _lr: float | None = field(init=False, default=None)  # of the last update
    _norm: float | None = field(init=False, default=None)  # of the last reading that was fine

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Take the parameters' names, and note the learning rate of each update as the optimizer itself sees it."""
        self._parameters = list(run.model.named_parameters())
        run.optimizer.register_step_pre_hook(self._note_lr)

    @hookimpl
    def forward_end(self, run: Run, loss: Tensor) -> None:
        """Keep the loss of a training batch until its step."""
        if run.split == "train":
            self._losses.append(loss.detach())

    @hookimpl
    def gradients_ready(self, run: Run) -> None:
        """Measure this step, and look at what has arrived: on a processor this step itself.

        Raises:
            RunError: a step was not finite.
        """
        found = {n: p.grad for n, p in self._parameters if p.grad is not None}
        norms = torch._foreach_norm(list(found.values()))
        values = torch.stack([v.float() for v in (*norms, *self._losses)])
        self._losses.clear()
        values, copied = _to_host(values)
        self._readings.append(_Reading(run.step + 1, run.epoch + 1, self._lr, tuple(found), values, copied))
        self._look(wait=False)

    @hookimpl
    def safe_point(self, run: Run) -> None:
        """Look at all steps so far when the run is about to stop.

        Raises:
            RunError: a step was not finite.
        """
        if run.stop_reason is not None:
            self._look(wait=True)

    @hookimpl
    def eval_start(self) -> None:
        """Look at all steps so far, before the evaluation.

        Raises:
            RunError: a step was not finite.
        """
        self._look(wait=True)

    def state_dict(self) -> dict[str, Any]:
        """Look at all steps so far, whoever saves the run; there is nothing to keep.

        Raises:
            RunError: a step was not finite. Nothing has been written then.
        """
        self._look(wait=True)
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: a state was only saved where all was finite."""

    def _note_lr(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._lr = optimizer.param_groups[0]["lr"]

    def _look(self, *, wait: bool) -> None:
        while self._readings:
            copied = self._readings[0].copied
            if copied is not None:
                if not (wait or copied.query()):  # type: ignore[no-untyped-call]
                    return
                copied.synchronize()
            reading = self._readings.popleft()
            values: list[float] = reading.values.tolist()
            norm = math.hypot(*values[: len(reading.names)])
            if not all(map(math.isfinite, values)):
                self._readings.clear()
                raise RunError(_message(reading, values, norm, self._norm))
            self._norm = norm


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Return the values on the host (page-locked memory, to copy them meanwhile), and what tells of their arrival."""
    if not values.is_cuda:
        return values.cpu(), None
    return values.to("cpu", non_blocking=True), torch.cuda.current_stream(values.device).record_event()


def _message(reading: _Reading, values: list[float], norm: float, norm_before: float | None) -> str:
    loss = sum(values[len(reading.names) :])
    bad = [name for name, value in zip(reading.names, values, strict=False) if not math.isfinite(value)]
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    where = f" (in {len(bad)} of {len(reading.names)} parameters: {', '.join(bad[:NAMED])}{more})" if bad else ""
    before = "it is the first step since the run was started"
    if reading.lr is not None and norm_before is not None:
        before = f"the update before it had learning rate {float(reading.lr):g} and gradient norm {norm_before:g}"
    return (
        f"step {reading.step:,} (epoch {reading.epoch}) is not finite: loss {loss:g}, gradient norm {norm:g}{where}; "
        f"{before}. Checkpoints, if any, hold earlier steps only: continue from one, or start again, with a lower "
        "learning rate, a warm-up or gradients clipped by norm"
    )
