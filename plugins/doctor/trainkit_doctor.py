"""Look for what is wrong with this installation, and say what to do about it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Literal
from urllib.request import url2pathname

import attrs
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trainkit.cli.output import print_json, table, terminal
from trainkit.registry import COMMANDS, PLUGINS, installed, program
from trainkit.rundir import MAX_JSON, parse_json, read_regular

__all__ = ["EXAMPLES", "HELP", "Finding", "add_arguments", "run"]

HELP = "Look for what is wrong with this installation, and say what to do about it."
EXAMPLES = "examples:\n  trainkit doctor\n  trainkit doctor --json\n"
# Runs in a process of its own, because a broken torch may abort and not only raise.
PROBE = """\
import json, torch, torchvision
gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
found = {
    "torch": torch.__version__,
    "torchvision": torchvision.__version__,
    "cuda": torch.version.cuda or torch.version.hip,
    "gpus": gpus,
    "threads": torch.get_num_threads(),
}
print(json.dumps(found))
"""


@attrs.frozen
class Finding:
    """One thing that was looked at."""

    what: str
    verdict: Literal["ok", "advice", "problem"]
    detail: str
    cure: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print what was looked at, and return 1 if anything found would break a run."""
    findings = [*_machine(), *_torch(), *_metadata()]
    if args.json:
        print_json([attrs.asdict(finding) for finding in findings])
    else:
        rows = [(found.what, found.verdict, found.detail, found.cure) for found in findings]
        terminal().print(table(["", "verdict", "finding", "what to do"], rows))
    return 1 if any(finding.verdict == "problem" for finding in findings) else 0


def _judge(what: str, fine: bool, detail: str, advice: str) -> Finding:
    """Return a finding that comes with advice unless all is fine."""
    if fine:
        return Finding(what, "ok", detail)
    return Finding(what, "advice", detail, advice)


