"""Check installed plugins, show who runs in each hook, and print the hooks' contract.

``plugins check`` imports each plugin in a process of its own: ``python -P -m trainkit_plugins_check MODULE:CLASS``
prints a description of the class as JSON, and the process that asked for it judges all descriptions together.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import attrs
from attrs import field

from trainkit import __version__, hookspecs
from trainkit.cli.output import add_allow_local, error, print_json, table, terminal
from trainkit.errors import PluginError, did_you_mean
from trainkit.registry import Installed, installed, only, requirements

__all__ = ["CHECK", "HOOKS", "ORDER", "Description", "Method", "mistakes"]

TIMEOUT = 120  # seconds for one import
ORDER_OPTIONS = ("tryfirst", "trylast", "wrapper", "hookwrapper")


# ---- the hooks


@attrs.frozen
class Hook:
    """What the core says of one of its hooks."""

    name: str
    phase: str
    kind: str
    arguments: list[str]
    when: str


def core_hooks() -> list[Hook]:
    """Return the hooks of the core, in the order of life."""
    found = []
    for phase in hookspecs.PHASES:
        for name, spec in vars(phase).items():
            if not name.startswith("_"):
                when = (inspect.getdoc(spec) or "").partition("\n")[0]
                found.append(Hook(name, phase.__name__, spec.trainkit_kind, arguments_of(spec), when))
    return found


def arguments_of(spec: Callable[..., Any]) -> list[str]:
    """Return the arguments of a hook's specification, without ``self``."""
    _, *arguments = inspect.signature(spec).parameters
    return arguments


# ---- what a plugin's class is, told by the process that imports it


@attrs.frozen
class Method:
    """A method that is marked with ``@hookimpl``.

    Args:
        name: its name.
        hook: the hook that it implements: its name, unless ``specname`` gives another.
        options: what ``@hookimpl`` was given of what changes the order of calls.
        optional: whether the hook may be one that no plugin offers.
        arguments: the arguments that a call must give it.
        with_default: the arguments with a default value.
        keyword_only: the arguments that must be given by name.
    """

    name: str
    hook: str
    options: list[str] = field(factory=list)
    optional: bool = False
    arguments: list[str] = field(factory=list)
    with_default: list[str] = field(factory=list)
    keyword_only: list[str] = field(factory=list)


