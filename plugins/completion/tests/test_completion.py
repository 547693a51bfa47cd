import shutil
import subprocess

import pytest

from trainkit.cli import main
from trainkit_completion import script


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """Complete a line as bash does, in a folder with a recipe and a run directory."""
    program = shutil.which("bash")
    if program is None:
        pytest.skip("no bash here")
    folder = tmp_path_factory.mktemp("shell")
    assert main(["completion", "bash", "-o", str(folder / "completion.sh")]) == 0
    (folder / "mine.yaml").touch()
    (folder / "notes.txt").touch()
    (folder / "runs").mkdir()

    def complete(*words):
        listed = " ".join(f"'{word}'" for word in ("trainkit", *words))
        ask = f"source completion.sh; COMP_WORDS=({listed}); COMP_CWORD={len(words)}; "
        ask += '_shtab_trainkit; printf "%s\\n" "${COMPREPLY[@]}"'
        ended = subprocess.run([program, "-c", ask], cwd=folder, capture_output=True, text=True, timeout=60, check=True)
        return set(ended.stdout.split())

    return complete


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ru"], {"run", "runs"}),
        (["runs", "c"], {"compare", "check"}),
        (["plugins", "show", "image_"], {"image_folder"}),
        (["run", "mi"], {"mine.yaml"}),
        (["run", "mine.yaml", "plugins.image_folder.ro"], {"plugins.image_folder.root="}),
        (["run", "mine.yaml", "epo"], {"epochs="}),
        (["run", "--dry"], {"--dry-run"}),
        (["resume", "ru"], {"runs"}),
    ],
)
def test_bash_offers_what_can_follow(bash, words, offered):
    assert offered <= bash(*words)
    assert all(each.startswith(words[-1]) for each in bash(*words))


def test_a_file_that_is_no_recipe_is_not_offered(bash):
    assert bash("run", "") >= {"mine.yaml", "runs"}
    assert "notes.txt" not in bash("run", "")


def test_the_script_of_zsh_names_the_program_and_every_command():
    made = script("zsh")
    assert made.startswith("#compdef trainkit")
    for command in ("run", "resume", "evaluate", "plugins", "recipes", "runs", "predict", "completion"):
        assert f"\n    {command}:'" in made
    zsh = shutil.which("zsh")
    if zsh is not None:
        subprocess.run([zsh, "-n"], input=made, text=True, check=True, timeout=60)
