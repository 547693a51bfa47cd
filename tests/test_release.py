"""One command gives all packages a version, another builds their wheels; neither releases what does not agree."""

import importlib.util
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

from .environments import PLUGINS, ROOT

spec = importlib.util.spec_from_file_location("release", ROOT / "plugins" / "release.py")
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)


def git(root, *arguments):
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    """What a release reads: of the core its metadata, and three plugins."""
    for path in ("pyproject.toml", "README.md", "LICENSE", "trainkit/__init__.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    for name in ("se", "sgd", "scaffold"):
        home = tmp_path / "plugins" / name
        home.mkdir(parents=True)
        for path in ("pyproject.toml", "README.md", f"trainkit_{name}.py"):
            (home / path).write_bytes((PLUGINS[name] / path).read_bytes())
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [0.2.0]\n")
    (tmp_path / ".gitignore").write_text("dist/\n")
    git(tmp_path, "init", "--quiet")
    release.main(tmp_path, ["version", "0.2.0"])
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "0.2.0")
    return tmp_path


def test_the_version_is_written_everywhere(checkout):
    found = release.packages(checkout)
    assert {project["version"] for project in found.values()} == {"0.2.0"}
    assert all("trainkit>=0.2,<0.3" in project["dependencies"] for project in list(found.values())[1:])
    assert '__version__ = "0.2.0"' in (checkout / "trainkit" / "__init__.py").read_text()
    assert tomllib.loads((checkout / "pyproject.toml").read_text())["tool"]["mypy"]["python_version"] == "3.11"


def test_a_wheel_of_each_package_is_built_twice_the_same(checkout, capsys):
    release.main(checkout, ["build"])
    assert "4 wheels and SHA256SUMS are in dist/" in capsys.readouterr().out
    names = sorted(path.name for path in (checkout / "dist").glob("*.whl"))
    assert names == [
        f"{name}-0.2.0-py3-none-any.whl" for name in ("trainkit", "trainkit_scaffold", "trainkit_se", "trainkit_sgd")
    ]
    sums = (checkout / "dist" / "SHA256SUMS").read_text()
    release.main(checkout, ["build"])
    assert (checkout / "dist" / "SHA256SUMS").read_text() == sums


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("path", "old", "new", "said"),
    [
        ("plugins/se/pyproject.toml", '"0.2.0"', '"0.1.9"', "trainkit-se has version 0.1.9, and trainkit 0.2.0"),
        ("plugins/se/pyproject.toml", "<0.3", "<0.4", "trainkit-se does not require trainkit>=0.2,<0.3"),
        ("trainkit/__init__.py", "0.2.0", "0.1.0", "trainkit/__init__.py does not say 0.2.0"),
        ("CHANGELOG.md", "0.2.0", "0.1.0", r"CHANGELOG.md has no section \[0.2.0\]"),
    ],
)
def test_what_does_not_agree_is_not_built(checkout, path, old, new, said):
    replace(checkout / path, old, new)
    with pytest.raises(SystemExit, match=f"not committed: {path}"):
        release.main(checkout, ["build"])
    git(checkout, "commit", "--quiet", "--all", "--message", "changed")
    with pytest.raises(SystemExit, match=f"^error: {said}$|^error: {said}, as "):
        release.main(checkout, ["build"])
    assert not (checkout / "dist").exists()


def test_wheels_of_another_version_are_not_released_with_them(checkout):
    (checkout / "dist").mkdir()
    (checkout / "dist" / "trainkit-0.1.0-py3-none-any.whl").touch()
    with pytest.raises(SystemExit, match=r"another version, such as trainkit-0\.1\.0"):
        release.main(checkout, ["build"])


def test_what_is_wrong_with_a_wheel_is_said(checkout):
    release.main(checkout, ["build"])
    (path,) = (checkout / "dist").glob("trainkit_se-*")
    project = dict(release.packages(checkout)[checkout / "plugins" / "se" / "pyproject.toml"])
    assert release.faults(path, project) == []
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("se_tests.py", "")
    project |= {"description": "Else.", "dependencies": [], "entry-points": {"trainkit.plugins": {"es": "se:ES"}}}
    said = " ".join(release.faults(path, project))
    for part in (
        "Summary is 'Recalibrate",
        "it requires ['attrs', 'torch'",
        "files that are not its own: ['se_tests.py']",
    ):
        assert part in said
    assert "it has no entry point es in trainkit.plugins" in said


@pytest.mark.parametrize("version", ["", "1", "0.2", "v0.2.0", "0.2.0rc1", "0.2.0\n"])
def test_a_version_has_three_numbers(version):
    with pytest.raises(SystemExit, match="not a version of three numbers"):
        release.main(Path("nowhere"), ["version", version])
