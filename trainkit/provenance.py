"""What a number depends on: record it, compare it.

A record is plain data: JSON and checkpoints can hold it. It has six parts, each made by a function of its own::

    recipe        the resolved recipe
    plugins       name, version, distribution, source, code and all options of each plugin, in call order
    environment   the core's code, interpreter, packages, torch's build, instruction sets, device, threads, variables
    data          content of each split, classes, shape, preprocessing
    declared      what plugins add through the hook `provenance`: by plugin, by name
    replaced      parts of the run that were exchanged after it was built, as in a notebook

:func:`compare` is the only place that knows which differences can change a number.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from trainkit import __version__
from trainkit.errors import CheckpointError, PluginError, UsageError
from trainkit.plugin import declared as declared_by
from trainkit.plugin import is_observer
from trainkit.recipe import needed_files
from trainkit.registry import program, requirements
from trainkit.rundir import open_regular

if TYPE_CHECKING:
    import torch

    from trainkit.data import Split
    from trainkit.hooks import Implementation, LoadedPlugin
    from trainkit.recipe import Recipe
    from trainkit.run import Run
    from trainkit.rundir import RunDir

__all__ = [
    "ABSENT",
    "LISTED",
    "Difference",
    "compare",
    "compare_state",
    "digest",
    "file_digest",
    "fingerprint",
    "from_files",
    "machine",
    "material",
    "of_state",
    "read",
    "record",
    "state_digest",
    "write",
]

DIGEST_SIZE = 16

ABSENT = "absent"  #: stands in a difference for a value that a record does not have
LISTED = "listed"  #: stands in a difference for a plugin that a recipe lists

FEW = 10  # elements of a list that a difference names

#: What a difference does: the numbers may differ; the run is longer or shorter; nothing.
Effect = Literal["numbers", "length", "none"]

RECIPE_LENGTH = {"epochs", "max_steps"}
RECIPE_NOTES = {
    "name",
    "description",
    "source",
    "expect",
    "requires",
    "local",
    "device",
}  # code and device are recorded
PLUGIN_NOTES = {"source", "observer", "without_effect"}
#: A patch version of Python changes no arithmetic, so :func:`_is_note` lets it pass, too; another minor version may
#: draw, sort or round differently. Variables that set threads, or choose a GPU, are recorded as what they set:
#: `threads`, and `gpu`, its model, so that a run may go on on another GPU of the same model.
ENVIRONMENT_NOTES = {"platform", "waiting", "observers_packages", "revision", "trainkit.version"}
NOTED_VARIABLES = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}
DATA_NOTES = {"preprocessing", "resize", "target"}  # content and options say the same
BESIDE = ("declared", "replaced")  # parts that environment.json holds, too

#: Variables that change what torch, its libraries or a GPU compute.
ARITHMETIC = re.compile(
    r"ATEN_CPU_CAPABILITY|(ONE)?DNN(L)?_(MAX_CPU_ISA|DEFAULT_FPMATH_MODE|CPU_ISA_HINTS)|MKL_\w+|OPENBLAS_\w+"
    r"|OMP_(NUM_THREADS|DYNAMIC|SCHEDULE)|NVIDIA_TF32_OVERRIDE|TORCH_(ALLOW_TF32\w*|CUDNN\w*|BLAS\w*)|CUBLAS\w*"
    r"|CUDNN_\w+|CUDA_VISIBLE_DEVICES|PYTORCH_NVFUSER\w*|PYTORCH_MIOPEN\w*"
)
#: Variables that change how long threads wait for each other, and no number.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
#: Packages that only show things to people; neither they nor what they require can change a number.
FOR_PEOPLE = {"rich", "pytest", "matplotlib"}
#: Parts of a run that a recipe decides, and whose exchange is noticed; and those whose content is.
PARTS = ("data", "batches", "transforms", "model", "forward", "loss", "optimizer", "schedules", "context")
CONTENTS = {"weights": "model", "optimizer's state": "optimizer"}


@attrs.frozen
class Built:
    """The parts of a run as trainkit made or loaded them.

    Args:
        parts: by attribute of the run.
        contents: digests of weights and of the optimizer's state.
        already: which contents were replaced in an earlier session.
    """

    parts: Mapping[str, Any]
    contents: Mapping[str, str]
    already: Sequence[str] = ()


# ---- record


def record(run: Run) -> dict[str, Any]:
    """Return all that the numbers of a run depend on, as plain data.

    Args:
        run: a run that is built.
    """
    with run.hooks.blaming(PluginError):
        return {
            "recipe": recipe_record(run.recipe),
            "plugins": plugin_records(run.hooks.plugins),
            "environment": environment(run.device, run.hooks.plugins),
            "data": data_record(run),
            "declared": declared(run),
            "replaced": replaced(run),
        }


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe with its defaults; the plugins' options stand in the records of the plugins."""
    plain = {name: value for name, value in recipe.to_dict().items() if name != "plugins"}
    if plain.get("test_batch_size") == recipe.batch_size:  # the default, written out
        del plain["test_batch_size"]
    if plain.get("numerics") == "native":  # the default, which records of before do not name
        del plain["numerics"]
    return plain


