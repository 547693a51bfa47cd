"""What is installed: read from distribution metadata alone, so that listing plugins imports none of them."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from trainkit import __version__
from trainkit.errors import PluginError, TrainkitError, did_you_mean
from trainkit.rundir import MAX_JSON, parse_json, read_regular

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from trainkit.recipe import Recipe

__all__ = [
    "COMMANDS",
    "PLUGINS",
    "RESUMABLE",
    "Installed",
    "base_name",
    "find",
    "installed",
    "missing_hint",
    "only",
    "program",
    "providers",
    "requirements",
    "source_of",
]

PLUGINS = "trainkit.plugins"
COMMANDS = "trainkit.commands"
RESUMABLE = "trainkit.resumable"  # by a file that marks a folder which is no run, and which `trainkit resume` takes


@attrs.frozen
class Installed:
    """One entry point of one installed distribution."""

    name: str
    distribution: str
    version: str
    summary: str
    value: str
    entry_point: importlib.metadata.EntryPoint = attrs.field(repr=False, eq=False)

    def load(self) -> Any:
        """Import what the entry point names.

        Raises:
            PluginError: it cannot be imported, whatever the reason.
        """
        what = self.entry_point.group.removeprefix("trainkit.").removesuffix("s")
        try:
            return self.entry_point.load()
        except TrainkitError as error:  # such as what @plugin refuses
            raise PluginError(f"{what} {self.name!r} ({self.distribution} {self.version}): {error}") from error
        except BaseException as error:
            if type(error) is KeyboardInterrupt:  # the user's, and no class of the plugin's own
                raise
            said = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
            cure = f", or drop it: `{self.name}: false`" if self.entry_point.group == PLUGINS else ""
            raise PluginError(
                f"{what} {self.name!r} ({self.distribution} {self.version}) failed at import of {self.value}: "
                f"{said}; reinstall {self.distribution}{cure}"
            ) from error

    def check_requirement(self) -> None:
        """Hold this trainkit against what the distribution requires.

        Raises:
            PluginError: it needs another version.
        """
        dist = self.entry_point.dist
        for needed in requirements(dist) if dist is not None else []:
            if needed.name == "trainkit" and not needed.specifier.contains(__version__, prereleases=True):
                raise PluginError(
                    f"plugin {self.name!r} ({self.distribution} {self.version}) needs trainkit{needed.specifier}, "
                    f"and this is trainkit {__version__}; install a version of {self.distribution} that fits"
                )

    @property
    def source(self) -> str:
        """Where it was installed from: ``editable``, ``wheel``, ``local`` or a version-control reference.

        Never a local path; ``unknown`` where the record of it is damaged.
        """
        dist = self.entry_point.dist
        if dist is None:
            return "wheel"
        try:
            text = dist.read_text("direct_url.json")
            return _origin(parse_json(text)) if text else "wheel"
        except Exception:  # no JSON, JSON of another shape, or a file that cannot be read
            _report(f"direct_url.json of {self.distribution!r}", self.distribution)
            return "unknown"


def base_name(name: str) -> str:
    """Return the plugin that a key of a recipe names: ``random_erasing`` for ``random_erasing@second``."""
    return name.partition("@")[0]


def installed(group: str = PLUGINS) -> dict[str, list[Installed]]:
    """Return the installed entry points of a group by name; more than one of a name is for the caller to refuse.

    What is damaged is passed over; a message on the standard error stream names it once. A process reads the metadata
    again only when a folder on its path has changed: hundreds of packages take 50 ms.
    """
    folders = tuple((folder, _changed(folder)) for folder in sys.path)
    return {name: list(records) for name, records in _installed(group, folders).items()}


def _changed(folder: str) -> int:
    """Return when a package was last installed into a folder, or removed from it; -1 where there is no folder."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except (OSError, ValueError):
        return -1


