"""What the benchmarks share: alternating rounds, medians with spread, one table, one JSON object."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def alternate(contenders: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Call each contender in turn, round after round (A B A B), and return what they measured, without the warm-up."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warm_up + rounds):
        for name, measure in contenders.items():
            value = measure()
            if number >= warm_up:
                found[name].append(value)
    return found


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def arguments(description: str | None, **options: Any) -> argparse.Namespace:
    """Parse ``--json`` and whole-number options with defaults."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def report(args: argparse.Namespace, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print the table, or with ``--json`` the same as one object."""
    if args.json:
        print(json.dumps({"title": title, "rows": [dict(zip(columns, row, strict=True)) for row in rows]}, indent=2))
        return
    from rich.console import Console

    from trainkit.cli.output import table

    console = Console()
    console.print(title, style="bold", highlight=False)
    console.print(table(columns, rows, right=columns[1:]))


def show(values: Sequence[float], digits: int = 1) -> str:
    """Return a median with its spread, such as ``12.3 (11.9-14.0)``."""
    s = summary(values)
    return f"{s['median']:.{digits}f} ({s['min']:.{digits}f}-{s['max']:.{digits}f})"


def peers(folder: Path, *requirements: str) -> Path:
    """Return the Python of a virtual environment that has `requirements` and sees this environment's packages, too."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        site = next((folder / "lib").glob("python*")) / "site-packages"
        (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True, stdout=sys.stderr)
    return python