def plugin_records(plugins: Mapping[str, LoadedPlugin]) -> list[dict[str, Any]]:
    """Return what identifies each plugin of a run, in call order.

    Args:
        plugins: by name; one without a distribution was made by a test or in a notebook.
    """
    return [
        {
            "name": name,
            "distribution": plugin.installed.distribution if plugin.installed else None,
            "version": plugin.version,
            "source": plugin.installed.source if plugin.installed else None,
            "code": plugin_code(plugin),
            "observer": is_observer(type(plugin.instance)),
            "without_effect": list(declared_by(type(plugin.instance), "without_effect")),
            "options": options_of(plugin.instance),
        }
        for name, plugin in plugins.items()
    ]


def options_of(instance: Any) -> dict[str, Any]:
    """Return all options of a plugin as plain data, defaults included; a file beside the recipe by its content."""
    found = {}
    for option in attrs.fields(type(instance)):
        if option.init:
            value = getattr(instance, option.name)
            is_file = option.metadata.get("recipe_file") and isinstance(value, Path)
            content = _content(type(instance), option.name, value) if is_file else None
            found[option.alias or option.name] = content or _plain(value)
    return found


def _content(cls: type, option: str, path: Path) -> str | None:
    """Return the name and the digest of a file, or of a folder's files that are needed; None where neither is there."""
    if path.is_file():
        return f"{path.name} {file_digest(path)}"
    if not path.is_dir() or attrs.fields_dict(cls)[option].metadata.get("files") is None:
        return None
    digest = blake2b(digest_size=DIGEST_SIZE)
    for name, file in sorted(needed_files(cls, option, path).items()):
        digest.update(f"{name} {file_digest(file)}\n".encode())
    return f"{path.name} blake2b:{digest.hexdigest()}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Enum):
        return value.name
    if attrs.has(type(value)):
        return {name: _plain(getattr(value, name)) for name in attrs.fields_dict(type(value))}
    return value if isinstance(value, bool | int | float | str | None) else f"<{type(value).__qualname__}>"


def plugin_code(plugin: LoadedPlugin) -> str | None:
    """Return a digest of a plugin's source files; None where there are none, as in a notebook.

    For an installed plugin these are the files of its top-level module or package; for another the module of its class.
    """
    name = type(plugin.instance).__module__
    module = sys.modules.get(name.partition(".")[0] if plugin.installed else name)
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    path = Path(file)
    return code_digest(path.parent if path.name == "__init__.py" else path)


