"""Recipes: schema, ``extends``, overrides, validation. A recipe is data; nothing in it is executed or imported.

A recipe and all that it extends are merged (later keys win), overrides are merged over that, and the result is held
against the schema below. The options of a plugin are held against its class when it is activated.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin

import attrs
import yaml
from attrs import field
from attrs.validators import ge, gt, optional
from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from trainkit.errors import PluginError, RecipeError, did_you_mean
from trainkit.options import option_types, type_name
from trainkit.plugin import declared
from trainkit.registry import base_name, installed
from trainkit.rundir import read_regular

__all__ = ["Recipe", "data_root", "load_recipe", "make_options", "read_yaml"]

RECIPE_KEYS = "name, epochs, batch_size and plugins"
MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
MAX_INTEGER = 2**63 - 1  # what torch can count to
REFERENCE_COST = 64  # in characters; omegaconf takes a tenth of a millisecond to resolve one
_REFERENCE = re.compile(r"\$\{([\w.@-]+)\}")
_PLUGIN = re.compile(r"[^@]+(@[A-Za-z0-9_-]+)?")
_PLUGIN_KEY = re.compile(r"plugins(\.[^.]+)?")
# What YAML 1.1 reads as a number of another base: 010 is 8, 1:30 is 90.
_OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


def _slug(recipe: Recipe, attribute: attrs.Attribute[str], value: str) -> None:
    """A name is a folder's name in the runs directory."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", value):
        raise ValueError("'name' must be letters, digits, '.', '_' and '-', and begin with a letter or digit")


@attrs.frozen(kw_only=True)
class Recipe:
    """A resolved recipe.

    Args:
        name: names the run's folder.
        description: one line for listings.
        source: the publication and the part of it that the recipe reproduces.
        seed: what every random stream starts from.
        epochs: passes over the training split.
        batch_size: training images a step.
        test_batch_size: test images a batch; the training batch size when absent.
        max_steps: stop after this many steps, whatever `epochs` says.
        eval_every: evaluate after every so many epochs, and after the last one.
        drop_last: leave out the last training batch of an epoch where it is smaller than the others.
        mixed_sizes: training and evaluation images may differ in size.
        numerics: ``native``: what this CPU computes fastest; or ``portable``: float32 with the instructions that every
            x86-64 CPU has, on one thread unless OMP_NUM_THREADS says otherwise, so that other CPUs compute the same
            bits.
        device: ``auto`` (the first GPU, else the CPU) or a torch device, such as ``cpu`` or ``cuda:1``.
        expect: what the recipe should reach, by metric; ``parameters`` is checked before training.
        requires: requirements that provide plugins from elsewhere: a list, or a mapping from plugin name to
            requirement, so that one distribution may hold several plugins.
        local: Python files in the recipe's own folder that define plugins; a class ``MyLoss`` is the plugin `my_loss`.
            They run only where the user allows it (``--allow-local``).
        plugins: options by plugin name, in call order. ``name@label`` lists the same plugin once more.
        path: the file that it was read from.
    """

    name: str = field(validator=_slug)
    description: str = ""
    source: str = ""
    seed: int = 0
    epochs: int = field(validator=ge(1))
    batch_size: int = field(validator=ge(1))
    test_batch_size: int | None = field(default=None, validator=optional(ge(1)))
    max_steps: int | None = field(default=None, validator=optional(gt(0)))
    eval_every: int = field(default=1, validator=ge(1))
    drop_last: bool = False
    mixed_sizes: bool = False
    numerics: Literal["native", "portable"] = "native"
    device: str = "auto"
    expect: dict[str, int | float] = field(factory=dict)
    requires: list[str] | dict[str, str] = field(factory=list)
    local: list[str] = field(factory=list)
    plugins: dict[str, Any] = field(factory=dict)
    path: Path | None = field(default=None, eq=False)

    @property
    def where(self) -> str:
        """The recipe's file, for messages."""
        return str(self.path) if self.path else f"recipe {self.name!r}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that :func:`load_recipe` reads back to an equal recipe."""

        def is_written(attribute: attrs.Attribute[Any], value: Any) -> bool:
            return attribute.name != "path" and value is not None and value not in ("", [], {})

        return attrs.asdict(self, filter=is_written)

    def to_yaml(self) -> str:
        """Return the recipe as a YAML document that :func:`load_recipe` reads back and a terminal may show."""
        plain = self.to_dict()
        text: str = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
        if not text.replace("\n", "").isprintable():  # such as characters that turn the direction of writing
            text = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120)
        return text


