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
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.request import url2pathname

from packaging.requirements import Requirement

from trainkit.cli.output import print_json, table, terminal
from trainkit.registry import COMMANDS, PLUGINS, installed

__all__ = ["EXAMPLES", "HELP", "Finding", "add_arguments", "run"]

HELP = "Look for what is wrong with this installation, and say what to do about it."
EXAMPLES = "examples:\n  trainkit doctor\n  trainkit doctor --json\n"
# run in a process of its own: a broken torch may abort, not merely raise
PROBE = """import json, torch, torchvision; gpus = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
cuda = torch.version.cuda or torch.version.hip
print(json.dumps([torch.__version__, torchvision.__version__, cuda, list(gpus), torch.get_num_threads()]))"""


class Finding(NamedTuple):
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
        print_json([finding._asdict() for finding in findings])
    else:
        terminal().print(table(["", "verdict", "finding", "what to do"], findings))
    return 1 if any(finding.verdict == "problem" for finding in findings) else 0


def _judge(what: str, fine: bool, detail: str, advice: str) -> Finding:
    return Finding(what, "ok", detail) if fine else Finding(what, "advice", detail, advice)


def _machine() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    names = ("trainkit", "numpy", "pillow", "pluggy", "attrs", "omegaconf", "PyYAML", "rich")
    versions = (f"{dist.name} {dist.version}" for name in names for dist in distributions(name=name))
    yield Finding("packages", "ok", ", ".join(dict.fromkeys(versions)))
    # what torch.compile calls for the processor; what it compiles includes Python.h
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
    code, said = _ask(sys.executable, "-P", "-c", PROBE)
    if code != 0:
        yield Finding("torch", "problem", f"import fails: {said}", "install torch and torchvision that match")
        return
    version, vision, cuda, gpus, threads = json.loads(said)
    yield Finding("torch", "ok", f"{version}, CUDA {cuda or 'not built in'}; torchvision {vision}")
    code, gpu = _ask("nvidia-smi", "-L")  # the driver knows a GPU whatever torch was built for
    unused = f"{gpu}, which this torch cannot use" if code == 0 else "no GPU: runs use the processor"
    cure = "update its driver; see CUDA_VISIBLE_DEVICES" if cuda else "install a torch that is built for CUDA"
    yield _judge("devices", bool(gpus) or code != 0, ", ".join(gpus) or unused, cure)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield _judge("threads", threads <= cpus, f"{threads} on {cpus} processors", f"set OMP_NUM_THREADS={cpus}")


def _metadata() -> Iterator[Finding]:
    found: dict[str, dict[str, Distribution]] = {}  # by name and version
    for dist in distributions():
        groups = {PLUGINS, COMMANDS}.intersection(entry.group for entry in dist.entry_points)
        if groups or dist.metadata["Name"] in ("trainkit", "torchvision"):
            found.setdefault(dist.name, {}).setdefault(dist.version, dist)
    for kind, have in (("plugin", installed(PLUGINS)), ("command", installed(COMMANDS))):
        yield Finding(f"{kind}s", "ok", f"{len(have)} installed")
        for name, entries in have.items():
            if len(entries) > 1:
                claims = " and ".join(entry.distribution for entry in entries)
                yield Finding(f"{kind} {name}", "problem", f"{claims} claim it", "pip uninstall one of them")
    for name, versions in found.items():
        if len(versions) > 1:
            yield Finding(name, "problem", f"{' and '.join(versions)} at once", "uninstall it until none is left")
        for dist in versions.values():
            try:
                yield from (*_source(dist), *_requirements(dist))
            except ValueError as error:  # JSON, TOML or a requirement that cannot be parsed
                yield Finding(dist.name, "problem", f"cannot be understood: {error}", "install it again")


def _source(dist: Distribution) -> Iterator[Finding]:
    origin = json.loads(dist.read_text("direct_url.json") or "{}")
    editable = origin.get("dir_info", {}).get("editable")
    folder = Path(url2pathname(origin.get("url", "").removeprefix("file://")))
    if editable and not folder.is_dir():
        yield Finding(dist.name, "problem", f"its folder {folder} is gone", "pip uninstall it, or install it again")
    elif editable and (folder / "pyproject.toml").is_file():
        version = tomllib.loads((folder / "pyproject.toml").read_text()).get("project", {}).get("version")
        if version not in (None, dist.version):  # None: the build backend finds it elsewhere
            cure = f"pip install -e {shlex.quote(str(folder))}"
            yield Finding(dist.name, "problem", f"installed as {dist.version}, and its folder has {version}", cure)


def _requirements(dist: Distribution) -> Iterator[Finding]:
    for need in map(Requirement, dist.requires or []):
        have = next((found.version for found in distributions(name=need.name)), None)
        wanted = need.marker is None or need.marker.evaluate({"extra": ""})
        if wanted and (have is None or not need.specifier.contains(have, prereleases=True)):
            # on a public index, the name trainkit belongs to another project
            cure = "install both from one checkout" if "trainkit" in need.name else f"pip install {str(need)!r}"
            yield Finding(dist.name, "problem", f"needs {need}, and {have or 'none'} is installed", cure)


def _ask(*command: str) -> tuple[int, str]:
    """Return a program's exit code, 127 where it cannot be run, and the last line that it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    said = (done.stderr if done.returncode else done.stdout).strip().rpartition("\n")[2]
    return done.returncode, said or f"exit code {done.returncode}"
