"""What a notebook shows of a result: a table, and the run's pictures beside it."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.cli.output import number, result_rows
from trainkit.rundir import read_regular

if TYPE_CHECKING:
    from trainkit.session import Result

__all__ = ["result_html"]

MAX_PICTURE = 1 << 24  # bytes


def result_html(result: Result) -> str:
    """Return what was expected and reached as HTML, with the pictures of the run's ``figures/`` in it."""
    rows = []
    for name, expected, reached, best in result_rows(result):
        cells = "".join(f"<td style='text-align:right'>{escape(text)}</td>" for text in (expected, reached, best))
        rows.append(f"<tr><td style='text-align:left'>{escape(name)}</td>{cells}</tr>")
    head = "".join(f"<th style='text-align:right'>{text}</th>" for text in ("", "expected", "reached", "best"))
    reason = f" by {result.reason}" if result.status == "stopped" and result.reason else ""
    where = f", {result.path}" if result.path else ""
    speed = f", {number(round(result.images_per_second))} images/s" if result.images_per_second else ""
    line = escape(f"{result.status}{reason} in {result.seconds['total']:.1f} s{speed}{where}")
    pictures = "".join(map(_picture, sorted((result.path / "figures").glob("*.png")) if result.path else []))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table><p>{line}</p>{pictures}"


def _picture(path: Path) -> str:
    try:
        data = base64.b64encode(read_regular(path, MAX_PICTURE)).decode()
    except OSError:
        return ""
    name = escape(path.stem, quote=True)
    return f"<img src='data:image/png;base64,{data}' alt='{name}' title='{name}' style='max-width:49%'>"