def code_digest(path: Path, leave_out: tuple[str, ...] = ()) -> str:
    """Return a digest of a source file, or of the names and contents of a package's files.

    Args:
        path: a file or a folder.
        leave_out: folders directly in it that do not count.
    """
    if path.is_file():
        return file_digest(path)
    digest = blake2b(digest_size=DIGEST_SIZE)
    for file in sorted(path.rglob("*")):
        inner = file.relative_to(path)
        if file.is_file() and file.suffix != ".pyc" and inner.parts[0] not in leave_out:
            digest.update(f"{inner.as_posix()} {file_digest(file)}\n".encode())
    return f"blake2b:{digest.hexdigest()}"


def environment(device: torch.device, plugins: Mapping[str, LoadedPlugin]) -> dict[str, Any]:
    """Return what this process and this machine add."""
    watching = [plugin for plugin in plugins.values() if is_observer(type(plugin.instance))]
    others = [plugin for plugin in plugins.values() if plugin not in watching]
    needed = packages(["trainkit", *_distributions(others)])
    return {
        "trainkit": {"version": __version__, "code": core_code()},
        "revision": revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "instruction_sets": instruction_sets(),
        "torch_build": torch_build(),
        "packages": needed,
        "observers_packages": {
            name: version for name, version in packages(_distributions(watching)).items() if name not in needed
        },
        "variables": {name: value for name, value in sorted(os.environ.items()) if ARITHMETIC.fullmatch(name)},
        "waiting": {name: os.environ[name] for name in WAITING if name in os.environ},
        "threads": threads(),
        "settings": settings(),
        "device": str(device),
        "gpu": gpu(device),
    }


def _distributions(plugins: Sequence[LoadedPlugin]) -> list[str]:
    return [plugin.installed.distribution for plugin in plugins if plugin.installed]


@cache
def core_code() -> str:
    """Return a digest of the core's files; the command line and the helpers for tests compute nothing."""
    return code_digest(Path(__file__).parent, leave_out=("cli", "testing", "__pycache__"))


def packages(roots: Sequence[str]) -> dict[str, str]:
    """Return the versions of distributions and of all that they require, transitively, by name.

    Args:
        roots: names of distributions; they are not among the results, because plugins have records of their own.
    """
    found: dict[str, str] = {}
    waiting = list(roots)
    seen = {_normal(name) for name in (*waiting, *FOR_PEOPLE)}
    while waiting:
        for name in _required(waiting.pop()):
            if _normal(name) not in seen:
                seen.add(_normal(name))
                waiting.append(name)
                found[_normal(name)] = _version(name)
    return dict(sorted(found.items()))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache  # installing a package does not change what this process has imported
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name) or "unknown"
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    except Exception:  # parsing a damaged file may raise anything
        return "unknown"


@cache
def _required(name: str) -> tuple[str, ...]:
    """Return the distributions that one requires on this machine, without its extras."""
    try:
        return tuple(requirement.name for requirement in requirements(importlib.metadata.distribution(name)))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ()


