"""What a number depends on: record it, compare it.

A record is plain data: JSON and checkpoints can hold it. It has four parts, each made by a function of its own::

    recipe        the resolved recipe
    plugins       name, version, distribution, source and options of each plugin, in call order
    environment   interpreter, packages, processor, devices, threads, source revision, data
    declared      what plugins add through the hook `provenance`: by plugin, by name

:func:`compare` is the only place that knows which differences can change a number.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from trainkit.errors import PluginError

if TYPE_CHECKING:
    from trainkit.data import Data, Split
    from trainkit.hooks import Implementation, LoadedPlugin
    from trainkit.recipe import Recipe
    from trainkit.run import Run
    from trainkit.rundir import RunDir

__all__ = ["ABSENT", "LISTED", "Difference", "compare", "fingerprint", "from_files", "record", "write"]

DIGEST_SIZE = 16
PACKAGES = ("trainkit", "torch", "torchvision", "numpy", "pluggy", "attrs", "omegaconf", "pillow")

ABSENT = "absent"  #: stands in a difference for a value that a record does not have
LISTED = "listed"  #: stands in a difference for a plugin that a recipe lists

#: What a difference does: the numbers may differ; the run is longer or shorter; nothing.
Effect = Literal["numbers", "length", "none"]

RECIPE_LENGTH = {"epochs", "max_steps"}
RECIPE_NOTES = {"name", "description", "source", "expect", "requires"}
PLUGIN_NOTES = {"source"}
ENVIRONMENT_NOTES = {"python", "platform", "processor", "devices", "revision"}


# ---- record


def record(run: Run) -> dict[str, Any]:
    """Return all that the numbers of a run depend on, as plain data.

    Args:
        run: a run that is built.
    """
    with run.hooks.blaming(PluginError):
        return {
            "recipe": run.recipe.to_dict(),
            "plugins": plugin_records(run.hooks.plugins, run.recipe),
            "environment": {**environment(), "device": str(run.device), "data": data_record(run.data)},
            "declared": declared(run),
        }


def plugin_records(plugins: Mapping[str, LoadedPlugin], recipe: Recipe) -> list[dict[str, Any]]:
    """Return what identifies each plugin of a run, in call order.

    Args:
        plugins: by name; one without a distribution was made by a test or in a notebook.
        recipe: gives each plugin's options.
    """
    return [
        {
            "name": name,
            "distribution": plugin.installed.distribution if plugin.installed else None,
            "version": plugin.version,
            "source": plugin.installed.source if plugin.installed else None,
            "options": recipe.plugins.get(name, {}),
        }
        for name, plugin in plugins.items()
    ]


def environment() -> dict[str, Any]:
    """Return what this process and this machine add: the same for every run of the process, but for the threads."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "packages": packages(),
        "threads": threads(),
        "devices": devices(),
        "revision": revision(),
    }


@cache  # installing a package does not change what this process has imported
def packages() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


@cache
def processor() -> str:
    """Return the model of the CPU."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def threads() -> int:
    """Return the number of threads that torch computes with; sums over parts depend on it."""
    import torch

    return torch.get_num_threads()


def devices() -> list[str]:
    """Return the names of the GPUs."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def revision() -> str | None:
    """Return the current directory's git revision, marked when files differ from it; None outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def data_record(data: Data) -> dict[str, Any]:
    """Return what identifies the images and targets of each split."""
    return {name: {"images": len(split), "fingerprint": fingerprint(split)} for name, split in data.splits.items()}


def fingerprint(split: Split) -> str:
    """Return what identifies a split's content: its own ``fingerprint()`` if it has one, else its length."""
    own = getattr(split, "fingerprint", None)
    return str(own()) if own is not None else f"{len(split)} images"


def declared(run: Run) -> dict[str, dict[str, Any]]:
    """Return what plugins declare through the hook ``provenance``, by plugin and name; a file by its content.

    Raises:
        PluginError: a plugin declares something else than files, text and numbers, or a file that cannot be read.
    """
    found = {}
    for implementation, values in run.hooks.collect("provenance", dict, run):
        found[implementation.plugin.name] = {
            name: _declared_value(implementation, name, value) for name, value in values.items()
        }
    return found


def _declared_value(implementation: Implementation, name: str, value: Path | str | float) -> str | float:
    if isinstance(value, str | int | float):
        return value
    if not isinstance(value, Path):
        raise implementation.wrong(value, (Path, str, float))
    try:
        return file_digest(value)
    except OSError as error:
        raise PluginError(f"{implementation.plugin}, provenance: {name}: {value}: {error.strerror}") from error


def file_digest(path: Path) -> str:
    """Return a file's content as ``blake2b:<digest>``, which says how it was made."""
    digest = blake2b(digest_size=DIGEST_SIZE)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"blake2b:{digest.hexdigest()}"


