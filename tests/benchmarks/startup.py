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

#: All that ``trainkit run`` does before the first step, and no further.
FIRST_STEP = """
import os, sys
from trainkit import fit, load_recipe
from trainkit.activation import Active, activate, register
from trainkit.plugin import hookimpl, plugin
from trainkit.run import build_with

@plugin
class End:
    @hookimpl
    def epoch_start(self):
        os._exit(0)

folder, path, *overrides = sys.argv[1:]
recipe = load_recipe(path, overrides)
fit(build_with(recipe, register([*activate(recipe).plugins.values(), Active("end", End())])), folder)
"""


def processor_seconds(command: Sequence[str]) -> float:
    """Return user and system seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def wall_seconds(code: str, *arguments: str) -> float:
    """Return wall seconds of Python code, whose first argument is a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", code, folder, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT
        )
        return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, rounds=7, recipe="quickstart", root="")
    recipe = ROOT / "recipes" / f"{args.recipe}.yaml"
    where = [f"plugins.cifar10.root={Path(args.root).resolve()}"] if args.root else []
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
            "import torch, torchvision": lambda: wall_seconds("import os, torch, torchvision; os._exit(0)"),
            "trainkit run, to its first step": lambda: wall_seconds(FIRST_STEP, str(recipe), *where),
        },
        args.rounds,
    )
    imports = starts["import torch, torchvision"]
    added = [b - a for a, b in zip(imports, starts["trainkit run, to its first step"], strict=True)]
    rows = [(name, "processor", show(values, 3)) for name, values in commands.items()]
    rows += [(name, "wall", show(values, 2)) for name, values in starts.items()]
    rows.append(("first step, beyond the import of torch", "wall", show(added, 2)))
    report(args, "seconds: median (least-greatest)", ["command", "clock", "seconds"], rows)


if __name__ == "__main__":
    main()
