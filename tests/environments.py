"""Environments for tests that install packages for real: without this checkout, without an index, within seconds.

Whatever else is installed here, such as torch, is linked into them; trainkit and plugins come as wheels.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from functools import cache
from pathlib import Path

from flit_core.wheel import make_wheel_in
from uv import find_uv_bin

ROOT = Path(__file__).parents[1]
PLUGINS = {path.parent.name: path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))}
THIRD_PARTY = {path.parent.name: path.parent for path in sorted(ROOT.glob("tests/third_party/*/pyproject.toml"))}

_temporary = tempfile.TemporaryDirectory(prefix="trainkit-tests-")  # removed when the interpreter ends


def distribution(plugin):
    """Return the name of a first-party plugin's distribution."""
    return f"trainkit-{plugin.replace('_', '-')}"


@cache
def wheel(project):
    """Build the wheel of a project's folder with its own build backend and return its path."""
    return make_wheel_in(project / "pyproject.toml", Path(_temporary.name)).file


@cache
def environment(*projects):
    """Return the environment with these projects installed, for tests that leave it as it is."""
    made = Environment()
    made.install(*projects)
    return made


class Environment:
    """A virtual environment; its commands see neither this checkout nor the settings of this process."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(dir=_temporary.name))
        venv.create(self.folder, with_pip=False)
        self.python = self.folder / "bin" / "python"
        (self.site,) = self.folder.glob("lib/python*/site-packages")
        ours = ("trainkit", "__editable__", "__pycache__")
        for path in map(Path, sys.path):
            if path.name in ("site-packages", "dist-packages"):
                for entry in path.iterdir():
                    if not entry.name.startswith(ours) and not (self.site / entry.name).exists():
                        (self.site / entry.name).symlink_to(entry)

    def __call__(self, *command, cwd=None, **variables):
        """Run a command, in an empty folder by default, and return how it ended and what it printed."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))}
        with tempfile.TemporaryDirectory() as empty:
            return subprocess.run(
                [str(part) for part in command],
                cwd=cwd or empty,
                env={**inherited, **variables},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )

    def pip(self, *arguments, cwd=None):
        """Run pip, offline; it must succeed."""
        options = {"NO_INDEX": "1", "NO_DEPS": "1", "NO_COMPILE": "1", "DISABLE_PIP_VERSION_CHECK": "1", "QUIET": "1"}
        variables = {f"PIP_{name}": value for name, value in options.items()}
        done = self(sys.executable, "-m", "pip", "--python", self.python, *arguments, cwd=cwd, **variables)
        assert done.returncode == 0, done.stderr

    def uv(self, *arguments):
        """Run `uv pip`, offline, which does for a hundred packages in a second what takes pip half a minute."""
        done = self(find_uv_bin(), "pip", *arguments, "--python", self.python, "--offline", "--quiet")
        assert done.returncode == 0, done.stderr

    def install(self, *projects):
        """Build the wheels of projects and install them."""
        self.uv("install", "--no-index", "--no-deps", *map(wheel, projects))

    def trainkit(self, *arguments, cwd=None):
        """Run the installed command line."""
        return self(self.folder / "bin" / "trainkit", *arguments, cwd=cwd)

    def evaluate(self, code, *arguments, cwd=None):
        """Run code, which must succeed, and return the JSON document that it prints last."""
        done = self(self.python, "-c", code, *arguments, cwd=cwd, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def listing(self):
        """Return the paths of all files but compiled ones and uv's lock."""
        files = (path.relative_to(self.folder) for path in self.folder.rglob("*") if not path.is_dir())
        return {path.as_posix() for path in files if "__pycache__" not in path.parts} - {".lock"}
