"""What the author of a plugin imports: the class decorator and the hook marker.

Nothing here imports torch: a plugin decides for itself what it needs.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import attrs
import pluggy
from attrs.exceptions import UnannotatedAttributeError

from trainkit.errors import PluginError, RecipeError
from trainkit.hookspecs import PHASES

if TYPE_CHECKING:
    from torch import nn

__all__ = ["declared", "hookimpl", "matching_modules", "option_types", "plugin"]

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
    * ``T | None`` and other unions. A union converts no scalar: neither ``Path`` nor ``Enum`` stands in it beside other
      types, and ``float | Literal["auto"]`` refuses ``1``, so write ``int | float`` there. Inside a list or dict it
      holds no class;
    * an attrs class or a dataclass whose own fields have these types: a recipe's mapping becomes an instance of it.

    Optional class attributes (annotate them with ``ClassVar``):

    * ``after``, ``before``: names of plugins that it must follow or precede in a recipe;
    * ``conflicts``: names of plugins that it cannot run beside;
    * ``claims``: exclusive slots, such as ``"lr_schedule"``, that no second plugin may claim;
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
        raise _wrong(cls, untyped[0], f"it has no type; write `{untyped[0]}: int = field(...)`") from error
    _check_fields(made)
    _check_declarations(made)
    _check_state(made)
    return made


def declared(cls: type, constraint: str) -> tuple[Any, ...]:
    """Return what a plugin's class declares as ``after``, ``before``, ...; an option of that name declares nothing."""
    if constraint in attrs.fields_dict(cls):
        return ()
    return tuple(getattr(cls, constraint, ()))


def option_types(cls: type) -> dict[str, Any]:
    """Return the type of each option of a class, by the name that a recipe gives it.

    Raises:
        PluginError: an annotation has no meaning, or omegaconf cannot check it.
    """
    types = {}
    for option in attrs.fields(cls):
        if not option.init:
            continue
        try:
            annotation = _annotation(cls, option)
            objection = _objection(annotation)
        except Exception as error:  # evaluating text may raise anything
            raise _wrong(cls, option.name, f"its annotation {option.type!r} has no meaning: {error}") from error
        if objection:
            raise _wrong(cls, option.name, objection)
        types[option.alias or option.name] = annotation
    return types


def _wrong(cls: type, name: str, what: str) -> PluginError:
    return PluginError(f"class {cls.__name__} in {cls.__module__}, field {name!r}: {what}")


def _check_fields(cls: type) -> None:
    hooks = {name for phase in PHASES for name in vars(phase) if not name.startswith("_")}
    for option in attrs.fields(cls):
        name = option.name
        if isinstance(option.default, (list, dict, set)):
            cure = f"field(factory=lambda: {option.default!r})"
            raise _wrong(cls, name, f"all instances would share its mutable default; write `{name}: ... = {cure}`")
        if not option.init:
            continue
        if name in hooks:
            raise _wrong(
                cls, name, f"{name!r} is a hook's name, so the class could not implement it; rename the option"
            )
        try:
            objection = _objection(_annotation(cls, option))
        except Exception:  # it may name what its module defines further down: option_types() comes back to it
            continue
        if objection:
            raise _wrong(cls, name, objection)


def _check_declarations(cls: type) -> None:
    for constraint in ("after", "before", "conflicts", "claims", "hookspecs"):
        if constraint in attrs.fields_dict(cls):
            continue
        given = getattr(cls, constraint, ())
        kind, member = (type, "class") if constraint == "hookspecs" else (str, "name")
        if not isinstance(given, (tuple, list, set, frozenset)) or not all(isinstance(each, kind) for each in given):
            one = given if isinstance(given, kind) else None
            example = getattr(one, "__name__", repr(one)) if one is not None else "..."
            raise _wrong(
                cls, constraint, f"expected a tuple with one {member} or more; write `{constraint} = ({example},)`"
            )


def _check_state(cls: type) -> None:
    for method, other in (("state_dict", "load_state_dict"), ("load_state_dict", "state_dict")):
        if hasattr(cls, method) and not hasattr(cls, other):
            raise _wrong(
                cls, method, f"a checkpoint needs both {method} and {other}; add `{other}`, or remove `{method}`"
            )


