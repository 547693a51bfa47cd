"""A plugin's options: the types that a recipe's values can be checked against, and how they are written for people."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs

from trainkit.errors import PluginError

__all__ = ["Option", "annotation_of", "objection_to", "option_types", "options_of", "type_name", "wrong"]


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
            annotation = annotation_of(cls, option)
            objection = objection_to(annotation)
        except Exception as error:  # evaluating text may raise anything
            raise wrong(cls, option.name, f"its annotation {option.type!r} has no meaning: {error}") from error
        if objection:
            raise wrong(cls, option.name, objection)
        types[option.alias or option.name] = annotation
    return types


def type_name(annotation: Any) -> str:
    """Return a type as an author writes it: ``int | None``, ``list[str]``, ``Literal['a', 'b']``."""
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join("None" if member is NoneType else type_name(member) for member in arguments)
    if isinstance(annotation, type) and not arguments:
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def wrong(cls: type, name: str, what: str) -> PluginError:
    """Return the error for a field of a plugin's class."""
    return PluginError(f"class {cls.__name__} in {cls.__module__}, field {name!r}: {what}")


def annotation_of(cls: type, option: attrs.Attribute[Any]) -> Any:
    """Return what the annotation of one field means. Those of other fields may name what only type checkers import."""
    owner = next((base for base in cls.__mro__ if option.name in inspect.get_annotations(base)), cls)
    module = sys.modules.get(owner.__module__)
    names = vars(module) if module else {}
    alone = SimpleNamespace(__annotations__={option.name: option.type})
    return get_type_hints(alone, globalns=names, localns=dict(vars(owner)))[option.name]


def objection_to(annotation: Any, inside: type | None = None, exact: bool = False, seen: tuple[type, ...] = ()) -> str:
    """Return why omegaconf 2.4 cannot check values against a type, or the empty string.

    Args:
        annotation: the type, resolved.
        inside: ``list``, ``dict`` or ``tuple`` for the type of its elements.
        exact: it is a part of a union of several types, where omegaconf converts nothing.
        seen: the classes whose fields are being looked at; a class may hold itself.
    """
    origin = get_origin(annotation) or annotation
    arguments = get_args(annotation)
    name = type_name(annotation)
    is_class = isinstance(annotation, type) and (attrs.has(annotation) or dataclasses.is_dataclass(annotation))
    if inside is tuple and (origin in (list, dict, tuple) or is_class):
        return f"the elements of a tuple cannot be checked against {name}; use list[...] for the tuple"
    if inside in (list, dict) and origin is tuple:
        return f"no recipe can give {name} inside a list or dict; use list[...] for it"
    if exact and (annotation is Path or _is_enum(annotation) or (is_class and inside)):
        return f"a union of several types never holds {name}; use str, a Literal or dict[str, Any] for it"
    if origin is Literal:
        odd = [value for value in arguments if not isinstance(value, (str, int, float, NoneType)) or _is_enum(value)]
        return f"no recipe can give the value {odd[0]!r} of its Literal; use text or numbers" if odd else ""
    if origin is dict and arguments and arguments[0] is not str:
        return f"the keys of a recipe are text, and not {type_name(arguments[0])}; use dict[str, ...]"
    if origin in (Union, UnionType):
        members = [member for member in arguments if member is not NoneType]
        return _first_objection(members, inside, exact or len(members) > 1, seen)
    if origin in (list, dict, tuple):
        return _first_objection([element for element in arguments if element is not Ellipsis], origin, exact, seen)
    if is_class:
        return "" if annotation in seen else _class_objection(annotation, (*seen, annotation))
    if annotation in (Any, bool, int, float, str, Path) or _is_enum(annotation):
        return ""
    return (
        f"a recipe's value cannot be checked against {name}; use bool, int, float, str, Path, Enum, Literal, list[T], "
        "tuple[T, ...], dict[str, T], a union of them, Any, or an attrs class"
    )


def _first_objection(types: Iterable[Any], inside: type | None, exact: bool, seen: tuple[type, ...]) -> str:
    for each in types:
        if objection := objection_to(each, inside, exact, seen):
            return objection
    return ""


def _class_objection(cls: type, seen: tuple[type, ...]) -> str:
    """Look at all fields of a nested class: omegaconf takes those that are not for its constructor, too."""
    annotations = get_type_hints(cls)
    fields = attrs.fields(cls) if attrs.has(cls) else dataclasses.fields(cls)
    for each in fields:
        if objection := objection_to(annotations.get(each.name), seen=seen):
            return f"in {cls.__name__}, field {each.name!r}: {objection}"
    return ""


def _is_enum(value: object) -> bool:
    return isinstance(value, Enum) or (isinstance(value, type) and issubclass(value, Enum))


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
    section = re.search(r"^Args:\n((?:[ \t]+\S.*\n?|\n)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    entries = re.findall(r"^    (\w+): *(.*(?:\n     .*)*)", section[1] if section else "", re.MULTILINE)
    meanings = {name: " ".join(text.split()) for name, text in entries}
    defaults = {option.alias or option.name: option.default for option in attrs.fields(cls) if option.init}
    return [
        Option(name, _notation(annotation), _default(defaults[name]), meanings.get(name, ""))
        for name, annotation in option_types(cls).items()
    ]


def _notation(annotation: Any) -> str:
    """Return a type as a recipe's value is written: ``[int, ...]`` for a list of integers."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(map(_value, arguments))
    if origin in (Union, UnionType):
        has_both = int in arguments and float in arguments
        names = ["number" if has_both and each in (int, float) else _notation(each) for each in arguments]
        return " or ".join(dict.fromkeys(names))
    if origin is tuple and arguments[-1:] != (...,):
        return f"[{', '.join(map(_notation, arguments))}]"
    if origin in (list, tuple):
        return f"[{_notation(arguments[0])}, ...]"
    if origin is dict:
        return f"{{{': '.join(map(_notation, arguments))}}}"
    if _is_enum(annotation):
        return " or ".join(member.name for member in annotation)
    known = {NoneType: "null", Path: "path", Any: "any"}
    return known.get(annotation) or type_name(annotation)


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
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, float) and len(repr(value)) > 8:
        return f"{value:.4g}"
    return str(value) or '""'