@cache
def processor() -> str:
    """Return the model of the CPU."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


@cache
def instruction_sets() -> dict[str, str]:
    """Return the instruction sets that torch and oneDNN really use: those of the CPU, unless a variable caps them.

    oneDNN tells its own only on the standard output, in the first line that it prints of a process, so a tiny
    convolution is computed with that stream turned aside.
    """
    import torch

    found = {"torch": torch.backends.cpu.get_cpu_capability()}
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return found
    said = _said_by_onednn()
    if isa := re.search(r"info,cpu,isa:(.*)", said):
        found["onednn"] = isa[1].strip()
    if kernel := re.search(r",convolution,([^,]+),", said):
        found["onednn_convolution"] = kernel[1]
    return found


def _said_by_onednn() -> str:
    import torch

    try:
        flush = ctypes.CDLL(None).fflush  # C has a buffer of its own
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, TypeError, AttributeError):  # Windows, or no standard output
        return ""
    with tempfile.TemporaryFile() as aside:
        flush(None)
        os.dup2(aside.fileno(), 1)
        try:
            verbose = torch.backends.mkldnn.verbose
            with torch.no_grad(), verbose(torch.backends.mkldnn.VERBOSE_ON):  # type: ignore[no-untyped-call]
                torch.nn.functional.conv2d(torch.zeros(8, 16, 32, 32), torch.zeros(16, 16, 3, 3))
            flush(None)
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        aside.seek(0)
        return aside.read().decode(errors="replace")


@cache
def torch_build() -> str:
    """Return a digest of how torch was built, compilers and libraries included, and its version."""
    import torch

    # The instruction set in use is another part of the record.
    text = re.sub(r"CPU capability usage.*", "", torch.__config__.show())
    return f"{torch.__version__} blake2b:{blake2b(text.encode(), digest_size=DIGEST_SIZE).hexdigest()}"


def threads() -> int:
    """Return the number of threads that torch computes with; sums over parts depend on it."""
    import torch

    return torch.get_num_threads()


def settings() -> dict[str, Any]:
    """Return torch's global settings that change what it computes."""
    import torch

    return {
        "default_dtype": str(torch.get_default_dtype()),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "flush_denormal": float(torch.tensor(1e-39) * 0.5) == 0.0,
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """Return model, compute capability and libraries of a GPU; nothing for other devices."""
    import torch

    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "model": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "driver": _driver(),
    }


@cache
def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    if path.is_file():
        found = re.search(r"Kernel Module.*?(\d+\.\d+(\.\d+)?)", path.read_text())
        return found[1] if found else None
    return None


