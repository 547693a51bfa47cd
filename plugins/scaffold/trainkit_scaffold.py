"""Write a new plugin that installs, trains and passes its own tests."""

import argparse
import importlib.metadata
import inspect
import keyword
import re
import shlex
import sys
from itertools import groupby
from pathlib import Path

import trainkit
from trainkit import hookspecs
from trainkit.errors import UsageError, did_you_mean
from trainkit.registry import installed

__all__ = ["New"]

HOOKS = {name: spec for phase in hookspecs.PHASES for name, spec in vars(phase).items() if name[0] != "_"}

# What a method ends with: by hook where a run needs something, else by kind.
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

# What a module uses beside what the specifications import.
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
        """Write the files where nothing is yet, and print what comes next."""
        home: Path = args.folder / args.name
        files = _files(args.name, args.hook or ["fit_start"])
        if taken := installed().get(args.name):
            raise UsageError(f"{args.name!r}: {taken[0].distribution} has a plugin of this name; choose another")
        try:
            home.mkdir(parents=True)
            (home / "tests").mkdir()
            for path, text in files.items():
                (home / path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{home}: {error.strerror}; choose another name or --folder") from error
        place = shlex.quote(str(home) if home.is_absolute() else f"./{home}")
        print(f"{home} is written; try it, then list it in a recipe:\n\n  pip install -e {place}")
        print(f"  python -m pytest {place}\n\nplugins:\n  {args.name}: {{message: hello}}")
        return 0


def _files(name: str, hooks: list[str]) -> dict[str, str]:
    """Return the text of each file of a plugin that implements these hooks."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name) or len(name) > 40:
        raise UsageError(
            f"{name!r} cannot be a plugin's name: expected lower-case words of letters and digits joined by `_`, at "
            "most 40 characters and no keyword of Python, such as random_erasing"
        )
    for hook in hooks:
        if hook not in HOOKS:
            raise UsageError(f"no hook {hook!r}{did_you_mean(hook, HOOKS) or '; there are ' + ', '.join(HOOKS)}")
    chosen = [hook for hook in HOOKS if hook in hooks]
    cls = name.title().replace("_", "")
    if keyword.iskeyword(cls) or re.search(rf"\b{cls}\b", inspect.getsource(hookspecs) + IMPORTS):
        cls += "Plugin"
    methods = "".join(map(_method, chosen))
    major, minor = trainkit.__version__.split(".")[:2]
    values = {
        "HYPHENATED-NAME": name.replace("_", "-"),
        "NAME": name,
        "CLASS": cls,
        "TITLE": name.replace("_", " ").capitalize(),
        "VERSIONS": f"{major}.{minor},<{major}.{int(minor) + 1}",
        "HOOKS": str(len(chosen)),
        "IMPORTS": _imports("@plugin field min_len" + methods),
        "METHODS\n": methods,
    }
    # the README shows the files, and a distribution carries its README in its metadata
    readme = importlib.metadata.metadata("trainkit-scaffold")["Description"]
    return {
        path.replace("NAME", name): re.sub("|".join(values), lambda m: values[m.group()], text)
        for path, text in re.findall(r"^~~~~ (\S+)\n(.*?)^~~~~$", readme, re.MULTILINE | re.DOTALL)
    }


def _method(hook: str) -> str:
    """Return a method with the hook's own arguments, types and first sentence."""
    signature = inspect.signature(HOOKS[hook])
    kind = HOOKS[hook].trainkit_kind
    _, *given = [f"{p.name}: {p.annotation}" for p in signature.parameters.values()]
    sentence = (inspect.getdoc(HOOKS[hook]) or "").partition("\n")[0]
    ending = f"return {[*signature.parameters][-1]}" if kind == "chain" else ENDINGS.get(hook) or ENDINGS.get(kind)
    return f'''
    @hookimpl
    def {hook}(self, {", ".join(given)}) -> {signature.return_annotation}:
        """{sentence}"""
        run.console.print(f"{hook}: {{self.message}}", markup=False)
''' + (f"        {ending}\n" if ending else "")


def _imports(code: str) -> str:
    """Return the import lines for all that code uses, in the order of ruff: Python's own, others, trainkit's."""
    used: dict[str, set[str]] = {}
    for module, names in re.findall(r"^ *from (\S+) import (.+)", inspect.getsource(hookspecs) + IMPORTS, re.MULTILINE):
        for name in names.split(", "):
            if re.search(rf"\b{name}\b", code):
                public = module.startswith("trainkit.") and name.istitle() and name in dir(trainkit)
                used.setdefault("trainkit" if public else module, set()).add(name)

    def group(module: str) -> tuple[bool, bool]:
        return module.startswith("trainkit"), module.partition(".")[0] not in sys.stdlib_module_names

    blocks = groupby(sorted(used, key=lambda module: (group(module), module)), group)
    return "\n".join("".join(f"from {m} import {', '.join(sorted(used[m]))}\n" for m in block) for _, block in blocks)
