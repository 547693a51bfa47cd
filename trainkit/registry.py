"""What is installed: read from distribution metadata alone, so that listing plugins imports none of them."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from trainkit import __version__
from trainkit.errors import PluginError, did_you_mean

if TYPE_CHECKING:
    from trainkit.recipe import Recipe

__all__ = ["COMMANDS", "PLUGINS", "Installed", "find", "installed", "missing_hint"]

PLUGINS = "trainkit.plugins"
COMMANDS = "trainkit.commands"


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
        try:
            return self.entry_point.load()
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"plugin {self.name!r} ({self.distribution} {self.version}) failed at import of {self.value}: "
                f"{type(error).__name__}: {error}; reinstall {self.distribution}, or drop it: `{self.name}: false`"
            ) from error

    def check_requirement(self) -> None:
        """Hold this trainkit against what the distribution requires.

        Raises:
            PluginError: it needs another version.
        """
        from packaging.requirements import Requirement

        dist = self.entry_point.dist
        for text in (dist.requires or []) if dist is not None else []:
            needed = Requirement(text)
            if needed.name == "trainkit" and not needed.specifier.contains(__version__, prereleases=True):
                raise PluginError(
                    f"plugin {self.name!r} ({self.distribution} {self.version}) needs trainkit{needed.specifier}, "
                    f"and this is trainkit {__version__}; install a version of {self.distribution} that fits"
                )

    @property
    def source(self) -> str:
        """Where it was installed from: ``editable``, ``wheel``, or a version-control reference; never a local path."""
        dist = self.entry_point.dist
        text = dist.read_text("direct_url.json") if dist is not None else None
        if not text:
            return "wheel"
        origin = json.loads(text)
        if "vcs_info" in origin:
            return f"{origin['url']}@{origin['vcs_info'].get('commit_id', '')}"
        return "editable" if origin.get("dir_info", {}).get("editable") else "local"


def installed(group: str = PLUGINS) -> dict[str, list[Installed]]:
    """Return the installed entry points of a group by name; more than one of a name is for the caller to refuse."""
    found: dict[str, list[Installed]] = defaultdict(list)
    for entry in importlib.metadata.entry_points(group=group):
        dist = entry.dist
        if dist is None:  # cannot happen for entry points read from metadata; keeps the types honest
            continue
        meta = dist.metadata
        record = Installed(entry.name, meta["Name"], dist.version, meta["Summary"] or "", entry.value, entry)
        if record not in found[entry.name]:  # a checkout on sys.path can show one distribution twice
            found[entry.name].append(record)
    return dict(sorted(found.items()))


def find(recipe: Recipe) -> dict[str, Installed]:
    """Return the installed plugin of each name that the recipe lists, in its order.

    Raises:
        PluginError: plugins are not installed (all of them are named), or two distributions claim one name.
    """
    have = installed()
    missing = [name for name in recipe.plugins if name not in have]
    if missing:
        raise PluginError(missing_hint(recipe, missing, have))
    for name in recipe.plugins:
        if len(have[name]) > 1:
            claims = " and ".join(f"{i.distribution} {i.version}" for i in have[name])
            raise PluginError(f"plugin {name!r} is claimed by {claims}; uninstall one of them")
        have[name][0].check_requirement()
    return {name: have[name][0] for name in recipe.plugins}


def source_of(recipe: Recipe, name: str) -> str | None:
    """Return what pip installs a plugin from: its folder in the recipe's checkout, or a requirement of the recipe."""
    start = (recipe.path or Path()).resolve()
    for folder in (*start.parents, Path.cwd()):
        home = folder / "plugins" / name
        if name.isidentifier() and (home / "pyproject.toml").is_file():
            inside = home.is_relative_to(Path.cwd())
            return "-e " + shlex.quote(f"./{home.relative_to(Path.cwd())}" if inside else str(home))
    for requirement in recipe.requires:
        if not name.isidentifier() or not re.fullmatch(
            r"[A-Za-z0-9][\w.-]*(\[[\w,-]+\])?[\s\w.,*<>=!~+]*", requirement
        ):
            continue  # an address or an option for pip is nothing to print as a command
        project = re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
        if project.endswith(f"trainkit-{name.replace('_', '-')}"):
            return shlex.quote(requirement)
    return None


def missing_hint(recipe: Recipe, missing: list[str], have: dict[str, list[Installed]]) -> str:
    """Return the message for plugins that a recipe lists and that are not installed: what, and the cure for each."""
    known = {name: source for name in missing if (source := source_of(recipe, name))}
    parts = [f"{recipe.where}: " + _plural("plugin", missing) + " not installed"]
    if known:
        parts.append("install with: pip install " + " ".join(known.values()))
    unknown = [name for name in missing if name not in known]
    if unknown:
        parts.append(
            _plural("plugin", unknown) + " not to be found in this checkout's plugins/ or the recipe's `requires`; "
            "correct the name, or add the requirement that provides it to `requires`"
            + "".join(
                f"; plugins.{name}: {near.removeprefix('; ')}" for name in unknown if (near := did_you_mean(name, have))
            )
        )
    return "; ".join(parts)


def _plural(word: str, names: list[str]) -> str:
    listed = ", ".join(repr(n) for n in names)
    return f"{word} {listed} is" if len(names) == 1 else f"{word}s {listed} are"