class _Dumper(yaml.SafeDumper):
    """Writes what omegaconf's rules read back: neither aliases nor text without quotes that it takes for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+.]?[0-9][-+.0-9_eE]*"), list("-+.0123456789"))


def load_recipe(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: ``"key.path=value"`` strings, values in YAML, or a mapping from key path to value. ``false`` as the
            value of a plugin drops it.

    Raises:
        RecipeError: the file, a key, a type or a value is wrong; the message names file and key.
    """
    path = Path(path)
    tree = _read_with_bases(path, root=path.parent, seen=())
    for key, value in _parse_overrides(overrides):
        _check_key(tree, key, value)
        if value == {} and not _PLUGIN_KEY.fullmatch(key):  # `expect={}`: nothing, and not what was inherited
            tree = _without(tree, key.split("."))
        tree = _override(tree, _nest(key, value))
    return from_dict(tree, path)


def from_dict(tree: Mapping[str, Any], path: Path | None = None) -> Recipe:
    """Return the recipe that plain data describe.

    Raises:
        RecipeError: see :func:`load_recipe`.
    """
    where = str(path) if path else "recipe"
    _check_plain(tree, where)
    tree = dict(tree)
    tree["plugins"] = _listed_plugins(where, tree.get("plugins") or {})
    _check_requires(where, tree.get("requires", []))
    if isinstance(tree.get("expect"), Mapping):  # `expect.parameters=null` withdraws what a base recipe expects
        tree["expect"] = {metric: value for metric, value in tree["expect"].items() if value is not None}
    _refuse_growth(tree, where)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        place = f"{where}: {key}" if (key := getattr(error, "full_key", None)) else where
        raise RecipeError(f"{place}: {_first_line(error)}") from error
    for key, value in _texts(resolved):
        if "${" in value:  # nothing may be left that reading the written recipe would resolve once more
            raise RecipeError(f"{where}: {key}: {value!r} is no reference to a key; a text cannot hold '${{' otherwise")
    values = _checked(where, "", Recipe, cast(dict[str, Any], resolved))
    recipe: Recipe = _construct(where, "", Recipe, {**values, "path": path})
    return recipe


def _listed_plugins(where: str, plugins: Any) -> dict[str, dict[str, Any]]:
    """Return the options of each plugin that the recipe keeps."""
    if not isinstance(plugins, Mapping):
        raise RecipeError(f"{where}: plugins: expected a mapping from plugin name to options")
    kept: dict[str, dict[str, Any]] = {}
    for name, options in plugins.items():
        if not _PLUGIN.fullmatch(str(name)):
            raise RecipeError(
                f"{where}: plugins.{name}: expected NAME or NAME@LABEL; a label is letters, digits, '_' and '-'"
            )
        if options is False:
            continue
        if options is not None and options is not True and not isinstance(options, Mapping):
            raise RecipeError(f"{where}: plugins.{name}: expected options (`key: value`), nothing, or false to drop it")
        kept[str(name)] = dict(options) if isinstance(options, Mapping) else {}
    return kept


def _check_requires(where: str, requires: Any) -> None:
    given = list(requires.values()) if isinstance(requires, Mapping) else requires
    if not isinstance(given, list) or not all(isinstance(requirement, str) for requirement in given):
        raise RecipeError(
            f'{where}: requires: expected a list of requirements, ["acme-trainkit-sam>=1.2"], or a mapping from plugin '
            f'name to requirement, {{sam: "acme-trainkit-sam>=1.2"}}; got {requires!r}'
        )


