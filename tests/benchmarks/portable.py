"""Train a few steps with portable numerics on this CPU and on others that qemu's user mode emulates, and compare.

    python portable.py --cpus Nehalem Haswell

Each emulated run takes about two minutes.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from trainkit.rundir import RunDir

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
ARGUMENTS = ["numerics=portable", "epochs=1", "max_steps=3", "plugins.figures=false"]


def train(folder: Path, name: str, *emulator: str) -> dict[str, torch.Tensor]:
    command = [*emulator, sys.executable, "-m", "trainkit", "run", str(RECIPE), "--run-dir", name, *ARGUMENTS]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    weights: dict[str, torch.Tensor] = RunDir(folder / name).load_state("last")["model"]
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpus", nargs="+", default=["Nehalem", "Haswell"], help="as `qemu-x86_64 -cpu help` lists")
    with tempfile.TemporaryDirectory() as folder:
        mine = train(Path(folder), "native")
        for cpu in parser.parse_args().cpus:
            theirs = train(Path(folder), cpu, "qemu-x86_64", "-cpu", cpu)
            differing = [name for name in mine if not torch.equal(mine[name], theirs[name])]
            print(f"{cpu}: {len(mine) - len(differing)} of {len(mine)} tensors are the same, bit for bit")


if __name__ == "__main__":
    main()