@lru_cache(maxsize=8)
def _installed(group: str, folders: tuple[tuple[str, int], ...]) -> dict[str, list[Installed]]:
    """Read the entry points of a group from the packages in these folders, which are those on the path."""
    try:
        entries = list(importlib.metadata.entry_points(group=group))
    except Exception:  # one unreadable file of any installed package ends that call
        entries = _readable_entry_points(group)
    found: dict[str, list[Installed]] = defaultdict(list)
    for entry in entries:
        dist = entry.dist
        if dist is None:  # cannot happen for entry points read from metadata; keeps the types honest
            continue
        try:
            meta = dist.metadata
            # Once it is imported, the backport importlib_metadata finds packages, too; its meta["Summary"] can raise.
            name, version = meta["Name"], meta["Version"]
            summary = next(iter(meta.get_all("Summary") or []), "")
        except Exception:  # parsing a damaged file may raise anything
            name, version, summary = None, None, ""
        if not name or not version:
            _report(f"METADATA of the package that offers {entry.name!r} ({entry.value!r})", "it")
            continue
        record = Installed(_plain(entry.name), _plain(name), _plain(version), _plain(summary), entry.value, entry)
        if record not in found[record.name]:  # a checkout on sys.path can show one distribution twice
            found[record.name].append(record)
    return dict(sorted(found.items()))


def requirements(dist: importlib.metadata.Distribution) -> list[Requirement]:
    """Return what a distribution requires here, without its extras; a requirement that cannot be parsed is reported."""
    from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        texts = dist.requires or []
    except Exception:  # parsing a damaged file may raise anything
        _report(f"what {dist.name!r} requires", dist.name)
        return []
    found = []
    for text in texts:
        try:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                found.append(needed)
        except (InvalidRequirement, UndefinedComparison, UndefinedEnvironmentName):
            _report(f"Requires-Dist {text!r} of {dist.name!r}", dist.name)
    return found


def only(name: str, records: list[Installed], what: str = "plugin") -> Installed:
    """Return the one installed plugin or command of a name.

    Raises:
        PluginError: two distributions claim the name.
    """
    if len(records) > 1:
        claims = " and ".join(f"{record.distribution} {record.version}" for record in records)
        raise PluginError(f"{what} {name!r} is claimed by {claims}; uninstall one of them")
    return records[0]


def find(recipe: Recipe, also: Iterable[str] = ()) -> dict[str, Installed]:
    """Return the installed plugin of each key that the recipe lists, in its order.

    Args:
        recipe: the recipe.
        also: names of plugins that are not installed and that a mistyped key may mean.

    Raises:
        PluginError: plugins are not installed (all of them are named), or two distributions claim one name.
    """
    have = installed()
    bases = {name: base_name(name) for name in recipe.plugins}
    missing = [base for base in dict.fromkeys(bases.values()) if base not in have]
    if missing:
        raise PluginError(missing_hint(recipe, missing, [*have, *also]))
    found = {name: only(base, have[base]) for name, base in bases.items()}
    for record in found.values():
        record.check_requirement()
    return found


def source_of(recipe: Recipe, name: str) -> str | None:
    """Return what pip installs a plugin from, quoted for a shell, or None where nothing says so.

    In this order: the requirement that the recipe's `requires` gives for its name, its folder in the recipe's checkout,
    a requirement of the recipe whose project is called after it.
    """
    name = base_name(name)
    if not name.isidentifier():
        return None
    named = recipe.requires.get(name) if isinstance(recipe.requires, dict) else None
    if named and _is_plain(named):
        return shlex.quote(named)
    start = (recipe.path or Path()).resolve()
    for folder in (*start.parents, Path.cwd()):
        home = folder / "plugins" / name
        if (home / "pyproject.toml").is_file() and _is_checkout(folder):
            inside = home.is_relative_to(Path.cwd())
            return "-e " + shlex.quote(f"./{home.relative_to(Path.cwd())}" if inside else str(home))
    given = recipe.requires.values() if isinstance(recipe.requires, dict) else recipe.requires
    for requirement in given:
        project = re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
        if _is_plain(requirement) and project.endswith(f"trainkit-{name.replace('_', '-')}"):
            return shlex.quote(requirement)
    return None


def _is_checkout(folder: Path) -> bool:
    """Tell whether a folder is a checkout of trainkit; in a folder that others write to, anybody may put plugins."""
    try:
        text = read_regular(folder / "pyproject.toml", MAX_JSON).decode()
        return bool(tomllib.loads(text)["project"]["name"] == "trainkit")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def program(name: str) -> str | None:
    """Return the absolute path of a program, or None. No folder that PATH gives relative to the current one counts.

    Args:
        name: such as ``git``.
    """
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    found = shutil.which(name, path=os.pathsep.join(folder for folder in folders if os.path.isabs(folder)))
    return found if found and os.path.isabs(found) else None  # on Windows, the current folder comes first


def providers(hook: str) -> list[str]:
    """Return the installed plugins whose source says that they implement a hook. None of them is imported."""
    return [name for name, records in installed().items() if any(_implements(record, hook) for record in records)]


