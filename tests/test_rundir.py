import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from hashlib import blake2b
from pathlib import Path

import pytest
import torch

from trainkit.errors import CheckpointError, UsageError
from trainkit.recipe import from_dict
from trainkit.rundir import DIGEST_SIZE, RunDir, as_numbers, atomic_write, pack_state, parse_json, read_regular

RECIPE = from_dict({"name": "r", "epochs": 1, "batch_size": 1, "seed": 7})


def test_atomic_write_replaces_whole_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "f"
    atomic_write(path, "one")
    atomic_write(path, b"two")
    assert path.read_text() == "two"
    assert os.listdir(tmp_path) == ["f"]


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "f"
    atomic_write(path, "one")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, "two")
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["f"]


def test_default_directories_are_named_by_recipe_time_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [RunDir.create(RECIPE).path for _ in range(3)]  # within one second, all the same
    assert len(set(made)) == 3
    assert all(p.parent.as_posix() == "runs/r" for p in made)
    assert made[0].name.endswith("-7")


def test_an_occupied_directory_is_refused(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(UsageError, match="not empty"):
        RunDir.create(RECIPE, tmp_path)
    with pytest.raises(UsageError, match="cannot be made"):
        RunDir.create(RECIPE, tmp_path / "x" / "y")


def test_json_has_null_for_what_json_cannot_say(tmp_path):
    RunDir(tmp_path).write_json("a/b.json", {"x": [float("nan"), float("-inf"), 1.5]})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": [None, None, 1.5]}


def test_a_second_process_is_refused_and_a_dead_one_forgotten(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from trainkit.rundir import RunDir\n"
        "with RunDir(Path(sys.argv[1])).exclusive():\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="another process"), RunDir(tmp_path).exclusive():
            pass
        other.kill()
    with RunDir(tmp_path).exclusive():
        pass


def test_an_error_under_the_lock_is_not_taken_for_a_held_lock(tmp_path):
    with pytest.raises(BlockingIOError), RunDir(tmp_path).exclusive():
        raise BlockingIOError
    with RunDir(tmp_path).exclusive():
        pass


def test_the_parts_of_a_killed_write_are_removed_and_nothing_else(tmp_path):
    kill = (
        "import os, signal, sys; from pathlib import Path; from trainkit.rundir import RunDir\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "RunDir(Path(sys.argv[1])).write('checkpoints/last.pt', b'x')"
    )
    subprocess.run([sys.executable, "-c", kill, str(tmp_path)], check=False)
    (part,) = (tmp_path / "checkpoints").iterdir()
    assert part.name.endswith(".part")
    for name in ("a.part", ".hidden"):
        (tmp_path / name).touch()
    with RunDir(tmp_path).exclusive():
        RunDir(tmp_path).remove_parts()
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".hidden", "a.part", "checkpoints"]


@pytest.mark.parametrize(("names", "latest", "said"), [(["last", "previous"], 2, ""), (["previous"], 1, "previous.pt")])
def test_the_latest_state_is_that_of_the_last_whole_checkpoint(tmp_path, names, latest, said):
    run_dir = RunDir(tmp_path)
    for name in names:
        run_dir.write(f"checkpoints/{name}.pt", pack_state({"step": {"last": 2, "previous": 1}[name]}))
    state, notice = run_dir.load_latest()
    assert state == {"step": latest}
    assert notice.endswith(said)
    assert bool(notice) == bool(said)


def test_without_any_whole_checkpoint_the_last_one_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"last\.pt: no checkpoint"):
        RunDir(tmp_path).load_latest()


@pytest.fixture
def saved(tmp_path):
    shared = torch.arange(1000.0)
    state = {"model": {"a": shared, "b": shared}, "position": {"step": 3}, "text": "x"}
    RunDir(tmp_path).write("checkpoints/last.pt", pack_state(state))
    return RunDir(tmp_path), tmp_path / "checkpoints" / "last.pt"


