"""Write a new plugin that installs, trains and passes its own tests."""

import argparse
import importlib.metadata
import inspect
import keyword
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import trainkit
from trainkit import hookspecs
from trainkit.errors import UsageError, did_you_mean
from trainkit.registry import installed

__all__ = ["New"]


def _specifications() -> dict[str, Any]:
    """Return the specification of each hook by name, in the order of a run."""
    found = {}
    for phase in hookspecs.PHASES:
        for name, specification in vars(phase).items():
            if not name.startswith("_"):
                found[name] = specification
    return found


HOOKS = _specifications()

# The last lines of a method: by hook where a run needs more than nothing, else by the hook's kind.
ENDINGS = {
    "data": "return fake_data()",
    "model": "size = prod(run.data.shape)\n"
    "        return nn.Sequential(nn.Flatten(), nn.Linear(size, len(run.data.classes)))",
    "loss": "return nn.functional.cross_entropy",
    "optimizer": "return Adam(params)",
    "backward": "autograd.backward(loss)\n        return True",
    "optimizer_step": "run.optimizer.step()",
    "one": "return None",
    "list": "return None",
}

# What a plugin's module may import, besides what the specifications import.
IMPORTS = """
from math import prod
from attrs import field
from attrs.validators import min_len
from torch import autograd
from torch.optim import Adam
from trainkit.hookspecs import Split
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import fake_data
"""


class New:
    """``trainkit plugins new``."""

    HELP = "Write a new plugin that installs, trains and passes its own tests."
    EXAMPLES = """\
examples:
  trainkit plugins new cutout --hook transform_batch
  trainkit plugins new label_noise --hook data transforms --folder elsewhere
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("name", metavar="NAME", help="its name in a recipe: lower-case words joined by _")
        parser.add_argument("--hook", nargs="+", action="extend", help="hooks it implements (default: fit_start)")
        parser.add_argument("--folder", type=Path, default=Path("plugins"), help="where its own folder is made")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Write the files into a new folder, and print what to do next."""
        home: Path = args.folder / args.name
        files = _files(args.name, args.hook or ["fit_start"])
        taken = installed().get(args.name)
        if taken:
            raise UsageError(f"{args.name!r}: {taken[0].distribution} has a plugin of this name; choose another")
        try:
            home.mkdir(parents=True)
            (home / "tests").mkdir()
            for path, text in files.items():
                (home / path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{home}: {error.strerror}; choose another name or --folder") from error
        place = shlex.quote(str(home) if home.is_absolute() else f"./{home}")
        print(f"{home} is written; try it, then list it in a recipe:\n")
        print(f"  pip install -e {place}")
        print(f"  python -m pytest {place}\n")
        print("plugins:")
        print(f"  {args.name}: {{message: hello}}")
        return 0


def _files(name: str, hooks: list[str]) -> dict[str, str]:
    """Return the text of each file of a plugin that implements these hooks, by path.

    Raises:
        UsageError: the name cannot be a plugin's, or there is no such hook.
    """
    _check_name(name)
    for hook in hooks:
        if hook not in HOOKS:
            raise UsageError(f"no hook {hook!r}{did_you_mean(hook, HOOKS) or '; there are ' + ', '.join(HOOKS)}")
    chosen = [hook for hook in HOOKS if hook in hooks]
    methods = "".join(_method(hook) for hook in chosen)
    major, minor = trainkit.__version__.split(".")[:2]
    values = {
        "HYPHENATED-NAME": name.replace("_", "-"),
        "NAME": name,
        "CLASS": _class_name(name),
        "TITLE": name.replace("_", " ").capitalize(),
        "VERSIONS": f"{major}.{minor},<{major}.{int(minor) + 1}",
        "HOOKS": str(len(chosen)),
        "IMPORTS": _imports("@plugin field min_len" + methods),
        "METHODS\n": methods,
    }
    files = {}
    for path, template in _templates():
        files[path.replace("NAME", name)] = re.sub("|".join(values), lambda found: values[found.group()], template)
    return files


def _templates() -> list[tuple[str, str]]:
    """Return path and text of each template: the README shows them, and a distribution's metadata holds its README."""
    readme = importlib.metadata.metadata("trainkit-scaffold")["Description"]
    return re.findall(r"^~~~~ (\S+)\n(.*?)^~~~~$", readme, re.MULTILINE | re.DOTALL)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name) or len(name) > 40:
        raise UsageError(
            f"{name!r} cannot be a plugin's name: expected lower-case words of letters and digits joined by `_`, at "
            "most 40 characters and no keyword of Python, such as random_erasing"
        )


def _class_name(name: str) -> str:
    """Return the plugin's name in CamelCase, with a suffix where it would hide what the module imports."""
    camel_case = name.title().replace("_", "")
    importable = inspect.getsource(hookspecs) + IMPORTS
    if keyword.iskeyword(camel_case) or re.search(rf"\b{camel_case}\b", importable):
        return camel_case + "Plugin"
    return camel_case


def _method(hook: str) -> str:
    """Return a method with the hook's own arguments, types and first sentence."""
    signature = inspect.signature(HOOKS[hook])
    arguments = [
        f"{parameter.name}: {parameter.annotation}"
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    sentence = (inspect.getdoc(HOOKS[hook]) or "").partition("\n")[0]
    kind = HOOKS[hook].trainkit_kind
    if kind == "chain":  # hands on its last argument
        last = list(signature.parameters)[-1]
        ending = f"return {last}"
    else:
        ending = ENDINGS.get(hook) or ENDINGS.get(kind, "")
    method = f'''
    @hookimpl
    def {hook}(self, {", ".join(arguments)}) -> {signature.return_annotation}:
        """{sentence}"""
        run.console.print(f"{hook}: {{self.message}}", markup=False)
'''
    if ending:
        method += f"        {ending}\n"
    return method


def _imports(code: str) -> str:
    """Return the import lines for the names that code uses, in ruff's order: Python's modules, others, trainkit's."""
    importable = inspect.getsource(hookspecs) + IMPORTS
    used: dict[str, set[str]] = {}
    for module, names in re.findall(r"^ *from (\S+) import (.+)", importable, re.MULTILINE):
        for name in names.split(", "):
            if re.search(rf"\b{name}\b", code):
                used.setdefault(_public_module(module, name), set()).add(name)

    python_block, others_block, trainkit_block = "", "", ""
    for module in sorted(used):
        line = f"from {module} import {', '.join(sorted(used[module]))}\n"
        if module.startswith("trainkit"):
            trainkit_block += line
        elif module.partition(".")[0] in sys.stdlib_module_names:
            python_block += line
        else:
            others_block += line
    return "\n".join(block for block in (python_block, others_block, trainkit_block) if block)


def _public_module(module: str, name: str) -> str:
    """Return ``trainkit`` for a class that it exports, else the module where the name is defined."""
    exported = module.startswith("trainkit.") and name.istitle() and name in dir(trainkit)
    return "trainkit" if exported else module
