"""What can go wrong, one class a kind of failure, each with the exit code of the command that meets it.

A message is one paragraph that names the place (file, key, plugin) and the cure. The command line prints it without a
traceback; ``--traceback`` shows where it was raised.
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "CheckpointError",
    "DataError",
    "PluginError",
    "RecipeError",
    "RunError",
    "TrainkitError",
    "UsageError",
    "did_you_mean",
]


class TrainkitError(Exception):
    """Every failure that trainkit foresees."""

    exit_code = 2


class UsageError(TrainkitError):
    """The command line is wrong."""


class RecipeError(TrainkitError):
    """A recipe is wrong: its file, a key, a type or a value."""


class PluginError(TrainkitError):
    """A plugin is missing, broken, misplaced or does not keep the contract."""


class DataError(TrainkitError):
    """The data are missing, incomplete or cannot be decoded."""


class CheckpointError(TrainkitError):
    """A checkpoint is missing, damaged or not one of ours."""


class RunError(TrainkitError):
    """The recipe was right and the run failed."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'se'?"`` for the known name nearest to `name`, or the empty string."""
    close = get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
