"""``trainkit recipes``: list and show recipes."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainkit.cli.output import number, print_json, table, terminal
from trainkit.errors import RecipeError, UsageError

HELP = "List and show recipes."
EXAMPLES = """\
examples:
  trainkit recipes list
  trainkit recipes show recipes/dense_shared.yaml epochs=5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the recipes of a folder")
    listing.add_argument("folder", nargs="?", type=Path, default=Path("recipes"), help="default: recipes")
    show = actions.add_parser("show", help="one recipe, resolved: with all that it extends, and overrides")
    show.add_argument("recipe", metavar="RECIPE")
    show.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    for action in (listing, show):
        action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """List a folder's recipes, or show one."""
    from trainkit.recipe import load_recipe

    if args.action == "show":
        recipe = load_recipe(args.recipe, args.overrides)
        print_json(recipe.to_dict()) if args.json else print(recipe.to_yaml(), end="")
        return 0
    if not args.folder.is_dir():
        raise UsageError(f"{args.folder}: no such folder; give the one that holds recipes")
    # a leading underscore marks what recipes extend and nobody runs
    recipes, broken = [], []
    for path in sorted(p for p in args.folder.glob("*.yaml") if not p.name.startswith("_")):
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
