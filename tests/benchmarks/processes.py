"""Several processes: how time falls with their number, and the bits of a run whose processes are killed at random.

Each process has one thread. Killed runs are started anew by torchrun (``--max-restarts``) from their last checkpoint,
and their ledgers must end with the hash of an undisturbed one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, alternate, arguments, report, show


def torchrun(world: int, recipe: Path, run_dir: Path, overrides: list[str], restarts: int = 0) -> subprocess.Popen[str]:
    """Start a run in so many processes."""
    options = ["--standalone", f"--nproc-per-node={world}", f"--max-restarts={restarts}"]
    command = ["-m", "trainkit", "run", str(recipe), "--run-dir", str(run_dir), "plugins.ddp={}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for the end of a run, which must succeed."""
    printed, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(printed)


def images_per_second(world: int, recipe: Path, overrides: list[str]) -> float:
    """Return the training speed of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        finish(torchrun(world, recipe, run_dir, overrides))
        return float(json.loads((run_dir / "result.json").read_text())["images_per_second"])


def last_hash(run_dir: Path) -> str:
    """Return the last hash of a run's ledger."""
    return str(json.loads((run_dir / "ledger.jsonl").read_text().splitlines()[-1])["chain"])


def killed(world: int, recipe: Path, overrides: list[str], kills: int, seed: int) -> tuple[int, int, bool]:
    """Kill processes at random moments, in as many runs as that takes.

    Returns:
        How many were killed, in how many runs, and whether each run ended with the bits of an undisturbed one.
    """
    rng = random.Random(seed)
    overrides = [*overrides, "plugins.checkpoint.every_steps=2"]
    done = 0
    hashes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        finish(torchrun(world, recipe, whole, overrides))
        while done < kills:
            broken = Path(folder) / f"broken-{len(hashes)}"
            process = torchrun(world, recipe, broken, overrides, restarts=kills)
            while process.poll() is None and done < kills:
                time.sleep(rng.uniform(0.5, 12))
                listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
                if children := listed.stdout.split():
                    os.kill(int(rng.choice(children)), signal.SIGKILL)
                    done += 1
            finish(process)
            hashes.append(last_hash(broken))
        return done, len(hashes), set(hashes) == {last_hash(whole)}


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, rounds=2, world=2, steps=40, kills=0, seed=0, recipe="quickstart", root="")
    where = [f"plugins.cifar10.root={Path(args.root).resolve()}"] if args.root else []
    overrides = ["plugins.figures=false", "plugins.sample_predictions=false", "plugins.progress=false", *where]
    recipe = ROOT / "recipes" / f"{args.recipe}.yaml"
    if args.kills:
        done, runs, same = killed(args.world, recipe, overrides, args.kills, args.seed)
        columns = ["processes", "kills", "in runs", "beside undisturbed"]
        row = args.world, done, runs, "the same bits" if same else "OTHER BITS"
        report(args, f"{args.recipe}, processes killed at random", columns, [row])
        return
    found = alternate(
        {
            str(world): lambda world=world: images_per_second(world, recipe, [*overrides, f"max_steps={args.steps}"])
            for world in (1, args.world)
        },
        args.rounds,
        warm_up=0,
    )
    rows = [(name, show(values, 0)) for name, values in found.items()]
    report(args, f"images/s of {args.recipe}, median (least-greatest)", ["processes", "images/s"], rows)


if __name__ == "__main__":
    main()
