import os
import subprocess
import sys
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest

from trainkit import hookspecs
from trainkit.cli import main

HOOKS = [name for phase in hookspecs.PHASES for name in vars(phase) if name[0] != "_"]
OF_EACH_KIND = ["data", "transform_model", "scheduler", "step_end"]  # one, chain, list, notify
ROOT = Path(__file__).parents[3]


def new(*arguments):
    return main(["plugins", "new", *map(str, arguments)])


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A folder with a plugin for each hook, and one for all of them."""
    folder = tmp_path_factory.mktemp("checkout") / "plugins"
    for hook in HOOKS:
        assert new(f"new_{hook}", "--hook", hook, "--folder", folder) == 0
    assert new("new_all", "--hook", *HOOKS, "--folder", folder) == 0
    (folder.parent / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    return folder


def run(module, *arguments, cwd, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_is_a_plugin_for_every_hook(everything):
    assert sorted(p.name for p in everything.iterdir()) == sorted(["new_all", *(f"new_{hook}" for hook in HOOKS)])


def test_each_has_four_files(everything):
    for home in everything.iterdir():
        files = sorted(str(p.relative_to(home)) for p in home.rglob("*") if p.is_file())
        assert files == ["README.md", "pyproject.toml", f"tests/test_{home.name}.py", f"trainkit_{home.name}.py"]


@pytest.mark.slow
def test_each_passes_its_own_tests_unchanged(everything):
    # one interpreter for all, and one that counts their imports
    names = ["new_all", *(f"new_{hook}" for hook in OF_EACH_KIND)]  # half a second each
    modules = [f"trainkit_{name}" for name in names]
    (everything.parent / "conftest.py").write_text(
        "from trainkit.testing import assert_light_imports\n\n\n"
        f"def pytest_sessionstart():\n    assert_light_imports(*{modules})\n"
    )
    folders = [f"plugins/{name}" for name in names]
    printed = run("pytest", *folders, "-p", "no:cacheprovider", cwd=everything.parent, path=everything.iterdir())
    assert f"{3 * len(modules)} passed" in printed


def test_each_is_clean_to_ruff(everything):
    run("ruff", "check", "--no-cache", "plugins", cwd=everything.parent)
    run("ruff", "format", "--no-cache", "--check", "plugins", cwd=everything.parent)


def test_each_is_clean_to_strict_mypy(everything):
    modules = everything.glob("*/trainkit_*.py")
    run("mypy", "--cache-dir", ROOT / ".mypy_cache", *modules, cwd=everything.parent)


def test_what_their_classes_say_is_written_already(everything, monkeypatch):
    monkeypatch.chdir(everything.parent)
    assert main(["plugins", "docs", "--check"]) == 0


def test_methods_have_the_arguments_and_types_of_their_hooks(everything):
    text = (everything / "new_all" / "trainkit_new_all.py").read_text()
    assert "def forward_end(self, run: Run, batch: Batch, output: Tensor, loss: Tensor) -> None:" in text
    assert "def scheduler(self, run: Run, optimizer: Optimizer) -> Schedule | None:" in text
    assert text.index("def data") < text.index("def fit_start") < text.index("def metrics")  # the order of a run
    assert "from trainkit import Batch, Data, " in text


def test_one_that_is_installed_is_listed(everything, tmp_path):
    (home,) = everything.glob("new_fit_start")
    run("pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", "site", home, cwd=tmp_path)
    assert '"trainkit-new-fit-start"' in run("trainkit", "plugins", "list", "--json", cwd=tmp_path, path=["site"])


def test_what_comes_next_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert new("zebra_crossing") == 0
    printed = capsys.readouterr().out
    assert "pip install -e ./plugins/zebra_crossing" in printed
    assert "zebra_crossing: {message: hello}" in printed
    module = tmp_path / "plugins" / "zebra_crossing" / "trainkit_zebra_crossing.py"
    assert "class ZebraCrossing:" in module.read_text()
    assert "def fit_start" in module.read_text()


def test_hooks_may_be_given_one_by_one(tmp_path):
    assert new("zebra", "--hook", "log", "--hook", "fit_end", "--folder", tmp_path) == 0
    text = (tmp_path / "zebra" / "trainkit_zebra.py").read_text()
    assert "def log" in text
    assert "def fit_end" in text


@pytest.mark.parametrize("name", ["run", "data", "none", "tensor", "callable", "schedule", "adam_2"])
def test_a_class_never_hides_what_its_module_imports(tmp_path, name):
    assert new(name, "--hook", *HOOKS, "--folder", tmp_path) == 0
    run("ruff", "check", "--isolated", "--no-cache", "--select", "F", tmp_path, cwd=tmp_path)


@pytest.mark.parametrize(
    "name",
    ["", "Zebra", "2fa", "a-b", "a__b", "_a", "a_", "../up", "a/b", "/abs", "class", "a b", "é", "a\n", "x" * 41, "."],
)
def test_a_bad_name_is_refused(tmp_path, capsys, name):
    assert new(name, "--folder", tmp_path / "made") == 2
    assert "cannot be a plugin's name" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_an_unknown_hook_gets_the_nearest_one(tmp_path, capsys):
    assert new("zebra", "--hook", "transform_modl", "--folder", tmp_path) == 2
    assert "did you mean 'transform_model'?" in capsys.readouterr().err
    assert new("zebra", "--hook", "fit_start", "qqq", "--folder", tmp_path) == 2
    assert "there are processes, data, transform_data, " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_name_of_an_installed_plugin_is_refused(tmp_path, capsys, monkeypatch):
    info = tmp_path / "acme_zebra-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-zebra\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trainkit.plugins]\nzebra = zebra:Zebra\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert new("zebra", "--folder", tmp_path / "made") == 2
    assert "acme-zebra has a plugin of this name" in capsys.readouterr().err


@pytest.mark.parametrize("there", ["folder", "file"])
def test_what_is_there_is_never_overwritten(tmp_path, capsys, there):
    home = tmp_path / "zebra"
    if there == "folder":
        home.mkdir()
        (home / "precious").write_text("mine")
    else:
        home.write_text("mine")
    assert new("zebra", "--folder", tmp_path) == 2
    assert "File exists; choose another name" in capsys.readouterr().err
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["mine"]


def test_the_readme_that_is_installed_is_this_one():
    """The files are written from it; after a change here, install the package again."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert metadata("trainkit-scaffold")["Description"].strip() == readme.strip()


