import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

import pytest

import trainkit_doctor
from trainkit.cli import main


def probed(cuda=None, gpus=(), threads=1):
    """What the probe prints of a torch."""
    return json.dumps({"torch": "2.9.0", "torchvision": "0.24.0", "cuda": cuda, "gpus": list(gpus), "threads": threads})


def distribution(folder, name, version="1.0", entries="", requires=(), origin=None):
    """Write the metadata of an installed distribution, as pip would."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "entry_points.txt").write_text(f"[trainkit.plugins]\n{entries or name + ' = x:X'}\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps({"url": origin.as_uri(), "dir_info": {"editable": True}}))


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


@pytest.fixture
def programs(monkeypatch):
    """What other programs print, by the name of the program, in place of running them."""
    said = {Path(sys.executable).name: (0, probed()), "nvidia-smi": (127, "no such file")}
    monkeypatch.setattr(trainkit_doctor, "_ask", lambda program, *_: said[Path(program).name])
    return said


@pytest.fixture
def doctor(programs, capsys):
    """Run the command; return its exit code and its findings by name."""

    def doctor():
        capsys.readouterr()
        code = main(["doctor", "--json"])
        findings = json.loads(capsys.readouterr().out)
        assert code == (1 if any(f["verdict"] == "problem" for f in findings) else 0)
        return code, {f["what"]: (f["verdict"], f["detail"], f["cure"]) for f in findings}

    return doctor


@pytest.mark.slow
def test_what_is_really_here_is_reported(capsys):
    code = main(["doctor", "--json"])
    findings = {f["what"]: f for f in json.loads(capsys.readouterr().out)}
    assert code == (1 if any(f["verdict"] == "problem" for f in findings.values()) else 0)
    assert findings["torch"]["verdict"] == "ok"
    assert version("torch").partition("+")[0] in findings["torch"]["detail"]
    assert f"trainkit {version('trainkit')}" in findings["packages"]["detail"]
    assert not any(f["cure"] for f in findings.values() if f["verdict"] == "ok")
    assert all(f["cure"] for f in findings.values() if f["verdict"] != "ok")


def test_the_table_says_what_to_do(programs, site, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    distribution(site, "acme-zebra", origin=site / "gone")
    assert main(["doctor"]) == 1
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "acme-zebra" in line)
    assert "problem" in row
    assert "pip uninstall it" in row


def test_a_name_that_two_distributions_claim(site, doctor):
    distribution(site, "acme-one", entries="zebra = one:Z\n[trainkit.commands]\nruns.zebra = one:C")
    distribution(site, "acme-two", entries="zebra = two:Z\n[trainkit.commands]\nruns.zebra = two:C")
    code, findings = doctor()
    assert code == 1
    for what in ("plugin zebra", "command runs.zebra"):
        verdict, detail, cure = findings[what]
        assert verdict == "problem"
        assert {"acme-one", "acme-two"} <= set(detail.split())
        assert cure == "pip uninstall one of them"


def test_an_editable_installation_whose_folder_is_gone(site, doctor):
    distribution(site, "acme-zebra", origin=site.parent / "my zebra")
    code, findings = doctor()
    assert (code, findings["acme-zebra"][0]) == (1, "problem")
    assert findings["acme-zebra"][1] == f"its folder {site.parent / 'my zebra'} is gone"
    (site.parent / "my zebra").mkdir()
    assert "acme-zebra" not in doctor()[1]


@pytest.mark.parametrize(
    ("pyproject", "finding"),
    [
        ('[project]\nversion = "1.0"\n', None),
        ('[project]\ndynamic = ["version"]\n', None),
        ('[project]\nversion = "1.1"\n', "installed as 1.0, and its folder has 1.1"),
    ],
)
def test_metadata_of_another_version_than_the_checkout(site, doctor, pyproject, finding):
    home = site.parent / "my zebra"
    home.mkdir()
    (home / "pyproject.toml").write_text(pyproject)
    distribution(site, "acme-zebra", origin=home)
    found = doctor()[1].get("acme-zebra")
    assert found == (finding and ("problem", finding, f"pip install -e '{home}'"))


def test_metadata_that_cannot_be_understood(site, doctor):
    home = site.parent / "zebra"
    home.mkdir()
    (home / "pyproject.toml").write_text("version = ")
    distribution(site, "acme-zebra", origin=home)
    distribution(site, "acme-okapi", requires=["not ! a requirement"])
    findings = doctor()[1]
    for name in ("acme-zebra", "acme-okapi"):
        assert findings[name][0] == "problem"
        assert findings[name][1].startswith("cannot be understood: ")


def test_two_versions_of_one_distribution(site, doctor):
    for number in ("1.0", "2.0"):
        distribution(site, "acme-zebra", number)
    verdict, detail, _ = doctor()[1]["acme-zebra"]
    assert verdict == "problem"
    assert sorted(detail.split()[:3]) == ["1.0", "2.0", "and"]


@pytest.mark.parametrize(
    ("requirement", "cure"),
    [
        ("trainkit>=99", "install both from one checkout"),
        ("trainkit-unicorn", "install both from one checkout"),
        ("acme-unicorn>=1.2", "pip install 'acme-unicorn>=1.2'"),
        ("attrs<1", "pip install 'attrs<1'"),
        ("attrs>=20", None),
        ("acme-unicorn; extra == 'test'", None),
        ("acme-unicorn; python_version < '3'", None),
    ],
)
def test_requirements_that_are_not_met(site, doctor, requirement, cure):
    distribution(site, "acme-zebra", requires=[requirement])
    found = doctor()[1].get("acme-zebra")
    assert (found and found[2]) == cure


def test_a_torch_that_cannot_be_imported(programs, doctor):
    programs[Path(sys.executable).name] = (1, "ImportError: libtorch.so: cannot open")
    code, findings = doctor()
    assert (code, findings["torch"][0]) == (1, "problem")
    assert "libtorch.so" in findings["torch"][1]


@pytest.mark.parametrize(
    ("cuda", "gpus", "driver", "verdict", "said"),
    [
        (None, [], (127, ""), "ok", "no GPU"),
        ("13.0", ["H100"], (0, "GPU 0: H100"), "ok", "H100"),
        (None, [], (0, "GPU 0: H100"), "advice", "install a torch that is built for CUDA"),
        ("13.0", [], (0, "GPU 0: H100"), "advice", "update its driver"),
    ],
)
def test_a_gpu_that_torch_cannot_use(programs, doctor, cuda, gpus, driver, verdict, said):
    programs[Path(sys.executable).name] = (0, probed(cuda, gpus))
    programs["nvidia-smi"] = driver
    found = doctor()[1]["devices"]
    assert found[0] == verdict
    assert said in found[1] + found[2]


def test_more_threads_than_cpus(programs, doctor, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    for threads, verdict in ((2, "ok"), (3, "advice")):
        programs[Path(sys.executable).name] = (0, probed(threads=threads))
        assert doctor()[1]["threads"][0] == verdict
    assert doctor()[1]["threads"][2] == "set OMP_NUM_THREADS=2"


def test_no_compiler_and_no_headers(doctor, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"{sys.executable} -O2")  # a program that is there
    assert doctor()[1]["compiler"][0] == "ok"
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    monkeypatch.setattr(trainkit_doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    findings = doctor()[1]
    assert findings["compiler"][0] == findings["headers"][0] == "advice"
    assert "set CXX" in findings["compiler"][2]


def test_a_folder_that_is_full_or_not_ours(doctor, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**29))
    assert doctor()[1]["folder"] == ("advice", "0.5 GiB free", "make room for checkpoints")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert doctor()[1]["folder"][:2] == ("problem", "cannot be written to")


def test_programs_are_really_asked():
    python = sys.executable
    assert trainkit_doctor._ask(python, "-c", "print(1); print(2)") == (0, "2")
    assert trainkit_doctor._ask(python, "-c", "raise OSError('no')") == (1, "OSError: no")
    assert trainkit_doctor._ask("no-such-program")[0] == 127
    assert trainkit_doctor._ask(python, "-c", "import os; os.abort()")[0] != 0


def test_importing_the_command_imports_neither_torch_nor_rich():
    code = "import sys, trainkit_doctor; sys.exit(bool({'torch', 'rich', 'omegaconf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert "trainkit doctor" in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("entry_points.txt", b"no equals sign"),
        ("entry_points.txt", b"\xff\xfe"),
        ("METADATA", b"\xff\xfe"),
        ("METADATA", b""),
        ("METADATA", b"Name: acme-zebra\nVersion: 1.0\nRequires-Dist: !!\n"),
        ("METADATA", b"Name: acme-zebra\nVersion: 1.0\nRequires-Dist: x; nothing == '1'\n"),
        ("direct_url.json", b"["),
        ("direct_url.json", b"[]"),
        ("direct_url.json", b"\xff"),
        ("direct_url.json", b"[" * 100_000),
        ("direct_url.json", b'{"url": 3, "dir_info": {"editable": true}}'),
    ],
)
def test_no_damaged_file_of_a_package_ends_it(site, doctor, name, content):
    distribution(site, "acme-zebra")
    (site / "acme_zebra-1.0.dist-info" / name).write_bytes(content)
    _, findings = doctor()
    assert findings["torch"][0] == "ok"
    if name == "direct_url.json" or b"Requires" in content:
        assert findings["acme-zebra"][0] == "problem"
        assert findings["acme-zebra"][2] == "install it again"


def test_a_pyproject_that_blocks_is_a_finding(site, doctor):
    home = site.parent / "zebra"
    home.mkdir()
    os.mkfifo(home / "pyproject.toml")
    distribution(site, "acme-zebra", origin=home)
    assert "acme-zebra" not in doctor()[1]  # it is no file, so it says nothing of a version
