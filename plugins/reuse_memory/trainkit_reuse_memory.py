"""Memory that stays from step to step."""

import ctypes
import platform

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["ReuseMemory"]

# of malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


@plugin
class ReuseMemory:
    """Keep the memory that a step frees for the next one, in place of handing it back to the system.

    On Linux, glibc hands large blocks back as soon as they are free, and the feature maps of a network are large
    blocks: each step gets them as new pages, cleared one by one. During the run this turns that off (mallopt(3)). The
    most that a step needs then stays with the process, and is handed back when the run ends. Numbers do not change. On
    a GPU, whose memory torch keeps itself, and where the C library is another, it does nothing.
    """

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Keep memory from now on."""
        if _applies(run):
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, -1)

    @hookimpl
    def fit_end(self, run: Run) -> None:
        """Hand it back, and from now on as glibc does when large blocks are common."""
        if _applies(run):
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 65536)
            libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
            libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
            libc.malloc_trim(0)


def _applies(run: Run) -> bool:
    return run.device.type == "cpu" and platform.libc_ver()[0] == "glibc"
