"""Release trainkit and all first-party plugins, which have one version.

python plugins/release.py version 0.2.0   write the version, and what plugins require of trainkit, into all packages
python plugins/release.py build           build and check the wheel of each package, in dist/

It needs flit_core and packaging, not trainkit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

from flit_core.wheel import make_wheel_in
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def main(root: Path, argv: list[str]) -> None:
    """Run one of the two commands on a checkout.

    Raises:
        SystemExit: the version is none, or the checkout is not what can be released.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("version", help="write a version into all packages").add_argument("version", metavar="VERSION")
    commands.add_parser("build", help="build the wheels of all packages")
    args = parser.parse_args(argv)
    if args.command == "version":
        if not re.fullmatch(r"\d+\.\d+\.\d+", args.version):
            sys.exit(f"error: {args.version!r} is not a version of three numbers, such as 0.2.0")
        set_version(root, args.version)
    else:
        build(root)


def packages(root: Path) -> dict[Path, dict[str, Any]]:
    """Return the table [project] of each package's pyproject.toml, the core's first."""
    paths = [root / "pyproject.toml", *sorted(root.glob("plugins/*/pyproject.toml"))]
    return {path: tomllib.loads(path.read_text(encoding="utf-8"))["project"] for path in paths}


def accepted(version: str) -> str:
    """Return what plugins require of trainkit: this minor version, since a hook may change with the next."""
    major, minor, _ = version.split(".")
    return f">={major}.{minor},<{major}.{int(minor) + 1}"


def set_version(root: Path, version: str) -> None:
    """Write a version into all packages."""
    for path in packages(root):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r'^version = ".*"$', f'version = "{version}"', text, flags=re.MULTILINE)
        text = re.sub(r'"trainkit>=[\d.]+,<[\d.]+"', f'"trainkit{accepted(version)}"', text)
        path.write_text(text, encoding="utf-8")
    path = root / "trainkit" / "__init__.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r'^__version__ = ".*"$', f'__version__ = "{version}"', text, flags=re.MULTILINE))
    print(f"{len(packages(root))} packages have version {version}; install them again: pip install -r requirements.txt")


def build(root: Path) -> None:
    """Build and check the wheel of each package, and write their checksums."""
    if problems := disagreements(root):
        sys.exit("error: " + "; ".join(problems))
    # The time of the commit, so that anyone can build the same bytes.
    os.environ["SOURCE_DATE_EPOCH"] = git(root, "log", "-1", "--format=%ct")
    dist = root / "dist"
    dist.mkdir(exist_ok=True)
    sums = []
    for path, project in packages(root).items():
        wheel = make_wheel_in(path, dist).file
        if problems := faults(wheel, project):
            sys.exit(f"error: {wheel.name}: " + "; ".join(problems))
        sums.append(f"{hashlib.sha256(wheel.read_bytes()).hexdigest()}  {wheel.name}\n")
    (dist / "SHA256SUMS").write_text("".join(sums))
    print(f"{len(sums)} wheels and SHA256SUMS are in dist/; all have passed")


def disagreements(root: Path) -> list[str]:
    """Return why a checkout cannot be released."""
    found = packages(root)
    version = next(iter(found.values()))["version"]
    problems = []
    if changed := git(root, "status", "--porcelain"):
        problems.append("these files are not committed: " + ", ".join(line[3:] for line in changed.splitlines()))
    if f'__version__ = "{version}"' not in (root / "trainkit" / "__init__.py").read_text(encoding="utf-8"):
        problems.append(f"trainkit/__init__.py does not say {version}, as pyproject.toml does")
    for path, project in found.items():
        if project["version"] != version:
            problems.append(f"{project['name']} has version {project['version']}, and trainkit {version}")
        if path.parent != root and f"trainkit{accepted(version)}" not in project["dependencies"]:
            problems.append(f"{project['name']} does not require trainkit{accepted(version)}")
    if f"\n## [{version}]" not in (root / "CHANGELOG.md").read_text(encoding="utf-8"):
        problems.append(f"CHANGELOG.md has no section [{version}]")
    if strangers := [p.name for p in (root / "dist").glob("*.whl") if f"-{version}-" not in p.name]:
        problems.append(f"dist/ has wheels of another version, such as {min(strangers)}")
    return problems


def faults(wheel: Path, project: dict[str, Any]) -> list[str]:
    """Return what is wrong with a wheel: its files and metadata against the table [project]."""
    module = project["name"].replace("-", "_")
    info = f"{module}-{project['version']}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    metadata = Parser().parsestr(files[f"{info}/METADATA"])
    problems = [
        f"{key} is {metadata[key]!r}"
        for key, expected in {
            "Name": project["name"],
            "Version": project["version"],
            "Summary": project["description"],
            "Requires-Python": project["requires-python"],
            "License-Expression": project["license"],
        }.items()
        if metadata[key] != expected
    ]
    required = {str(Requirement(text)) for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text}
    if required != {str(Requirement(text)) for text in project["dependencies"]}:
        problems.append(f"it requires {sorted(required)}")
    if not str(metadata.get_payload()).strip():
        problems.append("it has no README")
    if foreign := [name for name in files if not name.startswith((f"{module}.py", f"{module}/", f"{info}/"))]:
        problems.append(f"it has files that are not its own: {foreign}")
    for group, entries in project.get("entry-points", {}).items():
        for name, value in entries.items():
            if f"{name}={value}" not in files[f"{info}/entry_points.txt"].replace(" ", ""):
                problems.append(f"it has no entry point {name} in {group}")
    return problems


def git(root: Path, *arguments: str) -> str:
    """Return what a git command prints."""
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.rstrip()


if __name__ == "__main__":
    main(ROOT, sys.argv[1:])
