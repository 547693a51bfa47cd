"""What the author of a plugin imports: the class decorator and the hook marker.

Nothing here imports torch: a plugin decides for itself what it needs.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterable
from contextlib import suppress
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

import attrs
import pluggy

from trainkit.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Option", "hookimpl", "matching_modules", "options_of", "plugin"]

C = TypeVar("C", bound=type)

#: Marks a method as the implementation of the hook of the same name. It takes no options: order is the recipe's order.
hookimpl = pluggy.HookimplMarker("trainkit")

# eq=False: two plugins with equal options are still two plugins, each with its own state.
_define: Callable[[Any], Any] = attrs.define(eq=False, kw_only=True)


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(attrs.field,))
def plugin(cls: C) -> C:
    """Turn a class into a plugin: its attrs fields are the keys that a recipe may give it.

    Types and validators of the fields are the check of those keys, and the first line of the class's docstring is the
    plugin's summary. State that is not an option is declared with ``field(init=False)``. Optional class attributes
    (annotate them with ``ClassVar``):

    * ``after``, ``before``: names of plugins that it must follow or precede in a recipe;
    * ``conflicts``: names of plugins that it cannot run beside;
    * ``claims``: exclusive slots, such as ``"lr_schedule"``, that no second plugin may claim;
    * ``hookspecs``: classes of :func:`trainkit.hookspec` methods that it offers to other plugins.
    """
    return _define(cls)  # type: ignore[no-any-return]


@attrs.frozen
class Option:
    """One option of a plugin, as its class states it. Types and defaults are written as in a recipe.

    Args:
        name: its key in a recipe.
        type: such as ``int``, ``[float, float]`` or ``epoch or step``.
        default: such as ``0.1``, ``null`` or ``required``.
        meaning: its entry under ``Args:`` in the class's docstring; empty where there is none.
    """

    name: str
    type: str
    default: str
    meaning: str


def options_of(cls: type) -> list[Option]:
    """Return a plugin's options: types and defaults from its fields, meanings from its docstring."""
    with suppress(NameError):  # an annotation that only type checkers can resolve is shown as it is written
        attrs.resolve_types(cls)
    section = re.search(r"^Args:\n((?:[ \t]+\S.*\n?|\n)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    entries = re.findall(r"^    (\w+): *(.*(?:\n     .*)*)", section[1] if section else "", re.MULTILINE)
    meanings = {name: " ".join(text.split()) for name, text in entries}
    return [
        Option(name, _type(field.type), _default(field.default), meanings.get(name, ""))
        for field in attrs.fields(cls)
        if field.init and (name := field.alias or field.name)
    ]


def _type(annotation: Any) -> str:
    """Return a type as in a recipe: ``[int, ...]`` for a list of integers."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(map(_value, args))
    if origin in (Union, types.UnionType):
        names = ["number" if {int, float} <= {*args} and a is int else _type(a) for a in args]
        return " or ".join(n for n in names if n != "float" or "number" not in names)
    if origin is tuple and args[-1:] != (...,):
        return f"[{', '.join(map(_type, args))}]"
    if origin in (list, tuple):
        return f"[{_type(args[0])}, ...]"
    if origin is dict:
        return f"{{{': '.join(map(_type, args))}}}"
    known = {types.NoneType: "null", Path: "path", Any: "any"}
    return known.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _default(default: Any) -> str:
    if default is attrs.NOTHING:
        return "required"
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return "computed" if default.takes_self else _value(default.factory())
    return _value(default)


def _value(value: Any) -> str:
    """Return a value as in a recipe, floats to four digits where they have no short form."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, float) and len(repr(value)) > 8:
        return f"{value:.4g}"
    return str(value) or '""'


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
