"""Data-parallel training in several processes."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from attrs import field
from attrs.validators import gt
from torch import Tensor, nn
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from trainkit import Run
from trainkit.errors import RecipeError, RunError, TrainkitError
from trainkit.plugin import hookimpl, plugin
from trainkit.processes import Processes
from trainkit.provenance import digest
from trainkit.recipe import Recipe

__all__ = ["DDP", "Group", "SyncBatchNorm"]

T = TypeVar("T")


@plugin
class DDP:
    """Train in all processes that torchrun started, each on its share of every batch, with torch's DDP.

    ``batch_size`` counts the images of all processes, so that steps, schedules and checkpoints are those of one
    process, and a recipe means the same for any number of them. Gradients are averaged over the images of a batch,
    whatever share each process has; while gradients accumulate, nothing is sent. Batch normalization uses the
    statistics of each process's share, and the running ones are averaged after every step, so that all processes hold
    the same network; that they do is checked after every epoch. Transforms draw for whole batches, so that an image is
    augmented alike whichever process has it. Without torchrun, or with one process, the plugin does nothing.

    Args:
        backend: of torch.distributed; by default ``nccl`` on GPUs and ``gloo`` on CPUs.
        sync_batch_norm: normalize by the statistics of whole batches. That costs two exchanges a layer in each
            direction.
        timeout: minutes after which a process that waits in vain for another one fails; greater than 0.
    """

    before: ClassVar = ("accumulate",)

    backend: str | None = None
    sync_batch_norm: bool = False
    timeout: float = field(default=10.0, validator=gt(0))

    @hookimpl
    def processes(self, run: Run) -> Processes:
        """Join the other processes.

        Raises:
            RecipeError: the backend is not one of this torch.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Processes()
        return Group(self.backend or _default_backend(run.recipe), timedelta(minutes=self.timeout))

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Put in batch normalization over all processes, if it is wanted."""
        return synchronized(model) if self.sync_batch_norm and run.world > 1 else model

    @hookimpl
    def wrap_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Wrap the network, whose gradients are averaged from here on."""
        if run.world == 1:
            return model
        return _Replica(
            model,
            run,
            device_ids=[run.device] if run.device.type == "cuda" else None,
            broadcast_buffers=False,  # they are averaged instead
            # Else torch sorts gradients anew after the first step, also the first after a resume: with three processes
            # or more, sums would be rounded otherwise there.
            find_unused_parameters=True,
        )

    @hookimpl
    def provenance(self, run: Run) -> dict[str, str | float] | None:
        """Record how many processes there are, because sums are rounded in another order, and who connects them."""
        return {"processes": run.world, "backend": dist.get_backend()} if run.world > 1 else None

    @hookimpl
    def transform_loss(self, run: Run, loss: Tensor) -> Tensor:
        """Weight the mean loss of a share that is larger or smaller than those of other processes."""
        assert run.batch is not None
        images, mine = run.images_in_batch, len(run.batch) * run.world
        return loss if mine == images else loss * (mine / images)

    @hookimpl
    def gradients_ready(self, run: Run) -> None:
        """Average the buffers, such as the running statistics of batch normalization, over the processes."""
        buffers = [buffer for buffer in run.model.buffers() if buffer.is_floating_point()]
        if run.world == 1 or not buffers:
            return
        flat = torch.cat([buffer.reshape(-1).float() for buffer in buffers])
        run.processes.all_reduce(flat).div_(run.world)
        first = 0
        for buffer in buffers:
            buffer.copy_(flat[first : first + buffer.numel()].view_as(buffer))
            first += buffer.numel()

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        """Check that all processes hold the same network.

        Raises:
            RunError: they do not.
        """
        if run.world == 1:
            return
        digests = run.processes.all_gather(digest(dict(run.model.state_dict())))
        if len({*digests}) > 1:
            raise RunError(
                f"the networks of the {run.world} processes differ after epoch {run.epoch + 1}: a plugin changes "
                "weights or gradients by what one process alone sees; it must exchange it, with "
                "run.processes.all_reduce"
            )


