"""What can go wrong, one class a kind of failure, each with the exit code of the command that meets it.

A message is one paragraph that names the place (file, key, plugin) and the cure. The command line prints it without a
traceback; ``--traceback`` shows where it was raised.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from trainkit.hooks import LoadedPlugin

__all__ = [
    "Blame",
    "CheckpointError",
    "DataError",
    "PluginError",
    "RecipeError",
    "RunError",
    "TrainkitError",
    "UsageError",
    "blame",
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


class Blame(NamedTuple):
    """The plugin that an exception came through, and where in it: a hook, or else the function's own name."""

    plugin: LoadedPlugin
    where: str

    def __str__(self) -> str:
        return f"{self.plugin}, {self.where}"


def blame(error: BaseException, plugins: Iterable[LoadedPlugin]) -> list[Blame]:
    """Return which plugins an exception came through, by its traceback, the innermost first; none where it did not.

    A frame of the traceback belongs to a plugin if it runs the plugin's code, or a method of what the plugin made: the
    scheduler, context manager, module, optimizer, transform or data set that one of its hooks returned
    (:attr:`LoadedPlugin.made`), whatever library these are of.

    Args:
        error: an exception that was raised.
        plugins: the plugins of the run.
    """
    found: list[Blame] = []
    plugins = list(plugins)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for position in reversed(range(len(frames))):
        frame = frames[position]
        caller = frames[position - 1] if position else None
        for plugin in plugins:
            where = _place(frame, caller, plugin, plugins)
            if where is None:
                continue
            last = found[-1] if found else None
            if last is None or last.plugin is not plugin:
                found.append(Blame(plugin, where))
            elif last.where not in plugin.hooks and where in plugin.hooks:  # a hook says more than a helper's name
                found[-1] = Blame(plugin, where)
            break
    return found


def _place(frame: FrameType, caller: FrameType | None, plugin: LoadedPlugin, plugins: list[LoadedPlugin]) -> str | None:
    """Return where in the plugin a frame is, or None where it does not belong to the plugin."""
    code = frame.f_code
    receiver = frame.f_locals.get("self")
    if receiver is plugin.instance:
        return code.co_name
    for hook, made in plugin.made:
        if receiver is made:
            return hook
        # A function has no receiver: it is told by its code, and only where the core itself called it.
        if code is _code(made) and caller is not None and _module(caller).partition(".")[0] == "trainkit":
            return hook
    cls = type(plugin.instance)
    if isinstance(receiver, cls):
        return None  # the same plugin listed twice: this frame belongs to the other instance
    module = _module(frame)
    if module == cls.__module__ and code.co_qualname.startswith(f"{cls.__qualname__}."):
        return code.co_qualname.removeprefix(f"{cls.__qualname__}.").partition(".")[0]
    package = cls.__module__.partition(".")[0]
    alone = sum(type(other.instance).__module__.partition(".")[0] == package for other in plugins) == 1
    if package != "trainkit" and alone and module.partition(".")[0] == package:
        return code.co_name
    return None


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _code(made: Any) -> Any:
    while isinstance(made, partial):
        made = made.func
    return inspect.unwrap(made).__code__ if inspect.isfunction(made) else None