# ---- keep


def write(made: Mapping[str, Any], run_dir: RunDir) -> None:
    """Write a record to ``plugins.lock.json`` and ``environment.json``; the recipe has a file of its own."""
    run_dir.write_json("plugins.lock.json", made["plugins"])
    run_dir.write_json("environment.json", {**made["environment"], "declared": made["declared"]})


def from_files(
    recipe: Mapping[str, Any], plugins: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the record that a run directory holds.

    Args:
        recipe: what ``recipe.yaml`` holds, resolved.
        plugins: what ``plugins.lock.json`` holds.
        environment: what ``environment.json`` holds.
    """
    rest = {name: value for name, value in environment.items() if name != "declared"}
    return {
        "recipe": recipe,
        "plugins": plugins,
        "environment": rest,
        "declared": environment.get("declared", {}),
    }


# ---- compare


@attrs.frozen
class Difference:
    """One thing in which records differ; ``str()`` says it in words.

    Args:
        key: what it is: ``batch_size``, ``plugins.sgd.lr``, ``environment.threads``.
        values: one value a record, :data:`ABSENT` where a record has none.
        effect: ``numbers`` where the numbers of the runs may differ for it, ``length`` where one run trains longer,
            ``none`` where it cannot change a bit.
    """

    key: str
    values: tuple[Any, ...]
    effect: Effect = "numbers"

    def __str__(self) -> str:
        before, after = self.values[0], self.values[-1]
        if after == LISTED:
            return f"{self.key} was added"
        if before == LISTED:
            return f"{self.key} was dropped"
        return f"{self.key} was {before} and is {after}"


def compare(*records: Mapping[str, Any]) -> list[Difference]:
    """Return every difference between records, that of a run first, in the order of the parts of a record.

    A part that an older version of trainkit did not record counts as empty.
    """
    recipes = [made.get("recipe", {}) for made in records]
    plugins = [made.get("plugins", []) for made in records]
    environments = [made.get("environment", {}) for made in records]
    declarations = [made.get("declared", {}) for made in records]
    return [
        *_compare_recipes(recipes),
        *_compare_plugins(plugins),
        *_compare_environments(environments),
        *(Difference(f"declared.{key}", values) for key, values in _differing(declarations)),
    ]


def _compare_recipes(recipes: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    without_plugins = [{name: value for name, value in recipe.items() if name != "plugins"} for recipe in recipes]
    for key, values in _differing(without_plugins):
        name = key.partition(".")[0]
        effect: Effect = "length" if name in RECIPE_LENGTH else "none" if name in RECIPE_NOTES else "numbers"
        yield Difference(key, values, effect)


def _compare_plugins(lists: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[Difference]:
    """Compare plugin by plugin. The options of a plugin that only one record lists are no differences of their own."""
    by_name = [{plugin["name"]: plugin for plugin in plugins} for plugins in lists]
    names = dict.fromkeys(name for plugins in by_name for name in plugins)
    for name in names:
        listing = [plugins[name] for plugins in by_name if name in plugins]
        if len(listing) < len(by_name):
            yield Difference(f"plugins.{name}", tuple(LISTED if name in plugins else ABSENT for plugins in by_name))
        if len(listing) > 1:
            for difference in _compare_plugin(name, listing):
                values = iter(difference.values)
                spread = tuple(next(values) if name in plugins else ABSENT for plugins in by_name)
                yield attrs.evolve(difference, values=spread)
    orders = [", ".join(name for name in plugins if all(name in other for other in by_name)) for plugins in by_name]
    if _differ(orders):
        yield Difference("order of plugins", tuple(orders))


def _compare_plugin(name: str, listing: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    facts = [{fact: value for fact, value in plugin.items() if fact != "options"} for plugin in listing]
    for fact, values in _differing(facts):
        yield Difference(f"plugins.{name} {fact}", values, "none" if fact in PLUGIN_NOTES else "numbers")
    for option, values in _differing([plugin.get("options", {}) for plugin in listing]):
        yield Difference(f"plugins.{name}.{option}", values)


def _compare_environments(environments: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    for key, values in _differing(environments):
        note = key.partition(".")[0] in ENVIRONMENT_NOTES
        yield Difference(f"environment.{key}", values, "none" if note else "numbers")


def _differing(trees: Sequence[Any], key: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the dotted keys at which nested mappings differ, with the values there."""
    if all(isinstance(tree, Mapping) for tree in trees):
        for name in dict.fromkeys(name for tree in trees for name in tree):
            inner = [tree.get(name, ABSENT) for tree in trees]
            yield from _differing(inner, f"{key}.{name}" if key else str(name))
    elif _differ(trees):
        yield key, tuple(trees)


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)