@attrs.frozen
class Description:
    """What importing a plugin tells of it.

    Args:
        error: why it cannot be imported, or is no plugin; the rest is empty then.
        implementations: its methods that are marked with ``@hookimpl``.
        methods: the names of its other methods.
        offers: the hooks that it offers to other plugins, with their arguments.
    """

    error: str = ""
    implementations: list[Method] = field(factory=list)
    methods: list[str] = field(factory=list)
    offers: dict[str, list[str]] = field(factory=dict)

    @classmethod
    def from_json(cls, text: str) -> Description:
        """Return what :meth:`to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "implementations": [Method(**method) for method in values["implementations"]]})

    def to_json(self) -> str:
        """Return the description as one line."""
        return json.dumps(attrs.asdict(self))


def describe(value: str) -> Description:
    """Import a plugin into this process and describe it.

    Args:
        value: what its entry point names, ``module:class``.
    """
    try:
        loaded = EntryPoint("", value, "").load()
    except BaseException as raised:
        return Description(error=f"{place_of(raised)}{type(raised).__name__}: {raised}")
    if not (isinstance(loaded, type) and attrs.has(loaded)):
        return Description(error=f"{value} is not a class decorated with @plugin")
    return describe_class(loaded)


def place_of(raised: BaseException) -> str:
    """Return file and line that raised, for the beginning of a message; importlib's own frames tell nothing."""
    frames = [frame for frame in traceback.extract_tb(raised.__traceback__)[1:] if "importlib" not in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""


def describe_class(cls: type) -> Description:
    """Describe a plugin's class."""
    from trainkit.plugin import declared

    implementations, methods = [], []
    for name, function in inspect.getmembers(cls, inspect.isroutine):
        marks = getattr(function, "trainkit_impl", None)
        if marks is not None:
            implementations.append(describe_method(name, function, marks))
        elif not name.startswith("__"):
            methods.append(name)
    offers = {}
    for specs in declared(cls, "hookspecs"):
        for name, spec in vars(specs).items():
            if hasattr(spec, "trainkit_spec"):
                offers[name] = arguments_of(spec)
    return Description(implementations=implementations, methods=methods, offers=offers)


def describe_method(name: str, function: Callable[..., Any], marks: Mapping[str, Any]) -> Method:
    """Describe a marked method.

    Args:
        name: its name in the class.
        function: the method, as the class has it.
        marks: what ``@hookimpl`` left on it.
    """
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return Method(
        name=name,
        hook=marks.get("specname") or name,
        options=[option for option in ORDER_OPTIONS if marks.get(option)],
        optional=bool(marks.get("optionalhook")),
        arguments=[p.name for p in positional if p.default is p.empty],
        with_default=[p.name for p in positional if p.default is not p.empty],
        keyword_only=[p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.default is p.empty],
    )


def main() -> None:
    """Describe the plugin that the command line names, on the last line of the standard output."""
    gc.disable()  # a quarter of the time of importing torch
    print("\n" + describe(sys.argv[1]).to_json(), flush=True)
    os._exit(0)  # what the plugin does when Python ends must not follow


def describe_in_child(value: str) -> Description:
    """Describe a plugin from a process of its own, which may crash or hang."""
    command = [sys.executable, "-P", "-m", "trainkit_plugins_check", value]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(trusted_path())}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return Description(error=f"{value} was not imported within {TIMEOUT} seconds")
    try:
        return Description.from_json(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return Description(error=f"importing {value} ended the process with exit code {done.returncode}")


def trusted_path() -> list[str]:
    """Return where this process finds modules, without the current folder, which Python itself puts there.

    The current folder may hold anything, such as a download named like a module of the standard library. It stays where
    ``PYTHONPATH`` names it.
    """
    here = Path.cwd()
    named = {Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    return [entry for entry in sys.path if entry and (Path(entry).resolve() != here or here in named)]


# ---- what is wrong with a plugin


def mistakes(found: Description, offered: Mapping[str, list[str]]) -> Iterator[str]:
    """Yield what is wrong with a plugin that could be imported: what a run would refuse, or silently not do.

    Args:
        found: its description.
        offered: the arguments of each hook that the core or another plugin offers.
    """
    for method in found.implementations:
        if method.hook in offered:
            yield from wrong_arguments(method, offered[method.hook])
        elif not method.optional:
            yield f"{method.hook!r} is not a hook{did_you_mean(method.hook, offered)}"
        if method.options:
            yield f"{method.name}: hookimpl takes no options ({', '.join(method.options)}); order is the recipe's order"
    own = {hook.name for hook in core_hooks()} | set(found.offers)
    for name in found.methods:
        if name in own:
            yield f"{name!r} is a hook's name; mark the method with @hookimpl, or rename it"
    pair = [name for name in ("state_dict", "load_state_dict") if name in found.methods]
    if len(pair) == 1:
        other = "load_state_dict" if pair == ["state_dict"] else "state_dict"
        yield f"it has {pair[0]} and no {other}; checkpoints need both"


def wrong_arguments(method: Method, given: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the arguments of a method, of those that its hook gives."""
    for name in method.arguments:
        if name not in given:
            near = did_you_mean(name, given) or f"; it has {', '.join(given)}"
            yield f"{method.hook}: the hook has no argument {name!r}{near}"
    for name in method.with_default:
        if name in given:
            yield f"{method.hook}: {name!r} has a default, so it never gets the hook's value; drop the default"
    for name in method.keyword_only:
        yield f"{method.hook}: {name!r} can be given by name only, and hooks pass arguments by position"


def refuse_unimported(records: Sequence[Installed]) -> tuple[str, str] | None:
    """Return verdict and reason for a plugin that need not be imported to be refused, or None."""
    first = records[0]
    if len(records) > 1:
        claims = " and ".join(f"{record.distribution} {record.version}" for record in records)
        return "duplicate", f"claimed by {claims}; uninstall one of them"
    dist = first.entry_point.dist
    for needed in requirements(dist) if dist is not None else []:
        if needed.name == "trainkit" and not needed.specifier.contains(__version__, prereleases=True):
            return "incompatible", f"needs {needed}, and {__version__} is installed"
    return None


def check_plugins(names: Iterable[str]) -> list[dict[str, str]]:
    """Return a verdict on each plugin.

    Args:
        names: which; all that are installed where it is empty.

    Raises:
        PluginError: one is not installed.
    """
    have = installed()
    chosen = list(dict.fromkeys(names)) or list(have)
    for name in chosen:
        if name not in have:
            raise PluginError(f"no plugin {name!r} is installed{did_you_mean(name, have)}")
    refused = {name: refusal for name, records in have.items() if (refusal := refuse_unimported(records))}
    described = describe_all({name: have[name][0] for name in chosen if name not in refused})

    offered = {hook.name: hook.arguments for hook in core_hooks()}
    offered |= offers_of(described.values())
    implementations = [method for found in described.values() for method in found.implementations]
    if any(method.hook not in offered and not method.optional for method in implementations):
        # A plugin that was not asked for may offer the hook. Only importing them all can tell.
        others = {name: records[0] for name, records in have.items() if name not in described and name not in refused}
        offered |= offers_of(describe_all(others).values())

    facts = []
    for name in chosen:
        if name in refused:
            verdict, reason = refused[name]
        else:
            reason = described[name].error or "; ".join(mistakes(described[name], offered))
            verdict = "broken" if reason else "ok"
        record = have[name][0]
        about = {"plugin": name, "distribution": record.distribution, "version": record.version}
        facts.append({**about, "verdict": verdict, "reason": reason})
    return facts


def describe_all(records: Mapping[str, Installed]) -> dict[str, Description]:
    """Describe plugins by name, as many at a time as there are CPUs."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(describe_in_child, [record.value for record in records.values()])
        return dict(zip(records, found, strict=True))


def offers_of(described: Iterable[Description]) -> dict[str, list[str]]:
    """Return the hooks that plugins offer to each other, with their arguments."""
    offered: dict[str, list[str]] = {}
    for found in described:
        offered.update(found.offers)
    return offered


# ---- the commands


def print_facts(facts: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print facts, all with the same keys, as a table or as JSON."""
    if as_json:
        print_json(facts)
    elif facts:
        rows = [[", ".join(v) if isinstance(v, list) else v for v in fact.values()] for fact in facts]
        terminal().print(table(list(facts[0]), rows))


class CheckPlugins:
    """``trainkit plugins check``."""

    HELP = "Import each installed plugin in a process of its own, and say what is wrong with it."
    EXAMPLES = "examples:\n  trainkit plugins check\n  trainkit plugins check se lookahead --json\n"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("names", nargs="*", metavar="NAME", help="which (default: all that are installed)")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print a verdict on each plugin; return 0 if all are ok."""
        facts = check_plugins(args.names)
        print_facts(facts, args.json)
        return 0 if all(fact["verdict"] == "ok" for fact in facts) else PluginError.exit_code


class ShowOrder:
    """``trainkit plugins order``."""

    HELP = "Show which plugins of a recipe run in each hook, in order."
    EXAMPLES = "examples:\n  trainkit plugins order recipes/dense_shared.yaml plugins.se=false\n"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("recipe", metavar="RECIPE", help="a recipe file")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of the recipe")
        add_allow_local(parser)
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print a row for each hook that a plugin of the recipe implements."""
        from trainkit.hooks import load_plugins
        from trainkit.recipe import load_recipe

        order = load_plugins(load_recipe(args.recipe, args.overrides)).order()
        facts = [{"hook": hook, "kind": kind, "plugins": plugins} for hook, kind, plugins in order]
        print_facts(facts, args.json)
        return 0


class ShowHooks:
    """``trainkit hooks``."""

    HELP = "Print the contract of the hooks: what kind each is, what it is given and when it fires."
    EXAMPLES = "examples:\n  trainkit hooks\n  trainkit hooks --implementers --json\n"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("--implementers", action="store_true", help="import the installed plugins and name them")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print a row for each hook."""
        facts = []
        for hook in core_hooks():
            fact: dict[str, Any] = {"hook": hook.name, "phase": hook.phase, "kind": hook.kind}
            facts.append({**fact, "arguments": hook.arguments, "when": hook.when})
        if args.implementers:
            classes = {}
            for name, records in installed().items():
                try:
                    classes[name] = only(name, records).load()
                except PluginError as problem:
                    error(str(problem))
            for fact in facts:
                fact["implementers"] = [name for name, cls in classes.items() if implements(cls, fact["hook"])]
        print_facts(facts, args.json)
        return 0


def implements(cls: type, hook: str) -> bool:
    """Tell whether a plugin's class implements a hook."""
    return hasattr(getattr(cls, hook, None), "trainkit_impl")


CHECK = CheckPlugins()
ORDER = ShowOrder()
HOOKS = ShowHooks()

if __name__ == "__main__":
    main()