MODULE = """
from pathlib import Path
from typing import Literal
from attrs import field
from trainkit.plugin import hookimpl, plugin

@plugin
class Zebra:
    \"\"\"Paint stripes on "each" image.

    Args:
        mode: ``across`` or ``along``, as in
            :class:`Zebra`.
        widths: pixels; at least 1. A | B.
        where: a folder.
    \"\"\"

    mode: Literal["across", "along"] = "across"
    widths: list[int | float] | None = None
    where: Path = field(default=Path("data"))
    _state: int = field(init=False, default=0)

    @hookimpl
    def transform_batch(self, run, batch):
        return batch
"""
PROJECT = """\
[project]
name = "acme-zebra"
version = "1.0"

[project.entry-points."trainkit.plugins"]
{name} = "{name}:Zebra"

[tool.other]
description = "kept"
"""
TABLE = """\
<!-- options: generated by trainkit plugins docs -->
| key | type | default | meaning |
|---|---|---|---|
| `mode` | `across or along` | `across` | `across` or `along`, as in `Zebra` |
| `widths` | `[number, ...] or null` | `null` | pixels; at least 1. A \\| B. |
| `where` | `path` | `data` | a folder |
<!-- end -->
"""


@pytest.fixture
def zebra(tmp_path, monkeypatch):
    """The folder of a stranger's plugin that is not installed; its module's name is of this test alone."""
    name = f"zebra_{abs(hash(tmp_path))}"
    home = tmp_path / "plugins" / "zebra"
    home.mkdir(parents=True)
    (home / f"{name}.py").write_text(MODULE)
    (home / "pyproject.toml").write_text(PROJECT.format(name=name))
    (home / "README.md").write_text("# Zebra\n\nBy hand.\n")
    monkeypatch.chdir(tmp_path)
    return home


def docs(*arguments):
    return main(["plugins", "docs", *map(str, arguments)])


def test_a_plugin_s_documents_say_what_its_class_says(zebra, capsys):
    before = [path.read_text() for path in sorted(zebra.iterdir())]
    assert docs("--check") == 2
    assert "plugins/zebra/README.md; `trainkit plugins docs` writes it" in capsys.readouterr().err
    assert before == [path.read_text() for path in sorted(zebra.iterdir()) if path.is_file()]
    assert docs() == 0
    assert docs("--check") == 0
    assert (zebra / "README.md").read_text() == f"# Zebra\n\nBy hand.\n\n{TABLE}"
    text = (zebra / "pyproject.toml").read_text()
    project = tomllib.loads(text)
    assert project["project"]["description"] == 'Paint stripes on "each" image.'
    assert project["tool"]["other"]["description"] == "kept"


def test_text_outside_the_marks_is_the_author_s(zebra):
    mark, *_ = TABLE.splitlines()
    (zebra / "README.md").write_text(f"above\n\n{mark}\nold\n<!-- end -->\n\nbelow <!-- end -->\n")
    assert docs(zebra) == 0
    assert (zebra / "README.md").read_text() == f"above\n\n{TABLE}\nbelow <!-- end -->\n"


def test_a_folder_of_plugins_has_a_list_where_its_readme_wants_one(zebra):
    listing = zebra.parent / "README.md"
    listing.write_text("mine\n")
    assert docs() == 0
    assert listing.read_text() == "mine\n"
    listing.write_text("mine\n<!-- plugins: generated by trainkit plugins docs -->\n<!-- end -->\n")
    assert docs() == 0
    (module,) = zebra.glob("*.py")
    row = f'- [{module.stem}](zebra/README.md): Paint stripes on "each" image.'
    assert f"-->\n\n## Transforms\n\n{row}\n\n<!-- end -->\n" in listing.read_text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("        where: a folder.\n", "", "the docstring of Zebra says nothing of 'where'"),
        ("@plugin\n", "", "is not a class decorated with @plugin"),
        ("from pathlib", "from pathlibb", "ModuleNotFoundError: No module named 'pathlibb'"),
    ],
)
def test_a_class_that_does_not_say_it_is_an_error(zebra, capsys, old, new, said):
    (module,) = zebra.glob("*.py")
    module.write_text(MODULE.replace(old, new))
    assert docs() == 2
    assert said in capsys.readouterr().err


def test_a_mark_without_its_end_and_a_folder_without_plugins_are_errors(zebra, capsys):
    (zebra / "README.md").write_text(TABLE.replace("<!-- end -->", ""))
    assert docs() == 2
    assert "has no <!-- end --> after it" in capsys.readouterr().err
    assert docs(zebra / "nowhere") == 2
    assert "names a plugin or a command" in capsys.readouterr().err
