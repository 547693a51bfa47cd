"""Processor time of commands before they do their work, and ``trainkit run``'s way to its first step."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import ROOT, alternate, arguments, report, show


def processor_seconds(command: Sequence[str]) -> float:
    """Return user and system seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def wall_seconds(command: Sequence[str]) -> float:
    """Return wall seconds of a command."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, rounds=7, recipe="quickstart", root="")
    recipe = ROOT / "recipes" / f"{args.recipe}.yaml"
    where = [f"plugins.cifar10.root={Path(args.root).resolve()}"] if args.root else []
    quiet = [
        "plugins.figures=false",
        "plugins.model_summary=false",
        "plugins.progress=false",
        "plugins.checkpoint=false",
    ]
    first_step = (
        "import sys; from trainkit import build, load_recipe; from trainkit.trainer import Trainer; "
        "run = build(load_recipe(sys.argv[1], [*sys.argv[2:], 'max_steps=1'])); run.flush_log(); "
        "Trainer(run).train_step(next(run.batches['train'].iterate()))"
    )
    commands = alternate(
        {
            "python -c pass": lambda: processor_seconds(["-c", "pass"]),
            "trainkit --help": lambda: processor_seconds(["-m", "trainkit", "--help"]),
            "trainkit plugins list": lambda: processor_seconds(["-m", "trainkit", "plugins", "list"]),
        },
        args.rounds,
    )
    starts = alternate(
        {
            "import torch, torchvision": lambda: wall_seconds(["-c", "import torch, torchvision"]),
            "build the recipe, take one step": lambda: wall_seconds(["-c", first_step, str(recipe), *where, *quiet]),
        },
        args.rounds,
    )
    imports = starts["import torch, torchvision"]
    added = [b - a for a, b in zip(imports, starts["build the recipe, take one step"], strict=True)]
    rows = [(name, "processor", show(values, 3)) for name, values in commands.items()]
    rows += [(name, "wall", show(values, 2)) for name, values in starts.items()]
    rows.append(("first step, beyond the import of torch", "wall", show(added, 2)))
    report(args, "seconds: median (least-greatest)", ["command", "clock", "seconds"], rows)


if __name__ == "__main__":
    main()
