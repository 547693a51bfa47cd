"""What pytest finds by itself where trainkit is installed; imports neither torch nor the rest until a test asks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from trainkit.run import Run


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., Run]:
    """Train a tiny run, ``tiny_run({"grad_clip": GradClip()}, steps=2)``, and keep its directory, ``run.dir.path``.

    The arguments are those of :func:`trainkit.testing.run_steps`.
    """
    from trainkit.testing import run_steps

    numbers = count(1)
    return lambda plugins, **options: run_steps(plugins, run_dir=tmp_path / f"run-{next(numbers)}", **options)