def make_options(recipe: Recipe, name: str, cls: type) -> Any:
    """Return a plugin: its class, constructed from the options that the recipe gives it.

    Args:
        recipe: the recipe.
        name: the plugin's key in the recipe, with its label.
        cls: the plugin's class.

    Raises:
        RecipeError: an option is unknown, missing, of the wrong type, or fails its validator.
        PluginError: the type of an option has no meaning, or cannot be checked.
    """
    prefix = f"plugins.{name}."
    values = _checked(recipe.where, prefix, cls, recipe.plugins[name])
    for option in recipe_files(cls):
        given = values.get(option)
        if recipe.path is not None and given is not None and not given.is_absolute():
            values[option] = recipe.path.parent / given
    return _construct(recipe.where, prefix, cls, values)


def data_root(recipe: Recipe, root: str) -> str:
    """Return the override that says where the data lie.

    Raises:
        RecipeError: no plugin of the recipe, or more than one, has an option of that name.
    """
    having = [name for name, options in recipe.plugins.items() if "root" in options]
    if len(having) != 1:
        listed = ", ".join(having) or "no plugin of the recipe"
        raise RecipeError(f"--data: {listed} has an option `root`; give it as plugins.NAME.root=DIR")
    return f"plugins.{having[0]}.root={json.dumps(root)}"


def recipe_files(cls: type) -> list[str]:
    """Return the options of a class that name files beside the recipe (:func:`trainkit.plugin.recipe_file`)."""
    return [option.alias or option.name for option in attrs.fields(cls) if option.metadata.get("recipe_file")]


def needed_files(cls: type, option: str, path: Path) -> dict[str, Path]:
    """Return the files that an option which names a file or a folder beside the recipe needs.

    Args:
        cls: the plugin's class.
        option: one of :func:`recipe_files`.
        path: its value.

    Returns:
        Paths by what they are called from the folder that `path` lies in.
    """
    files = attrs.fields_dict(cls)[option].metadata.get("files")
    if files is None or not path.is_dir():
        return {path.name: path}
    return {f"{path.name}/{file.relative_to(path).as_posix()}": file for file in files(path)}


