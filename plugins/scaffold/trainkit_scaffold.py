"""Write a new plugin that passes its own tests, and the generated parts of plugins' READMEs."""

import argparse
import importlib.metadata
import inspect
import json
import keyword
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import attrs

import trainkit
from trainkit import hookspecs
from trainkit.errors import PluginError, UsageError, did_you_mean
from trainkit.options import options_of
from trainkit.registry import COMMANDS, PLUGINS, installed

__all__ = ["Docs", "New"]


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
    "processes": "return Processes()",
    "data": "return fake_data()",
    "epoch_order": "return arange(len(run.data.train))",
    "batches_per_step": "return 1",
    "model": "size = prod(run.data.shape)\n"
    "        return nn.Sequential(nn.Flatten(), nn.Linear(size, len(run.data.classes)))",
    "loss": "return nn.functional.cross_entropy",
    "optimizer": "return Adam(params)",
    "backward": "autograd.backward(loss)",
    "optimizer_step": "run.optimizer.step()",
    "one": "return None",
    "list": "return None",
}

# What a plugin's module may import, besides what the specifications import.
IMPORTS = """
from math import prod
from attrs import field
from attrs.validators import min_len
from torch import arange, autograd
from torch.optim import Adam
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


OPTIONS = "<!-- options: generated by trainkit plugins docs -->"
LISTING = "<!-- plugins: generated by trainkit plugins docs -->"
END = "<!-- end -->"

# In a list, a plugin is of the first kind of which it implements a hook.
KINDS = [
    ("Data", {"data", "transform_data", "epoch_order"}),
    ("Network", {"model", "transform_model"}),
    ("Transforms", {"transforms", "transform_batch"}),
    ("Training", {"loss", "transform_loss", "optimizer", "transform_optimizer", "scheduler", "contexts"}),
    ("Training", {"processes", "batches_per_step", "backward", "gradients_ready", "optimizer_step", "eval_model"}),
    ("Network", {"wrap_model"}),
    ("Seeing and keeping", {"metrics", "safe_point", "log"}),
    ("Training", {"built"}),
]
SECTIONS = ("Data", "Transforms", "Network", "Training", "Seeing and keeping", "Commands")


class Docs:
    """``trainkit plugins docs``."""

    HELP = "Write what plugins' classes say of themselves into their READMEs and pyproject.toml."
    EXAMPLES = """\
