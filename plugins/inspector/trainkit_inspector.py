"""Check installed plugins, show who runs in each hook, and print the hooks' contract."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
from packaging.requirements import Requirement

from trainkit import __version__, hookspecs
from trainkit.cli.output import print_json, table, terminal
from trainkit.errors import PluginError, did_you_mean
from trainkit.registry import Installed, installed

__all__ = ["Command", "check", "hooks", "order"]

TIMEOUT = 120  # seconds for one import

# Runs in a process of its own and prints what is wrong, after the line that raised it; nothing where all is well.
IMPORT = """
import gc, json, sys, traceback
from importlib.metadata import EntryPoint
gc.disable()  # a quarter of the time of importing torch
wrong = ""
try:
    loaded = EntryPoint("", sys.argv[1], "").load()
    if not (isinstance(loaded, type) and hasattr(loaded, "__attrs_attrs__")):
        wrong = f"{sys.argv[1]} is not a class decorated with @plugin"
except BaseException as error:
    frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if "importlib" not in f.filename]
    place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    wrong = f"{place}{type(error).__name__}: {error}"
print("\\n" + json.dumps(wrong))
"""


@attrs.frozen
class Command:
    """A command that prints facts as a table or as JSON; a fact whose verdict is not ok makes the exit code 2."""

    HELP: str
    EXAMPLES: str
    arguments: dict[str, dict[str, Any]]  #: what argparse is told of each; ``--json`` comes with every command
    facts: Callable[[argparse.Namespace], list[dict[str, Any]]]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        for name, options in self.arguments.items():
            parser.add_argument(name, **options)
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Gather the facts and print them."""
        facts = self.facts(args)
        if args.json:
            print_json(facts)
        elif facts:
            rows = [[", ".join(v) if isinstance(v, list) else v for v in fact.values()] for fact in facts]
            terminal().print(table(list(facts[0]), rows))
        return 0 if all(fact.get("verdict", "ok") == "ok" for fact in facts) else PluginError.exit_code


def _check(args: argparse.Namespace) -> list[dict[str, Any]]:
    have = installed()
    for name in args.names:
        if name not in have:
            raise PluginError(f"no plugin {name!r} is installed{did_you_mean(name, have)}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_verdict, (have[name] for name in dict.fromkeys(args.names or have))))


def _verdict(records: list[Installed]) -> dict[str, Any]:
    record = records[0]
    dist = record.entry_point.dist
    needed = [r for r in map(Requirement, (dist and dist.requires) or ()) if r.name == "trainkit"]
    unmet = [str(r) for r in needed if not r.specifier.contains(__version__, prereleases=True)]
    if len(records) > 1:
        claims = " and ".join(f"{r.distribution} {r.version}" for r in records)
        verdict, reason = "duplicate", f"claimed by {claims}; uninstall one of them"
    elif unmet:
        verdict, reason = "incompatible", f"needs {unmet[0]}, and {__version__} is installed"
    else:
        reason = _import(record.value)
        verdict = "broken" if reason else "ok"
    facts = {"plugin": record.name, "distribution": record.distribution, "version": record.version}
    return {**facts, "verdict": verdict, "reason": reason}


def _import(value: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # what this process would find
    command = [sys.executable, "-c", IMPORT, value]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        return str(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return f"{value} was not imported within {TIMEOUT} seconds"
    except (IndexError, ValueError):
        return f"importing {value} ended the process with exit code {done.returncode}"


def _order(args: argparse.Namespace) -> list[dict[str, Any]]:
    from trainkit.hooks import load_plugins
    from trainkit.recipe import load_recipe

    found = load_plugins(load_recipe(args.recipe, args.overrides)).order()
    return [{"hook": hook, "kind": kind, "plugins": plugins} for hook, kind, plugins in found]


def _hooks(args: argparse.Namespace) -> list[dict[str, Any]]:
    classes = {name: records[0].load() for name, records in installed().items()} if args.implementers else {}
    facts = []
    for phase, hook, spec in ((p.__name__, *item) for p in hookspecs.PHASES for item in vars(p).items()):
        if not hook.startswith("_"):
            _, *arguments = inspect.signature(spec).parameters
            when = (inspect.getdoc(spec) or "").partition("\n")[0]
            fact = {"hook": hook, "phase": phase, "kind": spec.trainkit_kind, "arguments": arguments, "when": when}
            users = [name for name, cls in classes.items() if hasattr(getattr(cls, hook, None), "trainkit_impl")]
            facts.append({**fact, "implementers": users} if args.implementers else fact)
    return facts


check = Command(
    "Import each installed plugin in a process of its own, and say what is wrong with it.",
    "examples:\n  trainkit plugins check\n  trainkit plugins check se lookahead --json\n",
    {"names": {"nargs": "*", "metavar": "NAME", "help": "which (default: all that are installed)"}},
    _check,
)
order = Command(
    "Show which plugins of a recipe run in each hook, in order.",
    "examples:\n  trainkit plugins order recipes/dense_shared.yaml plugins.se=false\n",
    {"recipe": {"metavar": "RECIPE"}, "overrides": {"nargs": "*", "metavar": "KEY=VALUE"}},
    _order,
)
hooks = Command(
    "Print the contract of the hooks: what kind each is, what it is given and when it fires.",
    "examples:\n  trainkit hooks\n  trainkit hooks --implementers --json\n",
    {"--implementers": {"action": "store_true", "help": "import the installed plugins and name them"}},
    _hooks,
)
