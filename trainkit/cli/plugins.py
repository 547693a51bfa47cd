"""``trainkit plugins``: list and show installed plugins."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
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
    facts = {**_facts(record), **describe(record)}
    if as_json:
        print_json(facts)
        return 0
    out = terminal()
    heading = f"{record.name} {record.version}, from {record.distribution} ({record.source})"
    for paragraph in [heading, *_paragraphs(facts["doc"])]:
        out.print(printable(paragraph), markup=False, highlight=False)
    if facts["options"]:
        out.print(options_table(facts["options"]))
    for key in ("hooks", "after", "before", "conflicts", "claims"):
        if facts[key]:
            out.print(f"{key}: {printable(', '.join(facts[key]))}", markup=False, highlight=False)
    return 0


def _paragraphs(doc: str) -> list[str]:
    """Return what a docstring says before its sections; a list in it keeps its lines."""
    text = re.split(r"^(?:Args|Raises|Returns|Examples?):$", doc, maxsplit=1, flags=re.MULTILINE)[0].strip()
    paragraphs = re.split(r"\n\s*\n", text.replace("``", "`"))
    return [each if re.search(r"\n\s*([*-]|\s{2})", each) else " ".join(each.split()) for each in paragraphs]


def options_table(options: Sequence[Mapping[str, str]], given: Mapping[str, str] | None = None) -> Any:
    """Return a table of options, with what each means.

    Args:
        options: name, type, default and meaning of each.
        given: the values that a recipe gives some, in place of the defaults.
    """
    columns = ["option", "type", "default", "meaning"] if given is None else ["option", "here", "type", "meaning"]
    rows = []
    for option in options:
        value = option["default"] if given is None else given.get(option["name"], option["default"])
        shown = [option["type"], value] if given is None else [value, option["type"]]
        rows.append([option["name"], *shown, option["meaning"].replace("``", "`")])
    return table(columns, rows)


def describe(record: Installed) -> dict[str, Any]:
    """Return what a plugin's class says: docstring, options, hooks and constraints. It is imported."""
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