def _annotation(cls: type, option: attrs.Attribute[Any]) -> Any:
    """Return what the annotation of one field means. Those of other fields may name what only type checkers import."""
    owner = next((base for base in cls.__mro__ if option.name in inspect.get_annotations(base)), cls)
    module = sys.modules.get(owner.__module__)
    names = vars(module) if module else {}
    alone = SimpleNamespace(__annotations__={option.name: option.type})
    return get_type_hints(alone, globalns=names, localns=dict(vars(owner)), include_extras=True)[option.name]


def _objection(annotation: Any, inside: type | None = None, seen: tuple[type, ...] = ()) -> str:
    """Return why omegaconf 2.4 cannot check values against a type, or the empty string.

    Args:
        annotation: the type, resolved.
        inside: ``list``, ``dict`` or ``tuple`` for the type of its elements.
        seen: the classes whose fields are being looked at; a class may hold itself.
    """
    origin = get_origin(annotation) or annotation
    arguments = get_args(annotation)
    is_class = isinstance(annotation, type) and (attrs.has(annotation) or dataclasses.is_dataclass(annotation))
    if origin is Annotated:
        return _objection(arguments[0], inside, seen)
    if origin in (Union, UnionType):
        return _union_objection(arguments, inside, seen)
    if inside is tuple and (origin in (list, dict, tuple) or is_class):
        return (
            f"the elements of a tuple cannot be checked against {_type_name(annotation)}; use list[...] for the tuple"
        )
    if inside in (list, dict) and origin is tuple:
        return f"no recipe can give {_type_name(annotation)} inside a list or dict; use list[...] for it"
    if origin is Literal:
        odd = [value for value in arguments if not isinstance(value, (str, int, float, NoneType)) or _is_enum(value)]
        return f"no recipe can give the value {odd[0]!r} of its Literal; use text or numbers" if odd else ""
    if origin is dict and arguments and arguments[0] is not str:
        return f"the keys of a recipe are text, and not {_type_name(arguments[0])}; use dict[str, ...]"
    if origin in (list, dict, tuple):
        for element in arguments:
            if element is not Ellipsis and (objection := _objection(element, origin, seen)):
                return objection
        return ""
    if is_class:
        return "" if annotation in seen else _class_objection(annotation, (*seen, annotation))
    if annotation in (Any, bool, int, float, str, Path) or _is_enum(annotation):
        return ""
    return (
        f"a recipe's value cannot be checked against {_type_name(annotation)}; use bool, int, float, str, Path, Enum, "
        "Literal, list[T], tuple[T, ...], dict[str, T], a union of them, Any, or an attrs class"
    )


def _union_objection(members: tuple[Any, ...], inside: type | None, seen: tuple[type, ...]) -> str:
    members = tuple(member for member in members if member is not NoneType)
    for member in members:
        if len(members) > 1 and (member is Path or _is_enum(member)):
            return f"a union with other types never becomes {_type_name(member)}; use str, or Literal, instead of it"
        if len(members) > 1 and inside and isinstance(member, type) and not get_origin(member) and attrs.has(member):
            return f"a union inside a list or dict never becomes {_type_name(member)}; use dict[str, Any] instead of it"
        if objection := _objection(member, inside, seen):
            return objection
    return ""


def _class_objection(cls: type, seen: tuple[type, ...]) -> str:
    """Look at all fields of a nested class: omegaconf takes those that are not for its constructor, too."""
    annotations = get_type_hints(cls, include_extras=True)
    fields = attrs.fields(cls) if attrs.has(cls) else dataclasses.fields(cls)
    for each in fields:
        if objection := _objection(annotations.get(each.name), None, seen):
            return f"in {cls.__name__}, field {each.name!r}: {objection}"
    return ""


def _is_enum(value: object) -> bool:
    return isinstance(value, Enum) or (isinstance(value, type) and issubclass(value, Enum))


def _type_name(annotation: Any) -> str:
    plain = isinstance(annotation, type) and not get_args(annotation)
    return annotation.__name__ if plain else str(annotation).replace("typing.", "")


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
