"""Shell completion."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import attrs
import shtab

from trainkit.cli import full_parser
from trainkit.cli.output import printable
from trainkit.errors import PluginError, UsageError
from trainkit.hooks import load_class
from trainkit.options import options_of
from trainkit.recipe import Recipe
from trainkit.registry import PLUGINS, installed
from trainkit.rundir import atomic_write

__all__ = ["COMPLETION", "script"]

#: What a shell offers for a recipe: YAML files, and folders on the way to them.
RECIPE = {"bash": "_trainkit_recipes", "zsh": "_files -g '*.y(a|)ml'"}
PREAMBLE: Any = {
    "bash": r"""
_trainkit_recipes() {
  compgen -f -X '!*.yaml' -- "$1"
  compgen -d -- "$1"
}
"""
}
#: Arguments that are files or folders, by the names that the commands give them.
FOLDERS = {"run_dir", "folder", "folders", "run", "images", "data"}
FILES = {"path", "paths", "output", "weights", "public_key"}
PLUGIN_NAMES = {"plugins": {"name", "names"}, "recipes": {"names"}}


def script(shell: str) -> str:
    """Return the completion script of a shell.

    Args:
        shell: ``bash`` or ``zsh``.
    """
    parser = full_parser()
    _offer(parser, "", sorted(installed(PLUGINS)), _override_keys())
    made: str = shtab.complete(parser, shell, preamble=PREAMBLE)
    return made


def _offer(parser: argparse.ArgumentParser, command: str, plugins: list[str], keys: list[str]) -> None:
    """Say what can stand for each argument of a command, and of those below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                _offer(inner, command or name, plugins, keys)
            continue
        argument: Any = action
        if action.dest == "recipe":
            argument.complete = RECIPE
        elif action.dest in PLUGIN_NAMES.get(command, ()):
            action.choices = plugins
        elif action.dest == "overrides":
            action.choices = keys
        elif action.choices is None and action.dest in FOLDERS:
            argument.complete = shtab.DIRECTORY
        elif action.choices is None and action.dest in FILES:
            argument.complete = shtab.FILE


def _override_keys() -> list[str]:
    """Return the keys that ``KEY=VALUE`` may have: those of a recipe, and every option of every installed plugin."""
    keys = [f"{key}=" for key in attrs.fields_dict(Recipe) if key not in ("path", "plugins")]
    for name, records in sorted(installed(PLUGINS).items()):
        keys.append(f"plugins.{name}=")
        try:
            keys += [f"plugins.{name}.{option.name}=" for option in options_of(load_class(records[0]))]
        except PluginError as error:
            print(f"warning: {printable(name)}: its options are unknown: {printable(error)}", file=sys.stderr)
    return keys


class _Completion:
    """``trainkit completion``."""

    HELP = "Print what makes bash or zsh complete commands, recipes, plugins and options."
    EXAMPLES = """\
examples:
  trainkit completion bash -o ~/.local/share/bash-completion/completions/trainkit
  trainkit completion zsh -o ~/.zfunc/_trainkit
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("shell", choices=["bash", "zsh"], help="of which shell")
        parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write it there")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Print the script, or write it."""
        made = script(args.shell)
        if args.output is None:
            print(made)
            return 0
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(args.output, made)
        except OSError as error:
            raise UsageError(f"{args.output}: cannot be written: {error.strerror}") from error
        print(printable(f"{args.output}: shells that are started from now on read it"))
        return 0


COMPLETION = _Completion
