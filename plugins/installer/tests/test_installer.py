import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import trainkit_installer
from trainkit.cli import main
from trainkit.errors import RecipeError
from trainkit.recipe import from_dict

PYTHON = """\
#!{python}
import pathlib, sys
pathlib.Path("said").write_text("\\n".join(sys.argv[1:]))
for name in {provides!r}:
    info = pathlib.Path("site") / f"acme_{{name}}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: acme-{{name}}\\nVersion: 1.0\\n")
    (info / "entry_points.txt").write_text(f"[trainkit.plugins]\\n{{name}} = {{name}}:X\\n")
sys.exit({code})
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with the folder of `zebra`; the interpreter is a stand-in that writes down what it is told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugins" / "zebra").mkdir(parents=True)
    (tmp_path / "plugins" / "zebra" / "pyproject.toml").touch()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "trainkit"\n')
    (tmp_path / "site").mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))  # no settings of uv
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    python, real = tmp_path / "bin" / "python", sys.executable
    python.parent.mkdir()

    def interpreter(provides=(), code=0):
        python.write_text(PYTHON.format(python=real, provides=list(provides), code=code))
        python.chmod(0o755)

    interpreter()
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    return interpreter


def write(plugins, requires="[]"):
    Path("r.yaml").write_text(f"name: r\nepochs: 1\nbatch_size: 1\nrequires: {requires}\nplugins: {plugins}\n")


def install(*arguments):
    return main(["plugins", "install", "r.yaml", *arguments])


def told():
    """Return what the interpreter was told, or None if it was not started."""
    said = Path("said")
    return said.read_text().splitlines() if said.exists() else None


def test_the_checkout_and_requirements_are_installed_by_one_command_that_is_shown(checkout, tmp_path, capsys):
    checkout(provides=["zebra", "lion"])
    write("{zebra: , lion: }", '["acme-trainkit-lion[fast]>=1.2,<2"]')
    assert install("--yes") == 0
    expected = ["-P", "-m", "pip", "install", "-e", "./plugins/zebra", "acme-trainkit-lion[fast]<2,>=1.2"]
    assert told() == expected
    shown = f"{tmp_path}/bin/python -P -m pip install -e ./plugins/zebra 'acme-trainkit-lion[fast]<2,>=1.2'\n"
    assert capsys.readouterr().out == shown


def test_what_is_installed_already_is_left_alone(checkout, capsys):
    checkout(provides=["zebra"])
    write("{zebra: }")
    assert install("--yes") == 0
    checkout(provides=["lion"])
    write("{zebra: , lion: }", '["acme-trainkit-lion"]')
    assert install("--yes") == 0
    assert told() == ["-P", "-m", "pip", "install", "acme-trainkit-lion"]


def test_nothing_missing_says_so(checkout, capsys):
    checkout(provides=["zebra"])
    write("{zebra: }")
    install("--yes")
    Path("said").unlink()
    assert install() == 0
    assert "r.yaml: nothing to install" in capsys.readouterr().out
    assert told() is None


def test_a_dropped_plugin_is_not_installed(checkout, capsys):
    write("{zebra: }")
    assert install("plugins.zebra=false") == 0
    assert told() is None


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("YES\n", 0), ("n\n", 1), ("\n", 1), ("", 1), ("yn\n", 1)])
def test_it_asks_first(checkout, monkeypatch, capsys, answer, code):
    checkout(provides=["zebra"])
    write("{zebra: }")

    class Terminal:
        @staticmethod
        def isatty():
            return True

        @staticmethod
        def readline():
            assert "pip install" in capsys.readouterr().out  # shown before the answer is read
            return answer

    monkeypatch.setattr(sys, "stdin", Terminal)
    assert install() == code
    assert (told() is not None) == (code == 0)


def test_without_a_terminal_it_needs_yes(checkout, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    write("{zebra: }")
    assert install() == 2
    assert "pass --yes" in capsys.readouterr().err
    assert told() is None


def test_no_name_is_guessed(checkout, capsys):
    write("{zebra: , unicorn: }")
    assert install("--yes") == 2
    assert "'unicorn' is not to be found in this checkout's plugins/" in capsys.readouterr().err
    assert told() is None


def test_a_failed_command_is_a_failure(checkout, capsys):
    checkout(code=3)
    write("{zebra: }")
    assert install("--yes") == 1
    assert "exit code 3" in capsys.readouterr().err


def test_a_package_without_the_plugin_is_named(checkout, capsys):
    write("{zebra: }")
    assert install("--yes") == 2
    assert "no package provides the plugin 'zebra'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "requirement"),
    [
        ("lion", "acme-trainkit-lion @ https://evil.example/lion.whl"),
        ("lion", "acme-trainkit-lion @ file:///tmp/lion"),
        ("lion", "-trainkit-lion"),
        ("lion", "trainkit-lion --index-url=https://evil.example"),
        ("lion", "trainkit-lion\n--index-url=https://evil.example"),
        ("lion", "trainkit-lion; import os"),
        ("lion", "./trainkit-lion"),
        ("lion", "../trainkit-lion/"),
        ("lion", "-e trainkit-lion"),
        ("lion", "git+https://evil.example/trainkit-lion"),
        ("lion.zip", "trainkit-lion.zip"),
        ("--pre", "trainkit---pre"),
    ],
)
def test_what_is_no_project_with_versions_never_reaches_the_installer(checkout, capsys, name, requirement):
    write(f'{{"{name}": }}', '["' + requirement.replace("\n", "\\n") + '"]')
    assert install("--yes") == 2
    assert told() is None
    assert "Traceback" not in capsys.readouterr().err


words = st.sampled_from(
    ["-", "--", "-e", "trainkit-lion", " ", "@", "https://x", "[a]", ">=1", ";", "\t", "/", ".", "="]
)


@given(st.one_of(st.text(max_size=30), st.lists(words, max_size=6).map("".join)))
@example("trainkit-lion>=1")
def test_whatever_a_recipe_says_an_argument_is_a_project(text):
    recipe = from_dict({"name": "r", "epochs": 1, "batch_size": 1})
    try:
        argument = trainkit_installer._requirement(recipe, text)
    except RecipeError:
        return
    assert argument[0].isalnum()
    assert not set(argument.partition(";")[0]) & set("/\\:@\n\t")


def uv(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trainkit_installer.program", lambda name: str(tmp_path / "bin" / "python") if name == "uv" else None
    )


def test_uv_is_used_where_it_made_the_environment(checkout, tmp_path, monkeypatch):
    uv(tmp_path, monkeypatch)
    checkout(provides=["zebra"])
    write("{zebra: }")
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.9.1\n")
    assert install("--yes") == 0
    assert told() == ["pip", "install", "--no-config", "--python", sys.executable, "-e", "./plugins/zebra"]


def test_uv_is_used_where_pip_is_missing(checkout, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trainkit_installer.distributions", lambda name: iter(()))
    write("{zebra: }")
    monkeypatch.setattr("trainkit_installer.program", lambda name: None)
    assert install("--yes") == 2
    assert "neither pip nor uv" in capsys.readouterr().err
    uv(tmp_path, monkeypatch)
    checkout(provides=["zebra"])
    assert install("--yes") == 0
    assert told()[0] == "pip"


def test_pip_is_used_where_both_are_there(checkout, tmp_path, monkeypatch):
    uv(tmp_path, monkeypatch)
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.7\n")
    checkout(provides=["zebra"])
    write("{zebra: }")
    assert install("--yes") == 0
    assert told()[:3] == ["-P", "-m", "pip"]


def test_a_label_asks_for_the_plugin_itself(checkout):
    checkout(provides=["zebra"])
    write("{zebra@one: , zebra@two: }")
    assert install("--yes") == 0
    assert told() == ["-P", "-m", "pip", "install", "-e", "./plugins/zebra"]


def test_the_installer_takes_no_module_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pip.py").write_text("open('imported', 'w')\n")
    monkeypatch.setattr("trainkit_installer.program", lambda name: None)
    subprocess.run([*trainkit_installer._installer()[:-1], "--version"], capture_output=True, check=False)
    assert not (tmp_path / "imported").exists()


def test_uv_takes_the_users_settings_and_none_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert trainkit_installer._uv_settings() == ["--no-config"]
    (tmp_path / "uv").mkdir()
    (tmp_path / "uv" / "uv.toml").touch()
    assert trainkit_installer._uv_settings() == ["--config-file", str(tmp_path / "uv" / "uv.toml")]