@cache
def revision() -> str | None:
    """Return the git revision of trainkit's own sources, marked when files differ from it; None for a wheel.

    git runs in the checkout that trainkit itself was loaded from, and never in the current folder, whose settings could
    make it run programs.
    """
    checkout = Path(__file__).resolve().parents[1]
    git = program("git")
    if git is None or not ((checkout / ".git").exists() and (checkout / "pyproject.toml").is_file()):
        return None
    command = [git, "-c", "core.fsmonitor=false", "-C", str(checkout), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            [*command, "--abbrev=40", "--exclude=*"],
            cwd=checkout,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def data_record(run: Run) -> dict[str, Any]:
    """Return what identifies the images, targets and classes, and what is done to the images of each split."""
    splits = {name: {"images": len(split), "content": fingerprint(split)} for name, split in run.data.splits.items()}
    transforms = run.hooks.plugins
    preprocessing = {}
    for name, pipeline in run.transforms.items():
        names = dict.fromkeys(purpose.partition("/")[0] for purpose, _ in pipeline.steps)
        preprocessing[name] = {plugin: options_of(transforms[plugin].instance) for plugin in names}
    return {
        "splits": splits,
        "classes": list(run.data.classes),
        "shape": list(run.data.shape),
        "resize": _plain(run.data.file_size),
        "target": "class" if run.data.has_class_targets else "other",
        "preprocessing": preprocessing,
    }


def fingerprint(split: Split) -> str:
    """Return what identifies a split's content: its own ``fingerprint()`` if it has one, else its length."""
    own = getattr(split, "fingerprint", None)
    return str(own()) if own is not None else f"{len(split)} images"


def replaced(run: Run) -> list[str]:
    """Return the parts that are not those that trainkit built or loaded; weights by their content.

    A recipe does not say these: ``run.loss = ...`` or ``run.model.load_state_dict(...)`` in a notebook.
    """
    found = [name for name, part in run.built.parts.items() if getattr(run, name) is not part]
    now = contents(run)
    return [
        *found,
        *run.built.already,
        *(f"{name} {now[name]}" for name in now if now[name] != run.built.contents[name]),
    ]


def contents(run: Run) -> dict[str, str]:
    """Return digests of what a run's parts hold now."""
    return {name: digest(getattr(run, part).state_dict()) for name, part in CONTENTS.items()}


def of_contents(replaced: Sequence[str]) -> list[str]:
    """Return those replaced parts that a checkpoint keeps, so that the run continues with them."""
    return [text for text in replaced if text.startswith(tuple(CONTENTS))]


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
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"blake2b:{digest.hexdigest()}"


# ---- digests


def state_digest(state: Mapping[str, Any]) -> str:
    """Return a digest of what a run's further numbers depend on: of a state that ``Run.state_dict`` returned.

    These are weights, optimizer, schedules, position, the metrics so far and what is better of them, and the states of
    plugins, but for observers. Time, paths, records and observers have no part in it: whoever replays the run gets the
    same digest.

    Args:
        state: a state, from a run or from a checkpoint.
    """
    watching = {plugin["name"] for plugin in state["provenance"].get("plugins", []) if plugin.get("observer")}
    chosen = {name: state[name] for name in ("model", "optimizer", "schedules", "position", "history", "non_finite")}
    recorded = {name for row in state["history"] for name in row}
    chosen["directions"] = {name: info for name, info in state["metric_info"].items() if name in recorded}
    chosen["plugins"] = {name: saved["state"] for name, saved in state["plugins"].items() if name not in watching}
    return digest(chosen)


def material(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a record that decide a run's numbers, but for the machine: without notes and observers.

    Whoever runs the same recipe with the same code and data has the same material, wherever that is.
    """
    plugins = []
    for plugin in record["plugins"]:
        if not plugin["observer"]:
            options = {n: v for n, v in plugin["options"].items() if n not in plugin["without_effect"]}
            version = plugin["version"] if plugin["code"] is None else None  # the same code computes the same
            plugins.append({"name": plugin["name"], "version": version, "code": plugin["code"], "options": options})
    watching = _observers([record["plugins"]])
    return {
        "recipe": {name: value for name, value in record["recipe"].items() if name not in RECIPE_NOTES},
        "plugins": plugins,
        "core": record["environment"]["trainkit"]["code"],
        "data": {name: value for name, value in record["data"].items() if name not in DATA_NOTES},
        "declared": {name: value for name, value in record["declared"].items() if name not in watching},
        "replaced": record["replaced"],
    }


def machine(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a record's environment that decide a run's bits, as nested values, without notes."""
    found: dict[str, Any] = {}
    for key, (value,) in _differing([record["environment"]], all_of_them=True):
        if not _is_note("environment", key, (value,)):
            found[key] = ".".join(value.split(".")[:2]) if key == "python" else value
    return found


def digest(value: Any) -> str:
    """Return a digest of nested plain values and tensors; equal ones have equal digests, on whatever device."""
    made = blake2b(digest_size=DIGEST_SIZE)
    _feed(made, value)
    return made.hexdigest()


def _feed(made: Any, value: Any) -> None:
    """Feed a value to a hash, each part behind its type and length, so that no two values give the same bytes."""
    import torch

    if isinstance(value, torch.Tensor):
        made.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        if value.numel() and not value.is_meta:  # the meta device holds no data
            tensor = value.detach().cpu().contiguous()
            made.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        made.update(f"mapping {len(value)} ".encode())
        for key in sorted(value, key=repr):
            _feed(made, key)
            _feed(made, value[key])
    elif isinstance(value, list | tuple):
        made.update(f"sequence {len(value)} ".encode())
        for inner in value:
            _feed(made, inner)
    else:
        text = repr(value).encode()
        made.update(f"{type(value).__name__} {len(text)} ".encode() + text)


# ---- keep


def write(made: Mapping[str, Any], run_dir: RunDir) -> None:
    """Write a record to ``plugins.lock.json``, ``environment.json`` and ``data.json``.

    The recipe has a file of its own. What an earlier session wrote is never overwritten (:meth:`RunDir.add_json`).
    """
    run_dir.add_json("plugins.lock.json", made["plugins"])
    run_dir.add_json("environment.json", {**made["environment"], **{name: made[name] for name in BESIDE}})
    run_dir.add_json("data.json", made["data"])


def read(run_dir: RunDir, recipe: Recipe) -> dict[str, Any]:
    """Return the record that the files of a run's first session hold.

    Raises:
        TrainkitError: a file is missing, or is not what a run writes.
    """
    plugins, environment, data = (
        run_dir.read_json(name) for name in ("plugins.lock.json", "environment.json", "data.json")
    )
    listed = isinstance(plugins, list) and all(isinstance(each, dict) and "name" in each for each in plugins)
    if not (listed and isinstance(environment, dict) and isinstance(data, dict)):
        raise UsageError(f"{run_dir.path}: its record is not what a run writes")
    return from_files(recipe, plugins, environment, data)


def from_files(
    recipe: Recipe | None, plugins: Sequence[Mapping[str, Any]], environment: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the record that a run directory holds.

    Args:
        recipe: what ``recipe.yaml`` holds, resolved; None where it cannot be read.
        plugins: what ``plugins.lock.json`` holds.
        environment: what ``environment.json`` holds.
        data: what ``data.json`` holds.
    """
    rest = {name: value for name, value in environment.items() if name not in BESIDE}
    return {
        "recipe": {} if recipe is None else recipe_record(recipe),
        "plugins": plugins,
        "environment": rest,
        "data": data,
        "declared": environment.get("declared", {}),
        "replaced": environment.get("replaced", []),
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

    @property
    def is_of_meaning(self) -> bool:
        """Whether it is of the classes or the code: what a metric means, and not only its last digits."""
        return self.key in ("data.classes", "environment.trainkit.code") or self.key.endswith(" code")

    def __str__(self) -> str:
        before, after = self.values[0], self.values[-1]
        if isinstance(before, list) and isinstance(after, list) and len(before) == len(after) > FEW:
            places = [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
            changed = [f"{place} was {before[place]} and is {after[place]}" for place in places[:FEW]]
            rest = [f"and {len(places) - FEW} more"] if len(places) > FEW else []
            return f"{self.key}: {', '.join([*changed, *rest])}"
        if after == LISTED:
            return f"{self.key} was added"
        if before == LISTED:
            return f"{self.key} was dropped"
        return f"{self.key} was {before} and is {after}"


def of_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is recorded in a checkpoint.

    Raises:
        CheckpointError: it holds no record.
    """
    recorded = state.get("provenance")
    if not isinstance(recorded, Mapping):
        raise CheckpointError("the checkpoint does not fit the recipe: it lacks 'provenance', what its run depended on")
    return recorded


def compare_state(state: Mapping[str, Any], run: Run) -> list[Difference]:
    """Return the differences between what a checkpoint's run depended on, and what this one does.

    Raises:
        CheckpointError: the checkpoint holds no such record.
    """
    now = record(run)
    try:
        return compare(of_state(state), now)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint's record of its run cannot be understood: {error!r}") from error


def compare(*records: Mapping[str, Any]) -> list[Difference]:
    """Return every difference between records, that of a run first, in the order of the parts of a record.

    A part that an older version of trainkit did not record counts as empty.
    """
    recipes = [made.get("recipe", {}) for made in records]
    plugins = [made.get("plugins", []) for made in records]
    environments = [made.get("environment", {}) for made in records]
    data = [made.get("data", {}) for made in records]
    declarations = [made.get("declared", {}) for made in records]
    watching = _observers(plugins)
    return [
        *_compare_recipes(recipes),
        *_compare_plugins(plugins),
        *_compare_environments(environments, portable=all(recipe.get("numerics") == "portable" for recipe in recipes)),
        *_compare_parts("data", data),
        *_compare_parts("declared", declarations, watching),
        *_compare_replaced([made.get("replaced", []) for made in records]),
    ]


def _compare_replaced(lists: Sequence[Sequence[str]]) -> Iterator[Difference]:
    told = [", ".join(names) or "nothing" for names in lists]
    if _differ(told):
        yield Difference("what was replaced after build()", tuple(told))


def _observers(lists: Sequence[Sequence[Mapping[str, Any]]]) -> set[str]:
    """Return the names of plugins of which every record that lists them says that they only watch.

    Neither these, nor what they declare, can change a number.
    """
    listing = [plugin for plugins in lists for plugin in plugins]
    return {p["name"] for p in listing} - {p["name"] for p in listing if not p.get("observer")}


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
    material = []
    for name in names:
        listing = [plugins[name] for plugins in by_name if name in plugins]
        observes = all(plugin.get("observer", False) for plugin in listing)
        if not observes:
            material.append(name)
        if len(listing) < len(by_name):
            values = tuple(LISTED if name in plugins else ABSENT for plugins in by_name)
            yield Difference(f"plugins.{name}", values, "none" if observes else "numbers")
        if len(listing) > 1:
            for difference in _compare_plugin(name, listing):
                inner = iter(difference.values)
                spread = tuple(next(inner) if name in plugins else ABSENT for plugins in by_name)
                effect = "none" if observes else difference.effect
                yield attrs.evolve(difference, values=spread, effect=effect)
    in_all = [name for name in material if all(name in plugins for plugins in by_name)]
    orders = [", ".join(name for name in plugins if name in in_all) for plugins in by_name]
    if _differ(orders):
        yield Difference("order of plugins", tuple(orders))


def _compare_plugin(name: str, listing: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    """Compare the records of one plugin. The same code under another version number computes the same."""
    facts = [{fact: value for fact, value in plugin.items() if fact != "options"} for plugin in listing]
    code = [plugin.get("code") for plugin in listing]
    same_code = code[0] is not None and not _differ(code)
    for fact, values in _differing(facts):
        note = fact.partition(".")[0] in PLUGIN_NOTES or (same_code and fact in ("version", "distribution"))
        yield Difference(f"plugins.{name} {fact}", values, "none" if note else "numbers")
    without_effect = set.intersection(*({*plugin.get("without_effect", ())} for plugin in listing))
    for option, values in _differing([plugin.get("options", {}) for plugin in listing]):
        note = option.partition(".")[0] in without_effect
        yield Difference(f"plugins.{name}.{option}", values, "none" if note else "numbers")


def _compare_environments(trees: Sequence[Mapping[str, Any]], *, portable: bool) -> Iterator[Difference]:
    """Compare environments; the CPU's model decides nothing where all runs use no more than what every CPU has."""
    for difference in _compare_parts("environment", trees):
        is_model = portable and difference.key == "environment.processor"
        yield attrs.evolve(difference, effect="none") if is_model else difference


def _compare_parts(
    part: str, trees: Sequence[Mapping[str, Any]], watching: set[str] | None = None
) -> Iterator[Difference]:
    for key, values in _differing(trees):
        note = _is_note(part, key, values) or key.partition(".")[0] in (watching or ())
        yield Difference(f"{part}.{key}", values, "none" if note else "numbers")


def _is_note(part: str, key: str, values: Sequence[Any]) -> bool:
    """Tell whether a difference within the environment or the data cannot change a bit."""
    first, _, rest = key.partition(".")
    if part == "data":
        return first in DATA_NOTES
    if part != "environment":
        return False
    if key == "python":  # patch versions
        return len(values) > 1 and not _differ([str(value).split(".")[:2] for value in values])
    return first in ENVIRONMENT_NOTES or key in ENVIRONMENT_NOTES or (first == "variables" and rest in NOTED_VARIABLES)


def _differing(
    trees: Sequence[Any], key: str = "", *, all_of_them: bool = False
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the dotted keys at which nested mappings differ, or all of them, with the values there."""
    if all(isinstance(tree, Mapping) for tree in trees):
        for name in dict.fromkeys(name for tree in trees for name in tree):
            inner = [tree.get(name, ABSENT) for tree in trees]
            yield from _differing(inner, f"{key}.{name}" if key else str(name), all_of_them=all_of_them)
    elif all_of_them or _differ(trees):
        yield key, tuple(trees)


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)