def test_a_state_loads_back_with_its_ties(saved):
    run_dir, path = saved
    state = run_dir.load_state("last")
    assert torch.equal(state["model"]["a"], torch.arange(1000.0))
    assert state["position"] == {"step": 3}
    assert state["model"]["a"].data_ptr() == state["model"]["b"].data_ptr()
    assert path.stat().st_size < 2 * 4000
    assert torch.load(path, weights_only=True)["text"] == "x"


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "append", "remove"])
def test_damage_is_found(saved, damage):
    run_dir, path = saved
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes({"truncate": data[:-100], "flip": data, "empty": b"", "append": data + b"x"}.get(damage, b""))
    if damage == "remove":
        path.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint" if damage == "remove" else "damaged"):
        run_dir.load_state("last")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    data = pack_state({"model": Evil(str(marker))})  # with a valid checksum, as a stranger could make it
    marker.unlink(missing_ok=True)
    RunDir(tmp_path).write("checkpoints/last.pt", data)
    with pytest.raises(CheckpointError, match="refused"):
        RunDir(tmp_path).load_state("last")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(str(marker))))  # the payload does work where code may run
    assert marker.exists()


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UsageError, match="not the directory of a run"):
        RunDir(tmp_path).recipe_path()
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UsageError, match="x.json: not the file of a run"):
        RunDir(tmp_path).read_json("x.json")


@pytest.fixture(params=["fifo", "/dev/zero", "/dev/full", "socket"])
def odd(request, tmp_path):
    """A path that is there and is no regular file; reading it would block, or never end."""
    path = tmp_path / "odd"
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "socket":
        os.mknod(path, 0o140600)
    else:
        path.symlink_to(request.param)
    return path


def test_only_regular_files_are_read(odd):
    with pytest.raises(OSError, match="no regular file|No such device"):
        read_regular(odd, 10)


def test_what_is_read_counts_and_not_the_size_that_the_system_gives(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    assert read_regular(path, 10) == b"0123456789"
    with pytest.raises(OSError, match="larger than 9 bytes"):
        read_regular(path, 9)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path, 9)
    assert read_regular(Path("/proc/self/status"), 1 << 20).startswith(b"Name:")  # its size is 0
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # a terabyte without blocks
    with pytest.raises(OSError, match="larger than 1 MiB"):
        read_regular(path, 1 << 20)


@pytest.mark.parametrize("document", ["[" * 200 + "]" * 200, "[" * 10**6, '{"a":' * 150 + "1" + "}" * 150, "1" * 5000])
def test_a_document_that_cannot_be_walked_through_is_refused(tmp_path, document):
    with pytest.raises(ValueError, match="nested deeper|Exceeds|Expecting"):
        parse_json(document)
    (tmp_path / "x.json").write_text(document)
    with pytest.raises(UsageError, match="x.json: not the file of a run: "):
        RunDir(tmp_path).read_json("x.json")
    assert parse_json("[" * 100 + "]" * 100)


def test_of_a_strangers_object_the_finite_numbers_are_taken():
    told = parse_json('{"a": 1, "b": 2.5, "c": true, "d": "3", "e": NaN, "f": Infinity, "g": 1' + "0" * 400 + "}")
    assert as_numbers(told) == {"a": 1, "b": 2.5}
    assert as_numbers([told]) == {}


def test_no_file_of_a_run_directory_blocks(odd, tmp_path):
    run_dir = RunDir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    odd.rename(tmp_path / "checkpoints" / "last.pt")
    with pytest.raises(CheckpointError, match="no checkpoint: .*(no regular file|No such device)"):
        run_dir.load_state("last")
    (tmp_path / "checkpoints" / "last.pt").rename(tmp_path / "environment.json")
    with pytest.raises(UsageError, match="no regular file|No such device"):
        run_dir.read_json("environment.json")


def sealed(body):
    """Return an archive with trainkit's checksum as its comment."""
    body = body[:-2] + DIGEST_SIZE.to_bytes(2, "little")
    return body + blake2b(body, digest_size=DIGEST_SIZE).digest()


def test_a_checkpoint_that_would_be_larger_in_memory_is_refused(tmp_path, monkeypatch):
    saved = io.BytesIO()
    torch.save({"x": torch.zeros(10**6)}, saved)
    packed = io.BytesIO()
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    bomb = sealed(packed.getvalue())
    assert len(bomb) < 20_000
    monkeypatch.setattr(torch, "load", None)  # refused before
    for data in (bomb, sealed(pickle.dumps({}) + b"  ")):
        RunDir(tmp_path).write("checkpoints/last.pt", data)
        with pytest.raises(CheckpointError, match="last.pt: refused: (it would be larger in memory|not the archive)"):
            RunDir(tmp_path).load_state("last")


def test_a_refused_checkpoint_repeats_no_advice_to_load_it_unprotected(tmp_path):
    RunDir(tmp_path).write("checkpoints/last.pt", pack_state({"x": Evil}))
    with pytest.raises(CheckpointError, match=r"refused: .*it names [\w.]*Evil") as caught:
        RunDir(tmp_path).load_state("last")
    assert "weights_only" not in str(caught.value)
