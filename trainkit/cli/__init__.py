"""The command line: one module a subcommand, imported only when that command is typed.

A command is an object with ``HELP`` (one line), ``add_arguments(parser)`` and ``run(args) -> int`` (the exit code).
Installed packages add commands of their own through the entry-point group ``trainkit.commands``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from shutil import get_terminal_size
from textwrap import fill
from typing import Any, NoReturn

from trainkit import __version__
from trainkit.cli.output import error, guarded_output, printable
from trainkit.errors import TrainkitError, UsageError, did_you_mean
from trainkit.local import allow_local
from trainkit.registry import COMMANDS, Installed, installed, only

__all__ = ["full_parser", "main"]

BUILT_IN = {
    "run": "train what a recipe describes",
    "resume": "continue a run from its last checkpoint, exactly",
    "evaluate": "evaluate a run's checkpoint on the test split",
    "plugins": "list and show installed plugins",
    "recipes": "list, show and explain recipes",
}

# The commands to which packages may add actions, with the actions that each has itself.
ACTIONS = {"plugins": ("list", "show"), "recipes": ("list", "show", "help"), "runs": ()}
OPTIONS = ("run", "resume", "evaluate")  # the commands to which packages may add options
_PLAIN = re.compile(r"[a-z][a-z0-9_-]{0,39}")

# How long a thread spins at a barrier before it sleeps: GNU's OpenMP in iterations (by default 300,000, or for ever),
# Intel's and LLVM's in milliseconds (by default 200).
SPIN = {"GOMP_SPINCOUNT": "30000", "KMP_BLOCKTIME": "1"}

EXAMPLES = """\
examples:
  trainkit run recipes/quickstart.yaml
  trainkit run recipes/basic_se.yaml epochs=5 plugins.cifar10.root=data
  trainkit plugins list
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong input, 130 and 143 interrupted."""
    _shorten_spin()
    with guarded_output() as out:
        try:
            code = _run(argv)
        except _Exit as caught:  # argparse ends the process itself, for --help or a wrong argument
            out.flush()
            raise SystemExit(caught.code or int(out.lost)) from None
        out.flush()
    return code or int(out.lost)


def _run(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in argv
    argv = [a for a in argv if a != "--traceback"]
    try:
        return _dispatch(argv)
    except TrainkitError as caught:
        return _report(caught, str(caught), caught.exit_code, show_traceback)
    except KeyboardInterrupt as caught:
        return _report(caught, "interrupted", 130, show_traceback)
    except _Exit:
        raise
    except BaseException as caught:  # even SystemExit: a plugin that ends the process must say so
        return _report(caught, f"{type(caught).__name__}: {caught} (--traceback shows where)", 1, show_traceback)


def _shorten_spin() -> None:
    """Let threads that wait for each other give up their core soon, unless the user chose how they wait.

    Beside a busy program on the same cores, a thread that spins keeps the one it waits for from running: training is 10
    to 30 times slower then. The setting is read when torch is loaded, so it must be made before
    (``tests/benchmarks/busy.py`` measures it).
    """
    if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", *SPIN} & os.environ.keys():
        os.environ.update(SPIN)


def _dispatch(argv: list[str]) -> int:
    first = argv[0] if argv else "--help"
    if first == "--version":
        print(f"trainkit {__version__}")
        return 0
    extra = _extra()
    if first in ("-h", "--help"):
        _parser(extra).print_help()
        return 0
    two_words = f"{first}.{argv[1]}" if len(argv) > 1 else ""
    if two_words in extra:  # `trainkit plugins new`: an action that a plugin adds to a command
        first, argv = two_words, argv[1:]
    more = ", ".join(_actions(first, extra))
    if more and first not in BUILT_IN and argv[1:2] in (["-h"], ["--help"]):  # nothing but the actions of plugins
        print(
            f"usage: trainkit {first} ACTION ...\n\nactions: {more}\n\n`trainkit {first} ACTION --help` explains each."
        )
        return 0
    given = {argument.partition("=")[0] for argument in argv[1:]}
    taking_over = [name for name in extra if name.startswith(f"{first}.--") and name.partition(".")[2] in given]
    command = _command(taking_over[0] if taking_over else first, extra)  # `trainkit run --seeds`: a plugin's option
    options = [name.partition(".")[2] for name in extra if name.startswith(f"{first}.--")]
    added = f"\n\nactions that plugins add: {more}" if more else ""
    added += f"\n\noptions that plugins add: {', '.join(options)}; `trainkit {first} OPTION --help`" if options else ""
    parser = _Parser(
        prog=f"trainkit {first.replace('.', ' ')}",
        description=_literal(fill(command.HELP, get_terminal_size().columns) + added),
        epilog=_literal(getattr(command, "EXAMPLES", "")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.more = _actions(first, extra)
    command.add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    try:
        # KEY=VALUE before, after and between options; but Python 3.11 forgets there what `--` says
        parse = parser.parse_args if "--" in argv else parser.parse_intermixed_args
        args = parse(argv[1:])
    except TypeError:  # what argparse says of a command with actions
        args = parser.parse_args(argv[1:])
    with allow_local() if getattr(args, "allow_local", False) else nullcontext():
        code: int = command.run(args)
    return code


class _Exit(BaseException):
    """What argparse ends the process with, told apart from a plugin that calls ``sys.exit``."""

    def __init__(self, code: int) -> None:
        self.code = code


class _Parser(argparse.ArgumentParser):
    """Ends as :class:`_Exit` says, and answers what it does not know with what there is."""

    more: Sequence[str] = ()  #: actions that plugins add

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: --(\w[\w.-]*)[ =]?(\S*)", message)
        if unknown:
            message += f"; a value of the recipe is given as {unknown[1].replace('-', '_')}={unknown[2] or 'VALUE'}"
        elif choices := re.match(r"argument ACTION: invalid choice: (.*?) \(choose from", message):
            known = ", ".join([*ACTIONS.get(self.prog.split()[-1], ()), *self.more])
            message = f"no action {choices[1]}; there are {known}"
        super().error(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            print(printable(message), end="", file=sys.stderr)
        raise _Exit(status)


def _literal(text: str) -> str:
    """Return a text that argparse prints as it is: it would replace ``%(prog)s``."""
    return printable(text.replace("%", "%%") if "%(prog)" in text else text)


def _extra() -> dict[str, list[Installed]]:
    """Return the commands and actions of plugins, by name. One that may not be there is passed over, which is said."""
    found = installed(COMMANDS)
    refused = {name: reason for name in found if (reason := _refusal(name))}
    for name, reason in refused.items():
        _say_passed_over(name, ", ".join(f"{record.distribution} {record.version}" for record in found[name]), reason)
    return {name: records for name, records in found.items() if name not in refused}


def _refusal(name: str) -> str:
    """Return why an entry point can be no command, or the empty string: what trainkit itself has is never replaced."""
    command, dot, action = name.partition(".")
    if not (_PLAIN.fullmatch(command) and (_PLAIN.fullmatch(action.removeprefix("--")) or not dot)):
        return "a name is lower-case letters, digits, '_' and '-'"
    if not dot:
        return "trainkit has this command itself" if command in {**BUILT_IN, **ACTIONS} else ""
    if action.startswith("--"):
        if command not in OPTIONS:
            return f"only {', '.join(OPTIONS)} take further options"
        return "trainkit has this option itself" if action in _own_options(command) else ""
    if command not in ACTIONS:
        return f"only {', '.join(ACTIONS)} take further actions"
    return "trainkit has this action itself" if action in ACTIONS[command] else ""


def _own_options(command: str) -> set[str]:
    """Return the options of one of trainkit's own commands."""
    parser = argparse.ArgumentParser()
    import_module(f"trainkit.cli.{command}").add_arguments(parser)
    return {*parser._option_string_actions, "--traceback"}


