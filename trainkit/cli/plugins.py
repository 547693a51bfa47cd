"""``trainkit plugins``: list and show installed plugins."""

from __future__ import annotations

import argparse
from typing import Any

from trainkit.cli.output import print_json, printable, table, terminal
from trainkit.errors import PluginError, did_you_mean
from trainkit.registry import Installed, installed, only

HELP = "List and show installed plugins."
EXAMPLES = """\
examples:
  trainkit plugins list
  trainkit plugins show se
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="what is installed, from metadata alone")
    show = actions.add_parser("show", help="one plugin: its options, hooks and constraints")
    show.add_argument("name", metavar="NAME")
    for action in (listing, show):
        action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """List, or show one."""
    if args.action == "list":
        return _list(args.json)
    return _show(args.name, args.json)


def _list(as_json: bool) -> int:
    found = [record for records in installed().values() for record in records]
    if as_json:
        print_json([_facts(record) for record in found])
        return 0
    rows = [(record.name, record.version, record.summary) for record in found]
    terminal().print(table(["plugin", "version", "summary"], rows))
    return 0


def _facts(record: Installed) -> dict[str, Any]:
    return {
        "name": record.name,
        "distribution": record.distribution,
        "version": record.version,
        "source": record.source,
        "summary": record.summary,
    }


def _show(name: str, as_json: bool) -> int:
    have = installed()
    if name not in have:
        near = did_you_mean(name, have) or "; `trainkit plugins list` shows what is installed"
        raise PluginError(f"no plugin {name!r} is installed{near}")
    record = only(name, have[name])
    facts = {**_facts(record), **_describe(record)}
    if as_json:
        print_json(facts)
        return 0
    out = terminal()
    for line in (f"{record.name} {record.version}, from {record.distribution} ({record.source})", facts["doc"], ""):
        out.print(printable(line), markup=False, highlight=False)
    if facts["options"]:
        rows = [(option["name"], option["type"], option["default"]) for option in facts["options"]]
        out.print(table(["option", "type", "default"], rows))
    for key in ("hooks", "after", "before", "conflicts", "claims"):
        if facts[key]:
            out.print(f"{key}: {printable(', '.join(facts[key]))}", markup=False, highlight=False)
    return 0


def _describe(record: Installed) -> dict[str, Any]:
    import inspect

    import attrs

    from trainkit.hooks import load_class
    from trainkit.options import options_of
    from trainkit.plugin import declared

    cls = load_class(record)
    hooks = [name for name, value in inspect.getmembers(cls) if hasattr(value, "trainkit_impl")]
    options = [attrs.asdict(option) for option in options_of(cls)]
    constraints = {key: list(declared(cls, key)) for key in ("after", "before", "conflicts", "claims")}
    return {"doc": inspect.getdoc(cls) or "", "options": options, "hooks": hooks, **constraints}