def _implements(record: Installed, hook: str) -> bool:
    """Tell whether the class that an entry point names has a method of this name, marked with ``@hookimpl``."""
    module, _, cls = record.value.partition(":")
    try:
        path = _source_file(module)
        tree = ast.parse(read_regular(path, MAX_JSON)) if path else ast.Module(body=[], type_ignores=[])
    except Exception:  # another package's file, which may be anything
        return False
    methods = [
        method
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == cls.strip()
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == hook
    ]
    return any("hookimpl" in ast.unparse(mark) for method in methods for mark in method.decorator_list)


def _source_file(module: str) -> Path | None:
    """Return the file of a module. Finding it imports nothing, not even the packages that it lies in."""
    top, *inner = module.strip().split(".")
    spec = importlib.util.find_spec(top)
    for name in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        top = f"{top}.{name}"
        spec = PathFinder.find_spec(top, list(spec.submodule_search_locations))
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def missing_hint(recipe: Recipe, missing: list[str], have: Iterable[str]) -> str:
    """Return the message for plugins that a recipe lists and that are not installed: what, and the cure for each."""
    missing = list(dict.fromkeys(map(base_name, missing)))
    given = recipe.requires if isinstance(recipe.requires, dict) else {}
    known, unknown = {}, []
    for name in missing:
        source = source_of(recipe, name)
        if source:
            known[name] = source
        else:
            unknown.append(name)
    parts = [f"{recipe.where}: " + _plural("plugin", missing) + " not installed"]
    if known:  # one distribution may hold several plugins
        parts.append("install with: pip install " + " ".join(dict.fromkeys(known.values())))
    nowhere = [name for name in unknown if name not in given]
    for name in unknown:
        if name in given:
            parts.append(
                f"requires.{name}: {given[name]!r} is an address or an option, and not a project with its versions; "
                "install it yourself if you trust it"
            )
    if nowhere:
        parts.append(
            _plural("plugin", nowhere) + " not to be found in this checkout's plugins/ or the recipe's `requires`; "
            "correct the name, or add the requirement that provides it to `requires`"
        )
    for name in nowhere:
        near = did_you_mean(name, have).removeprefix("; ")
        if near:
            parts.append(f"plugins.{name}: {near}")
    return "; ".join(parts)


def _is_plain(requirement: str) -> bool:
    """Tell a project with versions from an address or an option of pip, which is nothing to print as a command."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(\[[\w,-]+\])?[\s\w.,*<>=!~+]*", requirement) is not None


def _plural(word: str, names: list[str]) -> str:
    listed = ", ".join(repr(name) for name in names)
    return f"{word} {listed} is" if len(names) == 1 else f"{word}s {listed} are"


def _origin(record: dict[str, Any]) -> str:
    """Return where pip says that it installed from; see :attr:`Installed.source`."""
    url: str = record["url"]
    if "vcs_info" in record and not url.startswith("file:"):
        return f"{url}@{record['vcs_info'].get('commit_id', '')}"
    return "editable" if record.get("dir_info", {}).get("editable") else "local"


def _plain(text: str) -> str:
    """Return a stranger's text as one line without control characters, which a terminal would obey."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def _readable_entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
    """Read the distributions one by one, the first of a name alone, as importlib.metadata does for all at once."""
    found: list[importlib.metadata.EntryPoint] = []
    seen: set[str] = set()
    for dist in importlib.metadata.distributions():
        try:
            name = re.sub(r"[-_.]+", "-", dist.name).lower()
        except Exception:  # parsing a damaged file may raise anything
            name = f"unnamed {len(seen)}"
        if name in seen:
            continue
        seen.add(name)
        try:
            found.extend(dist.entry_points.select(group=group))
        except Exception:
            if _may_offer_plugins(dist):
                _report(f"entry_points.txt of {dist.name!r}", dist.name)
    return found


def _may_offer_plugins(dist: importlib.metadata.Distribution) -> bool:
    """Tell whether a package whose entry points cannot be read could concern us: it is of trainkit, or requires it."""
    try:
        return any("trainkit" in text.lower() for text in (dist.name, *(dist.requires or [])))
    except Exception:  # its name cannot be read either
        return False


_reported: set[str] = set()


def _report(what: str, distribution: str) -> None:
    """Say once that a file of an installed package is damaged. What is quoted in `what` went through repr."""
    if what not in _reported:
        _reported.add(what)
        print(f"warning: {what} cannot be read and is passed over; reinstall {_plain(distribution)}", file=sys.stderr)