examples:
  trainkit plugins docs
  trainkit plugins docs plugins/cutout
  trainkit plugins docs --check
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        meaning = "a plugin's folder, or a folder of such (default: plugins, or where there is none, this one)"
        parser.add_argument("folders", metavar="FOLDER", nargs="*", type=Path, help=meaning)
        parser.add_argument("--check", action="store_true", help="write nothing; fail where something is not current")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Write the files that are not current."""
        folders = args.folders or [Path("plugins") if Path("plugins").is_dir() else Path()]
        stale = [(path, text) for path, text in _documents(folders).items() if text != _read(path)]
        names = ", ".join(str(path) for path, _ in stale)
        if stale and args.check:
            command = shlex.join(["trainkit", "plugins", "docs", *map(str, args.folders)])
            raise PluginError(f"not what the plugins' classes say: {names}; `{command}` writes it")
        for path, text in stale:
            path.write_text(text, encoding="utf-8")
        print(f"written: {names}" if stale else "all is current")
        return 0


@attrs.frozen
class _Package:
    """A package of plugins or commands: its folder, its table [project] and what its entry points name."""

    home: Path
    project: dict[str, Any]
    plugins: dict[str, type]
    commands: tuple[str, ...]
    summary: str | None

    @property
    def row(self) -> tuple[str, str]:
        """Its section in a list, and its line."""
        shown = ", ".join([*self.plugins, *(name.replace(".", " ") for name in self.commands)])
        line = f"- [{shown}]({self.home.name}/README.md): {self.summary or self.project.get('description', '')}"
        if not self.plugins:
            return "Commands", line
        cls = next(iter(self.plugins.values()))
        hooks = {name for name in dir(cls) if hasattr(getattr(cls, name), "trainkit_impl")}
        return next((kind for kind, of_kind in KINDS if hooks & of_kind), "Seeing and keeping"), line


def _documents(folders: list[Path]) -> dict[Path, str]:
    """Return the text that each file should have."""
    texts = {}
    for folder in folders:
        alone = (folder / "pyproject.toml").is_file()
        homes = [folder] if alone else sorted(path.parent for path in folder.glob("*/pyproject.toml"))
        packages = [package for home in homes if (package := _package(home))]
        if not packages:
            raise UsageError(f"{folder}: no pyproject.toml here or one level below names a plugin or a command")
        for package in packages:
            path = package.home / "pyproject.toml"
            texts[path] = _described(_read(path), package)
            readme = package.project.get("readme", "README.md")
            path = package.home / (readme if isinstance(readme, str) else readme.get("file", "README.md"))
            if path.is_file() and any(options_of(cls) for cls in package.plugins.values()):
                texts[path] = _between(path, OPTIONS, _tables(package))
        path = folder / "README.md"
        if not alone and path.is_file() and LISTING in _read(path):
            rows = [package.row for package in packages]
            lists = {section: [line for of, line in rows if of == section] for section in SECTIONS}
            blocks = (f"## {section}\n\n" + "\n".join(lines) + "\n" for section, lines in lists.items() if lines)
            texts[path] = _between(path, LISTING, "\n" + "\n".join(blocks) + "\n")
    return texts


def _package(home: Path) -> _Package | None:
    """Read a package's pyproject.toml and import its plugins from its folder; None where it has none."""
    path = home / "pyproject.toml"
    try:
        project = tomllib.loads(_read(path)).get("project", {})
    except tomllib.TOMLDecodeError as error:
        raise PluginError(f"{path}: {error}") from error
    groups = project.get("entry-points", {})
    named, commands = groups.get(PLUGINS, {}), {**groups.get(COMMANDS, {})}
    commands |= {f"--executor {name}": value for name, value in groups.get("trainkit.executors", {}).items()}
    if not named and not commands:
        return None
    plugins = {name: _import(home, value) for name, value in named.items()}
    if len(plugins) > 1:
        summary = None  # one line cannot be each class's
    elif plugins:
        summary = inspect.getdoc(*plugins.values())
    else:
        module, *_ = next(iter(commands.values())).split(":")
        summary = inspect.getdoc(_import(home, module))
    for name, cls in plugins.items():
        if not (inspect.isclass(cls) and attrs.has(cls)):
            raise PluginError(f"{home}: plugin {name!r} is not a class decorated with @plugin")
        if not cls.__doc__:
            raise PluginError(f"{home}: {cls.__name__} has no docstring; its first line is the plugin's summary")
        for option in options_of(cls):
            if not option.meaning:
                raise PluginError(f"{home}: the docstring of {cls.__name__} says nothing of {option.name!r} in `Args:`")
    return _Package(home, project, plugins, (*commands,), summary and summary.partition("\n")[0])


def _import(home: Path, value: str) -> Any:
    """Import what an entry point names from a package's folder, installed or not."""
    module, _, name = value.partition(":")
    before = sys.path[:]
    sys.path[:0] = [str(home.resolve()), str(home.resolve() / "src")]
    try:
        found = importlib.import_module(module)
        return getattr(found, name) if name else found
    except Exception as error:
        raise PluginError(f"{home}: import of {value} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = before


def _described(text: str, package: _Package) -> str:
    """Return the text of pyproject.toml with the summary as its description."""
    if not package.summary or "description" in package.project.get("dynamic", []):
        return text
    line = f"description = {json.dumps(package.summary, ensure_ascii=False)}\n"
    head, start, rest = text.partition("[project]\n")
    table, *others = re.split(r"^(?=\[)", rest, maxsplit=1, flags=re.MULTILINE)
    described = re.sub(r"^description\s*=.*\n", lambda _: line, table, flags=re.MULTILINE)
    if "description" not in package.project:
        described = line + table
    return "".join([head, start, described, *others])


def _tables(package: _Package) -> str:
    """Return the options of each plugin as a table."""
    text = ""
    for name, cls in package.plugins.items():
        rows = [(f"`{o.name}`", f"`{o.type}`", f"`{o.default}`", _markdown(o.meaning)) for o in options_of(cls)]
        lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
        lines = ["key | type | default | meaning", "---|---|---|---", *lines]
        title = f"`{name}`:\n\n" if len(package.plugins) > 1 else ""
        text += title + "".join(f"| {line} |\n" if line[0] != "-" else f"|{line}|\n" for line in lines)
    return text


def _markdown(text: str) -> str:
    """Return reStructuredText of a docstring's entry as Markdown, without the full stop of a lone sentence."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return text if ". " in text else text.removesuffix(".")


def _between(path: Path, mark: str, generated: str) -> str:
    """Return the text of a file with the part between the marks replaced; where there is none, it comes last."""
    text = _read(path)
    if mark not in text:
        text = f"{text.rstrip()}\n\n{mark}\n{END}\n"
    head, _, rest = text.partition(mark)
    if END not in rest:
        raise PluginError(f"{path}: {mark} has no {END} after it")
    return f"{head}{mark}\n{generated}{END}{rest.partition(END)[2]}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PluginError(f"{path}: {error}") from error
