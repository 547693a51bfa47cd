"""What commands print: tables for people, JSON for programs, and nothing raw from a stranger's file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["error", "number", "print_json", "printable", "table", "terminal"]


def printable(text: object) -> str:
    """Return text without control characters: names from recipes, data and metadata may carry terminal escapes.

    Characters that turn the direction of writing, or that show nothing, are none that may be printed either.
    """
    return "".join(c if c.isprintable() or c in "\t\n" else repr(c)[1:-1] for c in str(text))


def error(message: str) -> None:
    """Print one paragraph to the standard error stream."""
    label = "\x1b[31merror:\x1b[0m" if sys.stderr.isatty() else "error:"
    print(f"{label} {printable(message)}", file=sys.stderr)


def print_json(value: Any) -> None:
    """Print one JSON document to the standard output."""
    print(json.dumps(value, indent=2, default=str))


def terminal(*, stderr: bool = False) -> Console:
    """Return where commands print for people; a pipe or a file gets lines of 120 characters."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            """Go on without a reader, such as `head`, that has seen enough: rich would end the run."""
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    made = Terminal(stderr=stderr)
    return made if made.is_terminal or "COLUMNS" in os.environ else Terminal(stderr=stderr, width=120)


def number(value: float | None) -> str:
    """Return a number as people read it: ``3,116,378``, ``93.83``, ``0.0123``; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, int) and abs(value) >= 10**15:  # beyond what a float holds exactly, or at all
        digits = str(value)
        return digits if len(digits) <= 20 else f"{digits[:6]}... ({len(digits)} digits)"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> Any:
    """Return a rich table of plain text.

    Args:
        columns: headings.
        rows: cells; every one is printed as plain text.
        right: headings of the columns that are aligned to the right.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made
