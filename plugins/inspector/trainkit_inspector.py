"""Check installed plugins, show who runs in each hook, and print the hooks' contract."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trainkit import __version__, hookspecs
from trainkit.cli.output import error, print_json, table
from trainkit.errors import PluginError, did_you_mean
from trainkit.registry import Installed, installed

__all__ = ["Check", "Hooks", "Order"]

TIMEOUT = 120  # seconds for one import

# Runs in a process of its own and prints [error, place]; both are empty where all is well.
IMPORT = """
import json, sys, traceback
from importlib.metadata import EntryPoint
said = ["", ""]
try:
    loaded = EntryPoint("", sys.argv[1], "").load()
    if not (isinstance(loaded, type) and hasattr(loaded, "__attrs_attrs__")):
        said[0] = f"{sys.argv[1]} is not a class decorated with @plugin"
except BaseException as error:
    frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if "importlib" not in f.filename]
    said = [f"{type(error).__name__}: {error}", f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""]
print("\\n" + json.dumps(said))
"""


class Check:
    """``trainkit plugins check``."""

    HELP = "Import each installed plugin in a process of its own, and say what is wrong with it."
    EXAMPLES = "examples:\n  trainkit plugins check\n  trainkit plugins check se lookahead --json\n"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("names", nargs="*", metavar="NAME", help="plugins (default: all that are installed)")
        parser.add_argument("--json", action="store_true", help="print JSON")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Print a verdict on each plugin; the exit code is 2 where one is not ok."""
        have = installed()
        for name in args.names:
            if name not in have:
                near = did_you_mean(name, have) or "; `trainkit plugins list` shows what is installed"
                raise PluginError(f"no plugin {name!r} is installed{near}")
        names = list(dict.fromkeys(args.names)) or list(have)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            facts = list(pool.map(lambda name: _verdict(have[name]), names))
        columns = ["name", "distribution", "version", "verdict", "reason", "location"]
        _print(facts, columns, as_json=args.json)
        return 0 if all(fact["verdict"] == "ok" for fact in facts) else PluginError.exit_code


class Order:
    """``trainkit plugins order``."""

    HELP = "Show which plugins of a recipe run in each hook, in order."
    EXAMPLES = "examples:\n  trainkit plugins order recipes/dense_shared.yaml plugins.se=false\n"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("recipe", metavar="RECIPE", help="a recipe file")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of the recipe")
        parser.add_argument("--json", action="store_true", help="print JSON")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Activate the plugins, which checks them against each other, and print who is called."""
        from trainkit.activation import activate
        from trainkit.cli.run import hook_order
        from trainkit.recipe import load_recipe

        order = hook_order(activate(load_recipe(args.recipe, args.overrides)))
        facts = [{"hook": hook, "kind": kind, "plugins": plugins} for hook, kind, plugins in order]
        _print(facts, ["hook", "kind", "plugins"], as_json=args.json)
        return 0


class Hooks:
    """``trainkit hooks``."""

    HELP = "Print the contract of the hooks: what kind each is, what it is given and when it fires."
    EXAMPLES = "examples:\n  trainkit hooks\n  trainkit hooks --implementers --json\n"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("--implementers", action="store_true", help="import the installed plugins and name them")
        parser.add_argument("--json", action="store_true", help="print JSON")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Print the hooks in the order of a run's life."""
        columns = ["hook", "phase", "kind", "arguments", "when", *(["implementers"] if args.implementers else [])]
        classes = _classes() if args.implementers else {}
        facts = []
        for phase in hookspecs.PHASES:
            for name, spec in vars(phase).items():
                if name.startswith("_"):
                    continue
                _, *arguments = inspect.signature(spec).parameters
                when = (inspect.getdoc(spec) or "").partition("\n")[0]
                users = [p for p, cls in classes.items() if hasattr(getattr(cls, name, None), "trainkit_impl")]
                values = (name, phase.__name__.lower(), spec.trainkit_kind, arguments, when, users)
                facts.append(dict(zip(columns, values, strict=False)))
        _print(facts, columns, as_json=args.json)
        return 0


def _verdict(records: Sequence[Installed]) -> dict[str, str]:
    record = records[0]
    facts = {"name": record.name, "distribution": record.distribution, "version": record.version}
    if len(records) > 1:
        claims = " and ".join(f"{r.distribution} {r.version}" for r in records)
        return {**facts, "verdict": "duplicate", "reason": f"claimed by {claims}; uninstall one", "location": ""}
    if unmet := _unmet(record):
        return {**facts, "verdict": "incompatible", "reason": unmet, "location": ""}
    reason, location = _import(record.value)
    return {**facts, "verdict": "broken" if reason else "ok", "reason": reason, "location": location}


def _unmet(record: Installed) -> str:
    """Return the requirement on trainkit that the installed one does not meet, in words."""
    from packaging.requirements import Requirement

    dist = record.entry_point.dist
    for requirement in map(Requirement, (dist.requires if dist else None) or ()):
        if requirement.name == "trainkit" and not requirement.specifier.contains(__version__, prereleases=True):
            return f"needs {requirement}; {__version__} is installed"
    return ""
