"""Processor time of commands before they do their work, and ``trainkit run``'s way to its first step."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import ROOT, alternate, arguments, report, show

#: A plugin that ends the process where the first step would begin, as an installed distribution.
END = {
    "end_at_first_step.py": """
import os
from trainkit.plugin import hookimpl, plugin

@plugin
class End:
    @hookimpl
    def epoch_start(self):
        os._exit(0)
""",
    "end_at_first_step-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: end-at-first-step\nVersion: 1\n",
    "end_at_first_step-1.dist-info/entry_points.txt": "[trainkit.plugins]\nend = end_at_first_step:End\n",
}


def processor_seconds(command: Sequence[str]) -> float:
    """Return user and system seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def wall_seconds(*command: str) -> float:
    """Return wall seconds of a command of Python's; in the recipe of a run, the plugin ``end`` is installed."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in END.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        environment = {**os.environ, "PYTHONPATH": folder}
        run_dir = ["--run-dir", str(Path(folder, "run"))] if "run" in command else []
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *command, *run_dir], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment
        )
        return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, rounds=7, recipe="quickstart", root="")
    recipe = ROOT / "recipes" / f"{args.recipe}.yaml"
    where = [f"plugins.cifar10.root={Path(args.root).resolve()}"] if args.root else []
    run = ["-m", "trainkit", "run", str(recipe), *where, "plugins.end={}"]
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
            "import torch, torchvision": lambda: wall_seconds("-c", "import os, torch, torchvision; os._exit(0)"),
            "trainkit run, to its first step": lambda: wall_seconds(*run),
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
