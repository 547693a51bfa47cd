"""Named, counter-based random streams.

A random number in trainkit is a function of the seed, a purpose (usually a plugin's name), the epoch and the batch. So
there is no generator state to save, a resumed run continues exactly, and no plugin can disturb another's numbers. The
generator is Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) as numpy implements it.
"""

from functools import lru_cache
from hashlib import blake2b

import numpy as np

__all__ = ["stream", "torch_seed"]


@lru_cache(maxsize=1024)
def _key(seed: int, purpose: str) -> int:
    return int.from_bytes(blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest(), "little")


def stream(seed: int, purpose: str, epoch: int = 0, batch: int = 0) -> np.random.Generator:
    """Return the generator of one purpose at one position; equal arguments give equal numbers.

    Args:
        seed: the run's seed, any integer.
        purpose: who draws and for what; different purposes are independent.
        epoch: from 0.
        batch: from 0, within the epoch.
    """
    # The counter's two low words count the numbers drawn here, its two high words are the position.
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose), counter=[0, 0, batch, epoch]))


def torch_seed(seed: int, purpose: str, epoch: int = 0, batch: int = 0) -> int:
    """Return a 63-bit seed for a torch generator, for the draws that torch makes itself (initial weights, dropout)."""
    position = blake2b(b"%d/%d" % (epoch, batch), digest_size=8, key=_key(seed, purpose).to_bytes(16, "little"))
    return int.from_bytes(position.digest(), "little") >> 1
