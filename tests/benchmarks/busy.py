"""Training speed on an idle machine and beside busy programs: the spin at barriers that commands set, and torch's own.

Threads that spin at OpenMP's barriers slow each other down as soon as another program holds a core. ``trainkit run``
sets a short spin, unless the user chose one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import ROOT, alternate, arguments, report, show

TORCHS_OWN = {"GOMP_SPINCOUNT": "300000"}  # what GNU's OpenMP does by default
SETTINGS: dict[str, dict[str, str]] = {"trainkit's": {}, "torch's default": TORCHS_OWN}


def images_per_second(recipe: Path, variables: dict[str, str], overrides: list[str]) -> float:
    """Return the training speed of one run, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainkit", "run", str(recipe), "--run-dir", folder, "--json", *overrides]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
        done = subprocess.run(
            command, env={**inherited, **variables}, cwd=ROOT, capture_output=True, text=True, check=True
        )
    return float(json.loads(done.stdout)["images_per_second"])


@contextmanager
def busy(programs: int) -> Iterator[None]:
    """Keep so many other programs computing meanwhile."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, rounds=3, epochs=3, busy=2, recipe="quickstart", root="")
    where = [f"plugins.cifar10.root={Path(args.root).resolve()}"] if args.root else []
    overrides = [f"epochs={args.epochs}", "plugins.figures=false", "plugins.progress=false", *where]
    recipe = ROOT / "recipes" / f"{args.recipe}.yaml"
    rows = []
    for programs in (0, args.busy):
        with busy(programs):
            found = alternate(
                {
                    name: lambda variables=variables: images_per_second(recipe, variables, overrides)
                    for name, variables in SETTINGS.items()
                },
                args.rounds,
                warm_up=0,
            )
        state = "idle" if programs == 0 else f"beside {programs} busy programs"
        rows += [(state, name, show(values, 0)) for name, values in found.items()]
    report(args, f"images/s of {args.recipe}, median (least-greatest)", ["machine", "spin", "images/s"], rows)


if __name__ == "__main__":
    main()
