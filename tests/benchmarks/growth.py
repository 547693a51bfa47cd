"""How cost grows with the number of plugins, of steps and with the model's size: a step's time and peak memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

from common import arguments, report

CASE = (
    "import json, sys; sys.path.insert(0, sys.argv[4]); from growth import case; "
    "print(json.dumps(case(*map(int, sys.argv[1:4]))))"
)


def case(plugins: int, steps: int, width: int) -> dict[str, float]:
    """Train in this process: so many observers of every per-step hook, so many steps, a network so wide."""
    import tempfile

    import torch
    from torch import nn

    from trainkit import Data, Run, TensorSplit, fit
    from trainkit.plugin import hookimpl, plugin
    from trainkit.testing import build_run

    @plugin
    class Toy:
        @hookimpl
        def data(self) -> Data:
            images = torch.randint(0, 256, (3200, 1, 4, 4), dtype=torch.uint8)
            split = TensorSplit(images, torch.arange(3200) % 10)
            return Data(
                train=split, test=TensorSplit(images[:32], split.targets[:32]), classes=("0",) * 10, shape=(1, 4, 4)
            )

        @hookimpl
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 10))

    @plugin
    class Observer:
        @hookimpl
        def forward_end(self, run: Run) -> None:
            pass

        @hookimpl
        def gradients_ready(self, run: Run) -> None:
            pass

        @hookimpl
        def step_end(self, run: Run) -> None:
            pass

        @hookimpl
        def safe_point(self, run: Run) -> None:
            pass

    torch.set_num_threads(1)
    observers: dict[str, Any] = {f"observer_{n}": Observer() for n in range(plugins)}
    run = build_run({"toy": Toy(), **observers}, epochs=steps // 100, batch_size=32)
    with tempfile.TemporaryDirectory() as folder:
        fit(run, folder)
    seconds = sum(s for part, s in run.seconds.items() if part != "evaluation")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"us": seconds / steps * 1e6, "plugins_us": run.seconds["plugins"] / steps * 1e6, "MiB": peak}


def main() -> None:
    """Measure each case in a process of its own and print."""
    args = arguments(__doc__, steps=1000, many_steps=100_000)
    cases = [(p, args.steps, 16) for p in (0, 5, 20)]
    cases += [(5, args.many_steps, 16), (5, args.steps, 256), (5, args.steps, 4096)]
    rows = []
    for plugins, steps, width in cases:
        command = [sys.executable, "-c", CASE, str(plugins), str(steps), str(width), sys.path[0]]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        rows.append((plugins, steps, width, f"{found['us']:.1f}", f"{found['plugins_us']:.1f}", f"{found['MiB']:.0f}"))
    columns = ["observers", "steps", "width", "us a step", "of it in plugins", "peak MiB"]
    report(args, "cost of a step and peak memory", columns, rows)


if __name__ == "__main__":
    main()
