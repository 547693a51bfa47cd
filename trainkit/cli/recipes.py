"""``trainkit recipes``: list and show recipes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.cli.output import number, print_json, printable, table, terminal, written
from trainkit.cli.plugins import describe, options_table
from trainkit.errors import RecipeError, UsageError, did_you_mean
from trainkit.registry import find

if TYPE_CHECKING:
    from trainkit.recipe import Recipe

HELP = "List, show and explain recipes."
EXAMPLES = """\
examples:
  trainkit recipes list
  trainkit recipes show recipes/dense_shared.yaml epochs=5
  trainkit recipes help recipes/quickstart.yaml sgd cross_entropy
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the recipes of a folder")
    listing.add_argument("folder", nargs="?", type=Path, default=Path("recipes"), help="default: recipes")
    show = actions.add_parser("show", help="one recipe, resolved: with all that it extends, and overrides")
    show.add_argument("recipe", metavar="RECIPE")
    show.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    explain = actions.add_parser("help", help="what each plugin of a recipe does, and all its options")
    explain.add_argument("recipe", metavar="RECIPE")
    explain.add_argument("names", nargs="*", metavar="PLUGIN", help="these alone")
    for action in (listing, show, explain):
        action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """List a folder's recipes, or show one."""
    from trainkit.recipe import load_recipe

    if args.action == "help":
        return _help(load_recipe(args.recipe), args.names, as_json=args.json)
    if args.action == "show":
        recipe = load_recipe(args.recipe, args.overrides)
        print_json(recipe.to_dict()) if args.json else print(recipe.to_yaml(), end="")
        return 0
    if not args.folder.is_dir():
        raise UsageError(f"{args.folder}: no such folder; give the one that holds recipes")
    # a leading underscore marks what recipes extend and nobody runs; a study lists recipes and is none
    recipes, broken = [], []
    for path in sorted(args.folder.glob("*.yaml")):
        if path.name.startswith("_") or path.name.endswith(".study.yaml"):
            continue
        try:
            recipes.append(load_recipe(path))
        except RecipeError as error:
            broken.append(str(error))
    if args.json:
        print_json([{"path": str(r.path), **r.to_dict()} for r in recipes])
    else:
        rows = [
            (
                r.path.name if r.path else r.name,
                r.epochs,
                ", ".join(f"{k} {number(v)}" for k, v in r.expect.items()),
                r.description,
            )
            for r in recipes
        ]
        terminal().print(table(["recipe", "epochs", "expects", "description"], rows, right=["epochs"]))
    if broken:
        raise RecipeError("; ".join(broken))
    return 0


def _help(recipe: Recipe, names: Sequence[str], *, as_json: bool) -> int:
    """Explain the plugins of a recipe, or those that are named: what each does, and its options as they are there."""
    for name in names:
        if name not in recipe.plugins:
            raise UsageError(f"{recipe.where}: lists no plugin {name!r}{did_you_mean(name, recipe.plugins)}")
    documents: list[dict[str, Any]] = []
    out = terminal()
    for name, record in find(recipe).items():
        if names and name not in names:
            continue
        options = describe(record)["options"]
        given = {key: written(value) for key, value in recipe.plugins[name].items()}
        documents.append({"name": name, "summary": record.summary, "given": recipe.plugins[name], "options": options})
        if not as_json:
            out.print(printable(f"{name}: {record.summary}"), markup=False, highlight=False)
            out.print(options_table(options, given) if options else "")
    if as_json:
        print_json(documents)
    return 0
