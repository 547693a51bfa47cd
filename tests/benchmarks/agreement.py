"""Training curves of the fast path (channels-last, bfloat16) beside the plain one (float32), over the same batches.

How it is judged: both paths train from the same seed, so that weights at the start, order and augmentation are the
same, and only rounding differs. Losses are averaged over windows of steps. The noise is what another seed does to the
fast path: in no window may fast and plain differ by more than the fast runs of several seeds differ at most.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from itertools import combinations

import torch
from attrs import field
from common import arguments, report
from end_to_end import built
from torch import Tensor

from trainkit import Run, fit
from trainkit.plugin import hookimpl, plugin

PLAIN = ("plugins.channels_last=false", "plugins.autocast=false")


@plugin
class Losses:
    """Keep each training step's loss."""

    kept: list[Tensor] = field(init=False, factory=list)

    @hookimpl
    def forward_end(self, run: Run, loss: Tensor) -> None:
        if run.split == "train":
            self.kept.append(loss.detach())


def curve(recipe: str, root: str, steps: int, window: int, seed: int, *overrides: str) -> list[float]:
    """Return the mean loss of each window of steps."""
    losses = Losses()
    run = built(recipe, root, steps, f"seed={seed}", *overrides, observer=losses)
    with tempfile.TemporaryDirectory() as folder:
        fit(run, folder, test_batches=1)
    print(f"{recipe}, seed {seed}, {' '.join(overrides) or 'fast'}: done", file=sys.stderr)
    return torch.stack(losses.kept).float().reshape(-1, window).mean(1).tolist()


def main() -> None:
    """Measure, print and judge; exit with 1 where the curves do not agree."""
    args = arguments(__doc__, recipe="basic_se", root="", steps=200, window=20, seeds=3)
    fast = [curve(args.recipe, args.root, args.steps, args.window, seed) for seed in range(args.seeds)]
    plain = curve(args.recipe, args.root, args.steps, args.window, 0, *PLAIN)
    apart = [abs(a - b) for a, b in zip(fast[0], plain, strict=True)]
    noise = [max(abs(a - b) for a, b in combinations(at, 2)) for at in zip(*fast, strict=True)]
    rows = [
        (f"{i * args.window + 1}-{(i + 1) * args.window}", *(f"{v:.4f}" for v in row))
        for i, row in enumerate(zip(plain, fast[0], apart, noise, strict=True))
    ]
    rows.append(("mean", *(f"{statistics.mean(v):.4f}" for v in (plain, fast[0], apart, noise))))
    columns = ["steps", "plain", "fast", "apart", f"{args.seeds} seeds apart"]
    agree = max(apart) <= max(noise)
    report(args, f"{args.recipe}: mean training loss; {'within' if agree else 'OUTSIDE'} the noise", columns, rows)
    sys.exit(not agree)


if __name__ == "__main__":
    main()