@cache  # once a process
def _say_passed_over(name: str, claims: str, reason: str) -> None:
    print(f"warning: the command {printable(repr(name))} of {claims} is passed over: {reason}", file=sys.stderr)


def _actions(name: str, extra: Iterable[str]) -> list[str]:
    """Return the actions that plugins add to a command."""
    return [a.removeprefix(f"{name}.") for a in extra if a.startswith(f"{name}.") and not a.startswith(f"{name}.--")]


def _command(name: str, extra: dict[str, list[Installed]]) -> Any:
    if name in BUILT_IN:
        return import_module(f"trainkit.cli.{name}")
    if actions := _actions(name, extra):
        raise UsageError(f"`trainkit {name}` needs an action: {', '.join(sorted(actions))}")
    if name not in extra:
        known = [*BUILT_IN, *dict.fromkeys(other.partition(".")[0] for other in extra)]
        raise UsageError(f"no command {name!r}{did_you_mean(name, known)}; there are {', '.join(dict.fromkeys(known))}")
    return only(name, extra[name], "command").load()


def _parser(extra: dict[str, list[Installed]]) -> argparse.ArgumentParser:
    commands = {**BUILT_IN, **_extra_commands(extra)}
    width = max(map(len, commands))
    columns = get_terminal_size().columns
    listing = "\n".join(
        fill(text or "-", columns, initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4))
        for name, text in commands.items()
    )
    parser = argparse.ArgumentParser(
        prog="trainkit",
        usage="trainkit COMMAND ...",
        description=_literal(f"Train image models, and say exactly what produced a number.\n\ncommands:\n{listing}"),
        epilog=EXAMPLES + "\n`trainkit COMMAND --help` explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    return parser


def full_parser() -> argparse.ArgumentParser:
    """Return one parser of every command and action, for programs that complete what is typed. All are imported."""
    extra = _extra()
    parser = argparse.ArgumentParser(prog="trainkit", add_help=False)
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, text in BUILT_IN.items():
        _add_command(commands, name, text, import_module(f"trainkit.cli.{name}"))
    for name, records in extra.items():
        first, _, action = name.partition(".")
        if action.startswith("--"):  # an option that a plugin adds
            commands.choices[first].add_argument(action, help=only(name, records, "command").load().HELP)
            continue
        command = only(name, records, "command").load()
        parent = commands
        if action:
            owner = commands.choices.get(first) or commands.add_parser(first, help=f"has actions: {first} ACTION")
            known = [each for each in owner._actions if isinstance(each, argparse._SubParsersAction)]
            parent = known[0] if known else owner.add_subparsers(metavar="ACTION")
        _add_command(parent, action or first, command.HELP, command)
    return parser


def _add_command(parent: Any, name: str, text: str, command: Any) -> None:
    parser = parent.add_parser(name, help=_literal(text))
    command.add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")


def _extra_commands(extra: dict[str, list[Installed]]) -> dict[str, str]:
    """Return the commands of plugins with their distribution's summary; ``runs list|show`` for several of one."""
    actions: dict[tuple[str, str], list[str]] = {}
    for name, found in extra.items():
        first, _, action = name.partition(".")
        if action.startswith("--"):
            continue
        actions.setdefault((first, found[0].summary), []).append(action)
    return {
        f"{first} {'|'.join(names)}".strip(): summary[:1].lower() + summary[1:].partition(":")[0].rstrip(".")
        for (first, summary), names in actions.items()
    }


def _report(caught: BaseException, message: str, code: int, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exception(caught)
    error(message)
    return code
