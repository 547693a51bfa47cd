"""What commands print: tables for people, JSON for programs, and nothing raw from a stranger's file."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from trainkit.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from trainkit.session import Result

__all__ = [
    "Output",
    "add_allow_local",
    "error",
    "guarded_output",
    "number",
    "picture_format",
    "print_json",
    "printable",
    "table",
    "terminal",
]


def printable(text: object) -> str:
    """Return text without control characters: names from recipes, data and metadata may carry terminal escapes.

    Characters that turn the direction of writing, or that show nothing, are none that may be printed either.
    """
    return "".join(c if c.isprintable() or c in "\t\n" else repr(c)[1:-1] for c in str(text))


def error(message: str) -> None:
    """Print one paragraph to the standard error stream."""
    label = "\x1b[31merror:\x1b[0m" if sys.stderr.isatty() else "error:"
    print(f"{label} {printable(message)}", file=sys.stderr)


def picture_format(path: Path) -> str:
    """Return what a picture's file is written as: ``png`` or ``svg``.

    Raises:
        UsageError: its name ends in neither.
    """
    form = path.suffix.lower().removeprefix(".")
    if form not in ("png", "svg"):
        raise UsageError(f"{path}: the name of a picture ends in .png or .svg")
    return form


class Output:
    """A standard stream while a command runs: where it cannot be written, the command goes on without it.

    A reader that has seen enough, such as `head`, ends nothing. A full disk, or a terminal that is gone, is said once,
    on the standard error stream, and counts as a failure when the command has ended.
    """

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.lost = False

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        self._guard(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what waits, if that is possible."""
        self._guard(self.stream.flush)

    def _guard(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as caught:
            with suppress(OSError, ValueError):  # a stream without a file, such as a notebook's
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if not self.lost and not isinstance(caught, BrokenPipeError):
                self.lost = True
                error(f"the output cannot be written: {caught.strerror}; what was to be printed is lost")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def guarded_output() -> Iterator[Output]:
    """Guard the standard streams (:class:`Output`) within the block, and yield the standard output."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):  # a name that the encoding lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    out = Output(sys.stdout)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, Output(sys.stderr))
    try:
        yield out
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


BETWEEN = 3  # characters between two columns of a table


def add_allow_local(parser: argparse.ArgumentParser) -> None:
    """Declare the option with which a user lets the files of a recipe's ``local`` run; the command line obeys it."""
    parser.add_argument(
        "--allow-local", action="store_true", help="run the Python files that the recipe names as `local`"
    )


def print_json(value: Any) -> None:
    """Print one JSON document to the standard output."""
    print(json.dumps(value, indent=2, default=str))


def terminal(*, stderr: bool = False) -> Console:
    """Return where commands print for people; a pipe or a file gets lines of 120 characters."""
    from rich.console import Console

    made = Console(stderr=stderr)
    return made if made.is_terminal or "COLUMNS" in os.environ else Console(stderr=stderr, width=120)


def written(value: Any) -> str:
    """Return a value as a recipe has it, on one line: ``true``, ``null``, ``[1, 2]``, ``{a: 1}``."""
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("...\n").strip()


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


def result_rows(result: Result) -> list[tuple[str, str, str, str]]:
    """Return name, expected, reached and best value of each metric as people read them; the expected ones first."""
    reached = {"parameters": result.parameters, **result.final}
    rows = []
    for name in dict.fromkeys([*result.expected, *reached]):
        best = result.best.get(name)
        said = f"{number(best['value'])} (epoch {best['epoch']:g})" if best else ""
        rows.append((name, number(result.expected.get(name)), number(reached.get(name)), said))
    return rows


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Sequence[str] = (),
    optional: Sequence[str] = (),
    width: int | None = None,
) -> Any:
    """Return a rich table of plain text, in which words stay whole where the terminal has room for them.

    Args:
        columns: headings.
        rows: cells; every one is printed as plain text.
        right: headings of the columns that are aligned to the right.
        optional: headings of the columns that are left out, the first one first, where words would be broken otherwise.
        width: characters a line; by default the terminal's.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[printable(cell) for cell in row] for row in rows]
    texts = {column: [column, *(row[n] for row in cells)] for n, column in enumerate(columns)}
    words = {column: max(len(word) for text in texts[column] for word in text.split() or [""]) for column in columns}
    lines = {column: max(len(line) for text in texts[column] for line in text.split("\n")) for column in columns}
    room, kept = terminal().width if width is None else width, list(columns)
    for column in optional:
        if sum(words[c] + BETWEEN for c in kept) > room + 1:
            kept.remove(column)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    widths = _shared([words[c] for c in kept], [lines[c] for c in kept], room + 1 - BETWEEN * len(kept))
    for column, own in zip(kept, widths, strict=True):
        made.add_column(column, justify="right" if column in right else "left", overflow="fold", width=own)
    for row in cells:
        made.add_row(*(Text(cell) for cell, column in zip(row, columns, strict=True) if column in kept))
    return made


def _shared(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Share the width of a terminal among columns: what remains goes to the narrowest, what lacks is the widest's."""
    widths = list(least)
    while sum(widths) > max(room, len(widths)):
        widths[widths.index(max(widths))] -= 1
    while sum(widths) < room and any(w < m for w, m in zip(widths, most, strict=True)):
        narrowest = min(w for w, m in zip(widths, most, strict=True) if w < m)
        n = next(n for n, w in enumerate(widths) if w == narrowest and w < most[n])
        widths[n] += 1
    return widths