class Group(Processes):
    """The processes that torchrun started, as torch.distributed connects them.

    Small messages go over gloo, so that they never wait for a GPU.

    Args:
        backend: of torch.distributed.
        timeout: after which a process that waits for another one fails.

    Raises:
        RecipeError: the backend is not one of this torch.
    """

    def __init__(self, backend: str, timeout: timedelta) -> None:
        if not dist.is_backend_available(backend):
            raise RecipeError(f"'backend': this torch has no {backend!r}; leave the option out")
        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if not dist.is_initialized():  # a run that is built again in the same processes keeps them
            store = _store()
            # torch 2.14 with torchrun --standalone keeps the store when processes are started anew, and gloo then finds
            # the addresses of those that died.
            attempt = PrefixStore(f"trainkit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(backend, store=attempt, rank=self.rank, world_size=self.world, timeout=timeout)
            atexit.register(dist.destroy_process_group)
        self._control = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See :meth:`trainkit.processes.Processes.all_reduce`."""
        _together(dist.all_reduce, tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """See :meth:`trainkit.processes.Processes.any`."""
        raised = torch.tensor(int(flag))
        _together(dist.all_reduce, raised, op=dist.ReduceOp.MAX, group=self._control)
        return bool(raised)

    def all_gather(self, value: T) -> list[T]:
        """See :meth:`trainkit.processes.Processes.all_gather`."""
        values: list[Any] = [None] * self.world
        _together(dist.all_gather_object, values, value, group=self._control)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """See :meth:`trainkit.processes.Processes.from_first`."""
        made: list[Any] = [None, None]
        failure: TrainkitError | None = None
        if self.rank == 0:
            try:
                made[0] = make()
            except TrainkitError as error:
                failure = error
                made[1] = str(error)
        _together(dist.broadcast_object_list, made, group=self._control)
        if failure is not None:
            raise failure
        if made[1] is not None:
            raise RunError(f"the first process failed: {made[1]}")
        value: T = made[0]
        return value

    def remember_run(self, run_dir: str) -> None:
        """See :meth:`trainkit.processes.Processes.remember_run`."""
        if self.rank == 0:
            _store().set("trainkit/run_dir", run_dir)

    def earlier_run(self) -> str | None:
        """See :meth:`trainkit.processes.Processes.earlier_run`."""
        store = _store()
        return str(store.get("trainkit/run_dir"), "utf-8") if store.check(["trainkit/run_dir"]) else None


class SyncBatchNorm(_BatchNorm):
    """Batch normalization over the images of all processes, on any device.

    Torch's own (``nn.SyncBatchNorm``) exists for GPUs only. Statistics are computed in float32, the variance from
    deviations, and gradients flow through them.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalize [N, C, ...]; in evaluation by the running statistics."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        others = [0, *range(2, input.dim())]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        values = input.float()
        count = torch.full((1,), input.numel() / input.shape[1], device=input.device)
        sums = _summed(torch.cat([values.sum(others), count]))
        total = sums[-1]
        mean = sums[:-1] / total
        deviations = values - mean.view(shape)
        variance = _summed(deviations.square().sum(others)) / total
        self._follow(mean.detach(), variance.detach() * (total / (total - 1)))
        output = deviations * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def synchronized(model: nn.Module) -> nn.Module:
    """Replace the batch normalizations of a network, itself included, by :class:`SyncBatchNorm` of the same values."""
    made: dict[nn.Module, nn.Module] = {}  # one may stand in several places
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            continue
        if module not in made:
            made[module] = _synchronized(module)
        if not path:
            return made[module]
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made[module])
    return model


def _synchronized(norm: _BatchNorm) -> SyncBatchNorm:
    made = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made.weight, made.bias = norm.weight, norm.bias
    made.running_mean, made.running_var = norm.running_mean, norm.running_var
    made.num_batches_tracked = norm.num_batches_tracked
    return made.train(norm.training)


class _Replica(DistributedDataParallel):
    """Torch's wrapper, which sends gradients in the last batch of a step alone, and nothing in evaluation."""

    def __init__(self, model: nn.Module, run: Run, **options: Any) -> None:
        with warnings.catch_warnings():
            # torch 2.14 renames `broadcast_buffers`, and versions before do not know the new name.
            warnings.simplefilter("ignore", FutureWarning)
            super().__init__(model, **options)
        self._run = run

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return self.module(*inputs, **keywords)
        self.require_backward_grad_sync = self._run.completes_step
        return super().forward(*inputs, **keywords)  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    """The sum over all processes. Each of them depends on every addend, so gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        _together(dist.all_reduce, total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        _together(dist.all_reduce, total)
        return total


def _summed(tensor: Tensor) -> Tensor:
    """Return the sum over all processes, through which gradients flow."""
    summed: Tensor = _Sum.apply(tensor)
    return summed


def _together(call: Callable[..., object], *args: Any, **keywords: Any) -> None:
    """Call what waits for the other processes.

    Raises:
        RunError: one of them has ended, or keeps this one waiting for too long.
    """
    try:
        call(*args, **keywords)
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise RunError(f"another process of the run has ended, or cannot be reached: {said}") from error


def _default_backend(recipe: Recipe) -> str:
    on_gpu = recipe.device.partition(":")[0] == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
    return "nccl" if on_gpu else "gloo"


@cache
def _store() -> Any:
    """Return the store that torchrun offers. It may outlive processes that are started anew, or be a new one then."""
    store, _, _ = next(iter(rendezvous("env://")))
    return store
