"""What commands that build a run do first."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["starting"]


@contextmanager
def starting() -> Iterator[None]:
    """Keep the garbage collector out of imports and construction.

    What they allocate stays: the collector's passes find nothing and take a quarter of the time to the first step. It
    is left out of all later passes, too.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # torch's extensions report what the last pass leaves as leaks
        if collecting:
            gc.enable()