def _checked(where: str, prefix: str, cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Hold values against the types of a class's fields and convert them (``1`` to ``1.0``, a list to a tuple)."""
    try:
        types = option_types(cls)
    except PluginError as error:
        raise PluginError(f"{where}: {prefix.rstrip('.')}: {error}" if prefix else f"{where}: {error}") from error
    options = {option.alias or option.name: option for option in attrs.fields(cls) if option.init}
    if cls is Recipe:
        del options["path"]  # not a key of a recipe
    for key in given:
        if key not in options:
            raise RecipeError(f"{where}: {prefix}{key}: unknown key{did_you_mean(str(key), options) or _list(options)}")
    for key, option in options.items():
        if key not in given and option.default is attrs.NOTHING:
            raise RecipeError(f"{where}: {prefix}{key}: missing; the recipe must give it")
    return {str(key): _convert(f"{where}: {prefix}{key}", types[key], value) for key, value in given.items()}


def _convert(place: str, annotation: Any, value: Any) -> Any:
    """Return a value as the type that omegaconf makes of it, as a structured configuration of this one field."""
    if annotation is str and isinstance(value, bool):
        raise RecipeError(
            f"{place}: expected a text, got {str(value).lower()}, as which YAML reads yes, no, on and off; quote it"
        )
    try:
        config = OmegaConf.merge(_schema(annotation), {"value": value})
        options = OmegaConf.to_container(config, throw_on_missing=True, structured_config_mode=SCMode.INSTANTIATE)
        converted = options.value  # type: ignore[union-attr]
    except (OmegaConfBaseException, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        inner = str(getattr(error, "full_key", None) or "").removeprefix("value")
        # omegaconf 2.4.0 leaves these two words in its message on an element of a tuple
        message = _first_line(error).replace("'$VALUE'", repr(value)).replace("$VALUE_TYPE", type(value).__name__)
        raise RecipeError(f"{place}{inner}: {message}") from error
    if not _fits(converted, annotation):
        raise RecipeError(f"{place}: expected {type_name(annotation)}, got {value!r}")
    return converted


@cache
def _schema(annotation: Any) -> DictConfig:
    """Return the structured configuration of one field of a type."""
    config: DictConfig = OmegaConf.structured(attrs.make_class("Options", {"value": attrs.field(type=annotation)}))
    return config


def _fits(value: Any, annotation: Any) -> bool:
    """Tell whether a value is of a type.

    omegaconf 2.4.0 lets any list and mapping pass for an element of type ``int | str`` in a list, tuple or dict.
    """
    origin = get_origin(annotation) or annotation
    arguments = get_args(annotation)
    if origin in (Union, UnionType):
        return any(_fits(value, member) for member in arguments)
    if origin is Literal:
        return value in arguments
    if origin is Any:
        return True
    if not isinstance(value, origin):
        return False
    if origin is dict and arguments:
        return all(_fits(element, arguments[1]) for element in value.values())
    if origin is tuple and arguments and Ellipsis not in arguments:
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin in (list, tuple) and arguments:
        return all(_fits(element, arguments[0]) for element in value)
    return True


def _construct(where: str, prefix: str, cls: type, values: Mapping[str, Any]) -> Any:
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:  # what attrs' validators raise
        message = _first_line(error)
        quoted = re.search(r"'(\w+)'", message)
        key = quoted.group(1) if quoted else ""
        raise RecipeError(f"{where}: {prefix}{key}: {message}") from error


def _first_line(error: Exception) -> str:
    """Return what an error says; attrs' validators put more into it than their message."""
    said = str(error.args[0] if error.args and not isinstance(error, OmegaConfBaseException) else error)
    return said.splitlines()[0] if said else type(error).__name__


def _list(names: Mapping[str, Any]) -> str:
    return f"; known: {', '.join(names)}" if names else "; it takes no options"


def _read_with_bases(path: Path, root: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links that lead in a circle, until Python 3.13
        raise RecipeError(f"{path}: cannot be read: its links lead nowhere") from error
    if resolved in seen:
        circle = ", ".join(each.name for each in seen)
        raise RecipeError(f"{path}: extends: goes in a circle through {circle}")
    tree = _read(path)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends: expected the name of one recipe file, got {base!r}")
    target = path.parent / base
    try:
        inside = target.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(f"{path}: extends: {base!r} cannot be read: its links lead nowhere") from error
    if not inside:
        raise RecipeError(f"{path}: extends: {base!r} lies outside the recipe's own folder; copy it there")
    if not os.path.lexists(target):
        others = [each.name for each in sorted(target.parent.glob("*.yaml")) if each.resolve() != resolved]
        raise RecipeError(f"{path}: extends: {base!r} does not exist{did_you_mean(target.name, others)}")
    return _extend(_read_with_bases(target, root, (*seen, resolved)), tree)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path, RECIPE_KEYS)
    except RecipeError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    near = [each.name for each in sorted(folder.glob("*.yaml"))]
    close = did_you_mean(path.name, near) or did_you_mean(f"{path.name}.yaml", near)
    raise RecipeError(f"{path}: no such recipe{close}")


def read_yaml(path: Path, keys: str) -> dict[str, Any]:
    """Return the mapping that a YAML file holds, by the rules for recipes.

    It is plain data without tags and aliases, of bounded size and depth; ``1e-3`` is a number, and a key that is there
    twice an error.

    Args:
        path: of the file.
        keys: what the mapping should have, for the error.

    Raises:
        RecipeError: the file cannot be read, or holds something else.
    """
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8")
    except OSError as error:
        cure = "; a recipe lists plugins, it holds no data" if error.errno == errno.EFBIG else ""
        raise RecipeError(f"{path}: cannot be read: {error.strerror}{cure}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except ValueError as error:
        raise RecipeError(f"{str(path)!r}: not the path of a file") from error
    tree = _parse(text, str(path), keys)
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: expected a mapping with {keys}")
    return tree


def _parse(text: str, where: str, keys: str = RECIPE_KEYS) -> Any:
    """Parse YAML into plain data; refuses tags, aliases, depth and a lone value before anything is constructed."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark else 0
            if isinstance(event, yaml.AliasEvent):
                raise RecipeError(
                    f"{where}, line {line}: YAML aliases are not supported; write it out, or use `extends`"
                )
            if (tag := getattr(event, "tag", None)) is not None:
                raise RecipeError(f"{where}, line {line}: YAML tag {tag!r} refused; a recipe is plain data")
            if depth == 0 and isinstance(event, yaml.ScalarEvent) and event.value:
                raise RecipeError(f"{where}: expected a mapping with {keys}")
            if isinstance(event, yaml.ScalarEvent) and event.style is None and _OTHER_BASE.fullmatch(event.value):
                raise RecipeError(
                    f"{where}, line {line}: {event.value}: YAML would read another number there; write a number "
                    "without zeros before it, and a text in quotes"
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise RecipeError(f"{where}, line {line}: nested deeper than {MAX_DEPTH} levels")
        # omegaconf's own rules for the rest: ``1e-3`` is a number, a duplicate key an error
        value = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise RecipeError(f"{where}: YAML syntax: {problem}") from error
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        reason = _first_line(error)
        if "integer string conversion" in reason:
            reason = f"an integer beyond {MAX_INTEGER}, which torch cannot hold"
        raise RecipeError(f"{where}: {reason}") from error
    _check_plain(value, where)
    return value


def _check_plain(value: Any, where: str, key: str = "") -> None:
    """Hold plain data against what a recipe may say.

    Only references to other keys, ``${epochs}``, may be interpolated: resolvers could read files or variables.

    Raises:
        RecipeError: a key is no text, a text holds a resolver, or an integer is one that torch cannot hold.
    """
    if isinstance(value, Mapping):
        for inner, element in value.items():
            if not isinstance(inner, str) or "${" in inner:
                raise RecipeError(f"{where}: {key}{inner!r}: keys must be text, without references")
            _check_plain(element, where, f"{key}{inner}.")
    elif isinstance(value, list | tuple):
        for position, element in enumerate(value):
            _check_plain(element, where, f"{key}{position}.")
    elif isinstance(value, str) and ("${" in _REFERENCE.sub("", value) or "\\${" in value):
        raise RecipeError(f"{where}: {key.rstrip('.')}: {value!r}: only ${{key}} references are allowed, no resolvers")
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise RecipeError(f"{where}: {key.rstrip('.')}: an integer beyond {MAX_INTEGER}, which torch cannot hold")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text in plain data, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    for inner, element in _members(value):
        yield from _texts(element, f"{key}.{inner}" if key else inner)


def _members(value: Any) -> list[tuple[str, Any]]:
    """Return the parts of a mapping or a list, with their keys."""
    if isinstance(value, Mapping):
        return [(str(name), inner) for name, inner in value.items()]
    return [(str(place), inner) for place, inner in enumerate(value)] if isinstance(value, list | tuple) else []


def _refuse_growth(tree: Mapping[str, Any], where: str) -> None:
    """Refuse references that would make a large recipe of a small one: ``${a}${a}``, and so on, doubles it each time.

    Raises:
        RecipeError: resolved, the recipe would be too large, or references lead to each other too deeply.
    """
    costs: dict[str, int] = {}

    def cost(value: Any, key: str, through: tuple[str, ...]) -> int:
        if isinstance(value, str):
            return len(value) + sum(follow(name, key, through) for name in _REFERENCE.findall(value))
        return 1 + sum(cost(inner, f"{key}.{name}" if key else name, through) for name, inner in _members(value))

    def follow(name: str, key: str, through: tuple[str, ...]) -> int:
        target = _absolute(name, key)
        if target in through or len(through) >= MAX_DEPTH:
            raise RecipeError(f"{where}: {key}: references go in a circle, or through more than {MAX_DEPTH} others")
        if target not in costs:
            costs[target] = REFERENCE_COST + cost(_at(tree, target), target, (*through, target))
        return costs[target]

    if cost(tree, "", ()) > 2 * MAX_BYTES:
        raise RecipeError(
            f"{where}: larger than {2 * MAX_BYTES // 1024} KiB once its references are resolved; use fewer of them"
        )


def _absolute(name: str, key: str) -> str:
    """Return the key that a reference at `key` names: ``${.x}`` lies beside it, ``${..x}`` a level above."""
    dots = len(name) - len(name.lstrip("."))
    above = key.split(".")[:-dots] if dots else []
    return ".".join([*above, name.lstrip(".")])


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(tree, Mapping):
            tree = tree.get(part)
        elif isinstance(tree, list | tuple) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return None
    return tree


def _parse_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.[\w@-]+)*", key):
            raise RecipeError(f"override {text!r}: expected KEY=VALUE, such as epochs=5 or plugins.se.reduction=8")
        if "\n" in value:
            raise RecipeError(f"override {text!r}: the value must be one line")
        if re.search(r"\s#", value) and value.strip()[0] not in "\"'[{":
            raise RecipeError(
                f"override {text!r}: YAML reads what follows ' #' as a comment; write {key}='\"{value}\"'"
            )
        pairs.append((key, _parse(f"value: {value}", f"override {text!r}")["value"]))
    return pairs


def _check_key(tree: Mapping[str, Any], key: str, value: Any) -> None:
    """Refuse an override of what is no key of a recipe and names the plugin that has such an option.

    Raises:
        RecipeError: there is one, or several.
    """
    if "." in key or key in attrs.fields_dict(Recipe) or not isinstance(tree.get("plugins"), Mapping):
        return
    having = []
    for name, options in tree["plugins"].items():
        records = installed().get(base_name(str(name)), []) if options is not False else []
        with suppress(Exception):  # a plugin that is missing or broken is reported when it is loaded
            if len(records) == 1 and key in {option.alias or option.name for option in attrs.fields(records[0].load())}:
                having.append(f"plugins.{name}.{key}")
    if having:
        raise RecipeError(f"override '{key}={value}': no key of a recipe; did you mean {' or '.join(having)}?")


def _without(tree: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """Return a tree without what lies at a path."""
    first, *rest = path
    left = dict(tree)
    if not rest:
        left.pop(first, None)
    elif isinstance(left.get(first), Mapping):
        left[first] = _without(left[first], rest)
    return left


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _extend(base: dict[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a recipe into the one that it extends.

    An inherited plugin keeps its place. One that the child adds goes before the next plugin that the child lists and
    the base has, else last.
    """
    merged = _merge(base, child)
    old, listed = base.get("plugins"), child.get("plugins")
    if not isinstance(old, Mapping) or not isinstance(listed, Mapping):
        return merged
    order = list(old)
    place = len(order)
    for name in reversed(listed):
        if name in old:
            place = order.index(name)
        else:
            order.insert(place, name)
    merged["plugins"] = {name: merged["plugins"][name] for name in order}
    return merged


def _override(tree: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Merge an override into a recipe. A plugin that it adds goes to the last place that its ``before`` allows."""
    merged = _merge(tree, change)
    old, plugins = tree.get("plugins") or {}, merged.get("plugins")
    if not isinstance(old, Mapping) or not isinstance(plugins, Mapping):
        return merged
    order = list(old)
    for name, options in plugins.items():
        if name in old:
            continue
        later = _declared_before(name) if options is not False else ()
        listed = [other for other in order if plugins[other] is not False and base_name(other) in later]
        order.insert(order.index(listed[0]) if listed else len(order), name)
    merged["plugins"] = {name: plugins[name] for name in order}
    return merged


def _declared_before(name: str) -> tuple[str, ...]:
    """Return what a plugin's class must precede. One that is missing or broken is reported when it is loaded."""
    records = installed().get(base_name(name), [])
    if len(records) != 1:
        return ()
    try:
        cls = records[0].load()
    except PluginError:
        return ()
    return declared(cls, "before") if isinstance(cls, type) and attrs.has(cls) else ()


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key, `over` winning; a plugin listed again keeps its place and its other options."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict):
            merged[key] = _merge(old, value)
        elif not ((value is None or value is True) and isinstance(old, dict)):  # `se:` keeps inherited options
            merged[key] = value
    return merged
