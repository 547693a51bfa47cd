"""Install the plugins that a recipe lists and that are missing, from where the recipe says."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.cli.output import printable
from trainkit.errors import PluginError, RecipeError, RunError, UsageError
from trainkit.registry import base_name, installed, missing_hint, program, source_of
from trainkit.rundir import MAX_JSON, read_regular

if TYPE_CHECKING:
    from trainkit.recipe import Recipe

__all__ = ["Install"]


class Install:
    """``trainkit plugins install``."""

    HELP = "Install the plugins that a recipe lists and that are missing, from where the recipe says."
    EXAMPLES = """\
examples:
  trainkit plugins install recipes/dense_shared.yaml
  trainkit plugins install recipes/dense_shared.yaml plugins.figures=false --yes
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("recipe", metavar="RECIPE", help="a recipe file")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of the recipe")
        parser.add_argument("--yes", action="store_true", help="do not ask")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Show the command, ask, run it, and check that the plugins are installed then."""
        from trainkit.recipe import load_recipe

        recipe = load_recipe(args.recipe, args.overrides)
        missing = _missing(recipe)
        if not missing:
            print(f"{printable(recipe.where)}: nothing to install: every plugin that it lists is installed")
            return 0
        command = [*_installer(), *_sources(recipe, missing)]
        print(printable(shlex.join(command)), flush=True)
        if not (args.yes or _agreed()):
            print("nothing was installed")
            return 1
        # Neither the installer nor what it builds imports modules of the current folder.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        code = subprocess.run(command, env=environment, check=False).returncode
        if code != 0:
            raise RunError(f"the command failed with exit code {code}; what it printed above says why")
        importlib.invalidate_caches()
        still_missing = _missing(recipe)
        if still_missing:
            raise PluginError(f"installed, but no package provides the plugin {', '.join(map(repr, still_missing))}")
        return 0


def _missing(recipe: Recipe) -> list[str]:
    """Return the plugins that the recipe lists and that are not installed."""
    have = installed()
    return [name for name in dict.fromkeys(map(base_name, recipe.plugins)) if name not in have]


def _sources(recipe: Recipe, missing: list[str]) -> list[str]:
    """Return what the installer is told to install: folders of the checkout, and requirements that were checked.

    Raises:
        PluginError: plugins have no source; all of them are named.
        RecipeError: a requirement is not a project with versions.
    """
    for name in missing:
        if not name.isidentifier():  # to the installer, `-r` would be an option and `./x` a path
            raise PluginError(f"{recipe.where}: plugins: {name!r} is no name of a plugin")
    sources = {name: shlex.split(source_of(recipe, name) or "") for name in missing}
    unknown = [name for name, source in sources.items() if not source]
    if unknown:
        raise PluginError(missing_hint(recipe, unknown, installed()))
    arguments: list[str] = []
    for source in sources.values():
        if len(source) == 2:  # -e and a folder
            arguments += source
        else:  # a requirement, which is quoted, so that it is one word whatever it says
            arguments.append(_requirement(recipe, source[0]))
    return arguments


def _requirement(recipe: Recipe, text: str) -> str:
    """Return a requirement in its normal form.

    Raises:
        RecipeError: it cannot be parsed, or it names an address.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"{recipe.where}: requires: {text!r} is not a requirement: {reason}") from error
    if requirement.url is not None:
        raise RecipeError(
            f"{recipe.where}: requires: {text!r} names an address, which is not installed on a recipe's word; if you "
            "trust it, install it yourself"
        )
    return str(requirement)


def _installer() -> list[str]:
    """Return the command that installs into the environment of this interpreter."""
    settings = Path(sys.prefix, "pyvenv.cfg")
    made_by_uv = settings.is_file() and re.search(rb"^uv\s*=", read_regular(settings, MAX_JSON), re.MULTILINE)
    has_pip = any(True for _ in distributions(name="pip"))  # find_spec would find a pip.py of the current folder
    uv = program("uv") if made_by_uv or not has_pip else None
    if uv:
        return [uv, "pip", "install", *_uv_settings(), "--python", sys.executable]
    if has_pip:
        return [sys.executable, "-P", "-m", "pip", "install"]  # -P: never from the current folder
    raise UsageError(f"neither pip nor uv can install into {sys.executable}; add pip with `python -m ensurepip`")


def _uv_settings() -> list[str]:
    """Return the options that keep uv from settings of the current folder, such as another index; the user's count."""
    base = os.environ.get("APPDATA") if os.name == "nt" else os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    own = Path(base or "~").expanduser() / "uv" / "uv.toml"
    return ["--config-file", str(own)] if own.is_absolute() and own.is_file() else ["--no-config"]


def _agreed() -> bool:
    """Ask on the terminal whether to run the command."""
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask on; pass --yes to run this command")
    print("run this? [y/N] ", end="", flush=True)
    answer = sys.stdin.readline()  # empty at the end of the input, which counts as no
    return answer.strip().lower() in ("y", "yes")
