"""The processes that train a run together.

A run that several processes train is one run: ``batch_size`` counts the images of all of them, every process holds the
same network, and each computes its share of every batch. What a plugin adds up over the images that it sees is
therefore a part, which :meth:`Processes.all_reduce` makes whole; what it computes from the network, the optimizer, the
records or ``run.rng`` is the same in every process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Processes"]

T = TypeVar("T")


class Processes:
    """This process alone: what a run has unless a plugin provides another one (hook ``processes``).

    Methods are collective: every process calls each of them, in the same order.
    """

    rank: int = 0  #: this process, from 0; the first one alone writes and prints
    world: int = 1  #: how many there are
    local_rank: int = 0  #: this process among those of the same computer, whose GPU of that number it takes
    restarted: bool = False  #: whether they were started anew, after one of them had failed

    def share(self, images: int) -> slice:
        """Return this process's part of so many images; the parts of all processes are disjoint and differ by one."""
        return slice(images * self.rank // self.world, images * (self.rank + 1) // self.world)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by the sum of those of all processes, in place, and return it; nothing waits for a GPU."""
        return tensor

    def any(self, flag: bool) -> bool:
        """Tell whether a flag is set in any process."""
        return flag

    def all_gather(self, value: T) -> list[T]:
        """Return the plain values of all processes, by rank."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """Return in every process what `make` gives in the first one, which alone calls it.

        Raises:
            TrainkitError: `make` raised it.
        """
        return make()

    def remember_run(self, run_dir: str) -> None:
        """Keep the path of the run directory for these processes, should they be started anew."""

    def earlier_run(self) -> str | None:
        """Return the path that these processes kept before they were started anew, or None."""
        return None
