"""What the author of a plugin imports: the class decorator and the hook marker.

Nothing here imports torch: a plugin decides for itself what it needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    TypeVar,
    dataclass_transform,
)

import attrs
import pluggy
from attrs.exceptions import UnannotatedAttributeError

from trainkit.errors import RecipeError
from trainkit.hookspecs import PHASES
from trainkit.options import annotation_of, objection_to, wrong

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "declared",
    "hookimpl",
    "is_observer",
    "matching_modules",
    "plugin",
    "recipe_file",
    "watches_in_every_process",
]

C = TypeVar("C", bound=type)

#: Marks a method as the implementation of the hook of the same name. It takes no options: order is the recipe's order.
hookimpl = pluggy.HookimplMarker("trainkit")

# auto_attribs=True: an untyped field is an error. By default attrs would then pass over the typed ones beside it.
# eq=False: two plugins with equal options are still two plugins, each with its own state.
_define: Callable[[Any], Any] = attrs.define(auto_attribs=True, eq=False, kw_only=True)


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(attrs.field,))
def plugin(cls: C) -> C:
    """Turn a class into a plugin: its attrs fields are the keys that a recipe may give it.

    Types and validators of the fields are the check of those keys, and the first line of the class's docstring is the
    plugin's summary. State that is not an option is declared with ``field(init=False)``.

    An option's type is one of these:

    * ``bool``, ``int``, ``float``, ``str``, ``pathlib.Path``, an ``Enum`` (by a member's name), a ``Literal``, ``Any``;
    * ``list[T]`` and ``dict[str, T]``, of any of these but tuples; bare ``list`` and ``dict`` take all elements;
    * ``tuple[T, ...]`` and ``tuple[T, U]``: a recipe's list becomes a tuple. Its elements are neither lists, dicts,
      tuples nor classes;
    * ``T | None``, and unions of several types, which convert no element: there is no ``Path`` and no ``Enum`` in them,
      no class in their lists and dicts, and ``float | Literal["auto"]`` refuses ``1`` (write ``int | float | ...``);
    * an attrs class or a dataclass whose own fields have these types: a recipe's mapping becomes an instance of it.

    Optional class attributes (annotate them with ``ClassVar``):

    * ``after``, ``before``: names of plugins that it must follow or precede in a recipe;
    * ``conflicts``: names of plugins that it cannot run beside;
    * ``claims``: exclusive slots, such as ``"lr_schedule"``, that no second plugin may claim. ``"checkpoints"`` is the
      run directory's ``checkpoints/last.pt``, ``"terminal"`` what shows progress: ``trainkit run`` warns without them;
    * ``observer = True``: it only watches. Leaving it out changes no bit of weights and metrics, so it may be dropped
      or added when a run is resumed;
    * ``every_process = True``, of an observer: where several processes train a run, it watches in each of them, and
      adds up what they see with ``run.processes.all_reduce``; else it watches in the first one alone;
    * ``without_effect``: options that cannot change a bit of a result, such as where the data lie;
    * ``hookspecs``: classes of :func:`trainkit.hookspec` methods that it offers to other plugins.

    Raises:
        PluginError: a field or one of these attributes is wrong; the message names class, field and cure.
    """
    try:
        made: C = _define(cls)
    except UnannotatedAttributeError as error:
        annotated = inspect.get_annotations(cls)
        made_by_field = type(attrs.field())
        fields = [name for name, value in vars(cls).items() if isinstance(value, made_by_field)]
        untyped = [name for name in fields if name not in annotated]
        raise wrong(cls, untyped[0], f"it has no type; write `{untyped[0]}: int = field(...)`") from error
    _check_fields(made)
    _check_declarations(made)
    _check_state(made)
    return made


def recipe_file(*, files: Callable[[Path], Iterable[Path]] | None = None, **options: Any) -> Any:
    """Return an option of type ``Path`` that names a file beside the recipe, such as a published curve or weights.

    A relative path is relative to the recipe's own file, and the run directory keeps a copy of the file, so that it can
    be moved. Data sets are no such files: paths to them are relative to the current folder.

    Args:
        files: where the option names a folder, such as an earlier run's, gives those of its files that are needed:
            these are kept, and what a number depends on has their contents.
        options: ``default``, ``validator`` and others, as for :func:`attrs.field`.
    """
    return attrs.field(metadata={"recipe_file": True, "files": files}, **options)


def declared(cls: type, constraint: str) -> tuple[Any, ...]:
    """Return what a plugin's class declares as ``after``, ``before``, ...; an option of that name declares nothing."""
    if constraint in attrs.fields_dict(cls):
        return ()
    return tuple(getattr(cls, constraint, ()))


def is_observer(cls: type) -> bool:
    """Tell whether a plugin's class says that it only watches: ``observer = True``."""
    return _flag(cls, "observer")


def watches_in_every_process(cls: type) -> bool:
    """Tell whether an observer's class says ``every_process = True``; else the first process alone has it."""
    return _flag(cls, "every_process")


def _flag(cls: type, name: str) -> bool:
    return name not in attrs.fields_dict(cls) and bool(getattr(cls, name, False))


def _check_fields(cls: type) -> None:
    hooks = {name for phase in PHASES for name in vars(phase) if not name.startswith("_")}
    for option in attrs.fields(cls):
        name = option.name
        if isinstance(option.default, (list, dict, set)):
            cure = f"field(factory=lambda: {option.default!r})"
            raise wrong(cls, name, f"all instances would share its mutable default; write `{name}: ... = {cure}`")
        if not option.init:
            continue
        if name in hooks:
            raise wrong(cls, name, f"{name!r} is a hook's name, so the class could not implement it; rename the option")
        try:
            objection = objection_to(annotation_of(cls, option))
        except Exception:  # it may name what its module defines further down: option_types() comes back to it
            continue
        if objection:
            raise wrong(cls, name, objection)


def _check_declarations(cls: type) -> None:
    for flag in ("observer", "every_process"):
        given = getattr(cls, flag, False)
        if flag not in attrs.fields_dict(cls) and not isinstance(given, bool):
            raise wrong(cls, flag, f"expected True or False, got {given!r}")
    if watches_in_every_process(cls) and not is_observer(cls):
        raise wrong(
            cls,
            "every_process",
            "it is for observers: any other plugin takes part in every process; add `observer = True`, or remove it",
        )
    for constraint in ("after", "before", "conflicts", "claims", "without_effect", "hookspecs"):
        if constraint in attrs.fields_dict(cls):
            continue
        given = getattr(cls, constraint, ())
        kind, member = (type, "class") if constraint == "hookspecs" else (str, "name")
        if not isinstance(given, (tuple, list, set, frozenset)) or not all(isinstance(each, kind) for each in given):
            example = "..."
            if isinstance(given, kind):
                example = given.__name__ if isinstance(given, type) else repr(given)
            raise wrong(
                cls, constraint, f"expected a tuple with one {member} or more; write `{constraint} = ({example},)`"
            )


def _check_state(cls: type) -> None:
    for method, other in (("state_dict", "load_state_dict"), ("load_state_dict", "state_dict")):
        if hasattr(cls, method) and not hasattr(cls, other):
            raise wrong(
                cls, method, f"a checkpoint needs both {method} and {other}; add `{other}`, or remove `{method}`"
            )


def matching_modules(model: nn.Module, patterns: Iterable[str], key: str) -> dict[str, nn.Module]:
    """Return the modules whose paths match one of the patterns, by path, in the network's own order.

    Args:
        model: the network.
        patterns: shell patterns, component by component: in ``stages.*.*.bn2`` each ``*`` is one component of a path.
        key: the option that holds the patterns, for the error.

    Raises:
        RecipeError: a pattern matches nothing.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    matched = set()
    for pattern in patterns:
        parts = pattern.split(".")
        found = [p for p in modules if p.count(".") + 1 == len(parts) and all(map(fnmatchcase, p.split("."), parts))]
        if not found:
            near = ", ".join(repr(p) for p in get_close_matches(pattern, modules, n=5, cutoff=0.3)) or "none"
            raise RecipeError(
                f"{key!r}: {pattern!r} matches no module of the network; modules with similar paths: {near}"
            )
        matched.update(found)
    return {path: module for path, module in modules.items() if path in matched}