def _machine() -> Iterator[Finding]:
    """Look at Python, the packages, what torch.compile needs and the current folder."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    versions = []
    for name in ("trainkit", "numpy", "pillow", "pluggy", "attrs", "omegaconf", "PyYAML", "rich"):
        versions += [f"{name} {version}" for version in _versions(name)]
    yield Finding("packages", "ok", ", ".join(dict.fromkeys(versions)))

    # torch.compile calls this compiler for the CPU, and its C++ code includes Python.h.
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    found = shutil.which(shlex.split(compiler)[0]) is not None
    yield _judge("compiler", found, compiler, "torch.compile needs it: install it, or set CXX to another one")
    header = Path(sysconfig.get_path("include"), "Python.h")
    yield _judge("headers", header.is_file(), str(header), "torch.compile needs it: install python3-dev")

    free = shutil.disk_usage(".").free / 2**30
    yield _judge("folder", free >= 1, f"{free:.1f} GiB free", "make room for checkpoints")
    if not os.access(".", os.W_OK):
        yield Finding("folder", "problem", "cannot be written to", "go to one that can, or use --run-dir")


def _torch() -> Iterator[Finding]:
    """Look at torch, torchvision, the GPUs and the number of threads."""
    code, said = _ask(sys.executable, "-P", "-c", PROBE)
    if code != 0:
        yield Finding("torch", "problem", f"import fails: {said}", "install torch and torchvision that match")
        return
    found = json.loads(said)
    cuda = found["cuda"]
    yield Finding("torch", "ok", f"{found['torch']}, CUDA {cuda or 'not built in'}; torchvision {found['torchvision']}")
    yield _devices(found["gpus"], cuda)
    threads = found["threads"]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield _judge("threads", threads <= cpus, f"{threads} on {cpus} CPUs", f"set OMP_NUM_THREADS={cpus}")


def _devices(gpus: list[str], cuda: str | None) -> Finding:
    """Compare the GPUs that torch can use with those that the driver knows."""
    if gpus:
        return Finding("devices", "ok", ", ".join(gpus))
    code, known = _ask("nvidia-smi", "-L")
    if code != 0:
        return Finding("devices", "ok", "no GPU: runs use the CPU")
    cure = "update its driver; see CUDA_VISIBLE_DEVICES" if cuda else "install a torch that is built for CUDA"
    return Finding("devices", "advice", f"{known}, which this torch cannot use", cure)


def _metadata() -> Iterator[Finding]:
    """Look at the installed plugins, commands and their distributions."""
    for kind, group in (("plugin", PLUGINS), ("command", COMMANDS)):
        names = installed(group)
        yield Finding(f"{kind}s", "ok", f"{len(names)} installed")
        for name, entries in names.items():
            if len(entries) > 1:
                claims = " and ".join(entry.distribution for entry in entries)
                yield Finding(f"{kind} {name}", "problem", f"{claims} claim it", "pip uninstall one of them")
    ours, in_use = _distributions()
    for name, versions in ours.items():
        if len(versions) > 1:
            yield Finding(name, "problem", f"{' and '.join(versions)} at once", "uninstall it until none is left")
        for dist in versions.values():
            for look in (_source, partial(_requirements, in_use=in_use)):
                try:
                    yield from look(dist)
                except Exception as error:  # parsing a damaged file may raise anything
                    said = " ".join(f"{error}".split()) or type(error).__name__
                    yield Finding(name, "problem", f"cannot be understood: {said}", "install it again")


def _distributions() -> tuple[dict[str, dict[str, Distribution]], dict[str, str]]:
    """Read all distributions once.

    Returns:
        trainkit, torchvision and all that provide plugins or commands, by name and version; and of every distribution
        the version that is in use, by its canonical name.
    """
    ours: dict[str, dict[str, Distribution]] = {}
    in_use: dict[str, str] = {}
    for dist in distributions():
        try:
            metadata = dist.metadata
            name, version = metadata["Name"], metadata["Version"]
            in_use.setdefault(canonicalize_name(name), version or "unknown")
            groups = {entry.group for entry in dist.entry_points}
        except Exception:  # parsing a damaged file may raise anything; what could concern us was reported
            continue
        if groups & {PLUGINS, COMMANDS} or name in ("trainkit", "torchvision"):
            ours.setdefault(name, {}).setdefault(version, dist)
    return ours, in_use


def _source(dist: Distribution) -> Iterator[Finding]:
    """Look at the folder of an editable installation."""
    origin = parse_json(dist.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return
    folder = Path(url2pathname(origin.get("url", "").removeprefix("file://")))
    if not folder.is_dir():
        yield Finding(dist.name, "problem", f"its folder {folder} is gone", "pip uninstall it, or install it again")
        return
    pyproject = folder / "pyproject.toml"
    if not pyproject.is_file():
        return
    version = tomllib.loads(read_regular(pyproject, MAX_JSON).decode()).get("project", {}).get("version")
    if version not in (None, dist.version):  # None: the build backend takes it from elsewhere
        cure = f"pip install -e {shlex.quote(str(folder))}"
        yield Finding(dist.name, "problem", f"installed as {dist.version}, and its folder has {version}", cure)


def _requirements(dist: Distribution, in_use: Mapping[str, str]) -> Iterator[Finding]:
    """Look at the requirements of a distribution, without those of its extras."""
    for need in map(Requirement, dist.requires or []):
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        have = in_use.get(canonicalize_name(need.name)) or next(_versions(need.name), None)
        if have is None or not need.specifier.contains(have, prereleases=True):
            # On the public index, the name trainkit belongs to another project.
            cure = "install both from one checkout" if "trainkit" in need.name else f"pip install {str(need)!r}"
            yield Finding(dist.name, "problem", f"needs {need}, and {have or 'none'} is installed", cure)


def _versions(name: str) -> Iterator[str]:
    """Yield the versions of a distribution that are installed, the one in use first."""
    for dist in distributions(name=name):
        try:
            yield dist.version or "unknown"
        except Exception:  # parsing a damaged file may raise anything
            yield "unknown"


def _ask(*command: str) -> tuple[int, str]:
    """Return a program's exit code, 127 where it cannot be run, and the last line that it printed."""
    name, *arguments = command
    path = name if os.path.isabs(name) else program(name)
    if path is None:
        return 127, f"no program {name}"
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    output = done.stderr if done.returncode else done.stdout
    last_line = output.strip().rpartition("\n")[2]
    return done.returncode, last_line or f"exit code {done.returncode}"
