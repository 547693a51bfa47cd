"""Write a JSON Schema of recipes, with which editors complete and check them."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from trainkit.cli.output import printable
from trainkit.errors import PluginError
from trainkit.options import option_types, options_of
from trainkit.recipe import Recipe
from trainkit.registry import PLUGINS, Installed, installed
from trainkit.rundir import atomic_write

__all__ = ["SCHEMA", "recipe_schema"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
LABEL = "@[A-Za-z0-9_-]+"
BOUNDS = {">": "exclusiveMinimum", ">=": "minimum", "<": "exclusiveMaximum", "<=": "maximum"}
PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", NoneType: "null"}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe: its keys, and every installed plugin with its options.

    A plugin that cannot be imported, or that two packages claim, is let pass without its options. Required options of
    plugins are not demanded, because an inherited recipe may give them.
    """
    plugins = {name: _plugin_schema(name, found) for name, found in sorted(installed(PLUGINS).items())}
    labelled = {f"^{re.escape(name)}{LABEL}$": {"$ref": f"#/$defs/{name}"} for name in plugins}
    keys = _options_schema(Recipe)
    del keys["path"]
    listed: dict[str, Any] = {
        "type": "object",
        "description": "Options by plugin, in the order in which they are called.",
        "properties": {name: {"$ref": f"#/$defs/{name}"} for name in plugins},
        "patternProperties": labelled,
        "additionalProperties": False,
    }
    extends = {"type": "string", "description": "Another recipe, in the same folder or below; later keys win."}
    return {
        "$schema": DIALECT,
        "title": "trainkit recipe",
        "type": "object",
        "properties": {**keys, "extends": extends, "plugins": listed},
        "additionalProperties": False,
        "if": {"not": {"required": ["extends"]}},
        "then": {"required": ["name", "epochs", "batch_size"]},
        "$defs": plugins,
    }


def _plugin_schema(name: str, found: list[Installed]) -> dict[str, Any]:
    """Return what may stand behind a plugin's name: options, nothing, or false, which drops it."""
    try:
        cls = found[0].load()
        options = _options_schema(cls) if len(found) == 1 else None
        summary = (inspect.getdoc(cls) or "").partition("\n")[0]
    except Exception as error:  # importing a stranger's plugin may raise anything
        print(f"warning: {printable(name)}: its options are unknown: {printable(error)}", file=sys.stderr)
        options, summary = None, found[0].summary
    body: dict[str, Any] = {"type": "object"}
    if options is not None:
        body |= {"properties": options, "additionalProperties": False}
    return {"description": summary, "anyOf": [body, {"type": ["null", "boolean"]}]}


def _options_schema(cls: type) -> dict[str, Any]:
    """Return the schema of each option of a class, with default, meaning and range."""
    meanings = {option.name: option for option in options_of(cls)} if cls is not Recipe else _recipe_meanings()
    fields = {field.alias or field.name: field for field in attrs.fields(cls) if field.init}
    schemas = {}
    for name, annotation in option_types(cls).items():
        schema = _type_schema(annotation)
        _bound(schema, fields[name].validator)
        if name in meanings and meanings[name].meaning:
            schema["description"] = meanings[name].meaning.replace("``", "`")
        default = fields[name].default
        if default is None or isinstance(default, bool | int | float | str):
            schema["default"] = default
        schemas[name] = schema
    return schemas


def _recipe_meanings() -> Mapping[str, Any]:
    try:
        return {option.name: option for option in options_of(Recipe)}
    except PluginError:  # its keys have types that no plugin's option has
        return {}


def _type_schema(annotation: Any) -> dict[str, Any]:
    """Return the schema of a type that an option may have."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, UnionType):
        return {"anyOf": [_type_schema(member) for member in arguments]}
    if origin is tuple and arguments[-1:] != (...,):
        items = [_type_schema(member) for member in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin in (list, tuple):
        return {"type": "array", "items": _type_schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type_schema(arguments[1])}
    if annotation in PLAIN:
        return {"type": PLAIN[annotation]}
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return {"enum": [member.name for member in annotation]}
    if isinstance(annotation, type) and attrs.has(annotation):
        return {"type": "object", "properties": _options_schema(annotation), "additionalProperties": False}
    return {"type": "array"} if annotation in (list, tuple) else {"type": "object"} if annotation is dict else {}


def _bound(schema: dict[str, Any], validator: Any) -> None:
    """Add the range that an attrs validator states to the schema of a number, or to that of each number of a list.

    What another validator checks is left to trainkit.
    """
    for inner in getattr(validator, "_validators", ()):  # and_
        _bound(schema, inner)
    if hasattr(validator, "member_validator"):  # deep_iterable
        _bound(schema.get("items", {}), validator.member_validator)
    elif hasattr(validator, "compare_op") and hasattr(validator, "bound"):
        for target in [schema, *schema.get("anyOf", ())]:
            if target.get("type") in ("integer", "number"):
                target[BOUNDS[validator.compare_op]] = validator.bound
    elif hasattr(validator, "validator"):  # optional
        _bound(schema, validator.validator)


class _Schema:
    """``trainkit recipes schema``."""

    HELP = "Write a JSON Schema of recipes, with the options of every installed plugin."
    EXAMPLES = """\
examples:
  trainkit recipes schema -o recipes/schema.json
  then, in a recipe's first line: # yaml-language-server: $schema=schema.json
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write there (default: print it)")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Print or write the schema."""
        text = json.dumps(recipe_schema(), indent=2, default=str) + "\n"
        if args.output is None:
            print(text, end="")
        else:
            atomic_write(args.output, text)
            print(printable(f"{args.output}: name it in a recipe's first line: # yaml-language-server: $schema=FILE"))
        return 0


SCHEMA = _Schema
