"""Memory that stays from step to step."""

import ctypes
import platform

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["ReuseMemory"]

# The parameters of mallopt, from malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4


@plugin
class ReuseMemory:
    """Keep the memory that a step frees for the next one, in place of handing it back to the system.

    On Linux, glibc returns large blocks to the system as soon as they are free, and the feature maps of a network are
    large blocks. So each step gets them as new pages, which the system clears one by one. During the run this plugin
    turns that off (mallopt(3)). The most that a step needs then stays with the process, and is returned when the run
    ends. Numbers do not change. On a GPU, where torch keeps the memory itself, and with a C library other than glibc,
    it does nothing.
    """

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Keep memory from now on."""
        if _applies(run):
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)  # no block gets a mapping of its own, which free() would return
            libc.mallopt(M_TRIM_THRESHOLD, -1)  # never return the end of the heap

    @hookimpl
    def fit_end(self, run: Run) -> None:
        """Return the memory, and set the values that glibc sets itself where large blocks are common."""
        if _applies(run):
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 65536)
            libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
            libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
            libc.malloc_trim(0)


def _applies(run: Run) -> bool:
    return run.device.type == "cpu" and platform.libc_ver()[0] == "glibc"
