"""Plugins in files beside a recipe. A recipe names them; only the user, or a Python program, lets them run."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import attrs

from trainkit.errors import PluginError, RecipeError
from trainkit.registry import installed
from trainkit.rundir import MAX_JSON, read_regular

if TYPE_CHECKING:
    from trainkit.recipe import Recipe

__all__ = ["allow_local", "local_classes", "local_files"]

_allowed: ContextVar[bool] = ContextVar("allow_local", default=False)


@contextmanager
def allow_local() -> Iterator[None]:
    """Let the files that recipes name as ``local`` run within the block: ``with trainkit.allow_local(): ...``.

    They are code. Allow it for recipes and run directories that you trust.
    """
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def local_files(recipe: Recipe) -> dict[str, Path]:
    """Return the files of a recipe's ``local`` by what it calls them.

    Raises:
        RecipeError: one lies outside the folder of the recipe, or the recipe was not read from a file.
    """
    if recipe.local and recipe.path is None:
        raise RecipeError("local: names files beside a recipe, and this recipe was not read from a file")
    found = {}
    for name in recipe.local:
        assert recipe.path is not None
        folder = recipe.path.parent.resolve()
        path = folder / name
        try:
            inside = path.resolve().is_relative_to(folder)
        except (OSError, RuntimeError, ValueError):  # links that lead in a circle
            inside = False
        if not inside or path.suffix != ".py":
            raise RecipeError(f"{recipe.where}: local: {name!r}: expected a Python file in the recipe's own folder")
        found[name] = path
    return found


def local_classes(recipe: Recipe) -> dict[str, type]:
    """Import the files that a recipe names as ``local``, and return the plugins that they define, by name.

    A class ``MyLoss`` is the plugin ``my_loss``.

    Raises:
        RecipeError: a file cannot be read.
        PluginError: nobody allowed it, a file fails at import or defines no plugin, or a name is taken.
    """
    files = local_files(recipe)
    if files and not _allowed.get():
        raise PluginError(
            f"{recipe.where}: local: {', '.join(files)}: code, which a recipe alone does not run; read it, and if you "
            "trust it, pass --allow-local (in Python: `with trainkit.allow_local():`)"
        )
    found: dict[str, type] = {}
    for name, path in files.items():
        place = f"{recipe.where}: local: {name}"
        module = _load(path, place)
        classes = {_plugin_name(cls.__name__): cls for cls in vars(module).values() if _is_plugin(cls, module)}
        if not classes:
            raise PluginError(f"{place}: defines no plugin: no class with @plugin that implements a hook")
        for each, cls in classes.items():
            if each in found or each in installed():
                owner = "another file" if each in found else installed()[each][0].distribution
                raise PluginError(f"{place}: the plugin {each!r} ({cls.__name__}) is {owner}'s, too; rename the class")
            found[each] = cls
    return found


def _load(path: Path, place: str) -> ModuleType:
    """Run a file as a module of its own, once for each content; nothing is written beside it."""
    try:
        source = read_regular(path, MAX_JSON)
    except OSError as error:
        raise RecipeError(f"{place}: cannot be read: {error.strerror}") from error
    digest = blake2b(source + str(path).encode(), digest_size=8).hexdigest()
    name = f"trainkit_local_{re.sub(r'[^A-Za-z0-9]', '_', path.stem)}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # before it runs: attrs resolves types through it
    try:
        exec(compile(source, path, "exec"), vars(module))
    except BaseException as error:
        del sys.modules[name]
        if type(error) is KeyboardInterrupt:  # the user's
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        raise PluginError(f"{place}: failed at import: {said}") from error
    return module


def _is_plugin(value: object, module: ModuleType) -> bool:
    """Tell a plugin that the module defines from what it imports, and from the classes of its options."""
    if not inspect.isclass(value) or value.__module__ != module.__name__ or not attrs.has(value):
        return False
    return any(hasattr(member, "trainkit_impl") for _, member in inspect.getmembers(value))


def _plugin_name(cls: str) -> str:
    """Return ``my_ema_loss`` for ``MyEMALoss``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls).lower()
