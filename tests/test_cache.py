"""What is kept between runs: digests of files, by what changes with their content."""

import json
import os
import shutil
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainkit import cache
from trainkit.cache import cache_path, file_digests, settled
from trainkit.errors import DataError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trainkit"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "data" / name).write_text(f"content of {name}")
    return tmp_path / "data"


@pytest.fixture
def at_rest(monkeypatch):
    """Files that have just been written count as at rest."""
    monkeypatch.setattr(cache, "SETTLE_NS", -(10**9))


NAMES = ["a", "b", "c"]


def reads(folder, names=NAMES):
    """Return the digests, and which files were read for them."""
    asked = []
    digests = file_digests(folder, names, announce=lambda files, size: asked.append((files, size)))
    return digests, asked[0][0] if asked else 0


def test_the_cache_lies_in_the_users_folder(home, folder, monkeypatch, tmp_path):
    assert cache_path("digests", folder, ".json").parent == home / "digests"
    monkeypatch.chdir(folder.parent)
    assert cache_path("digests", "data", ".json") == cache_path("digests", folder, ".json")
    assert cache_path("digests", folder, ".json") != cache_path("digests", tmp_path, ".json")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for relative in ("", "relative"):  # the specification has relative paths ignored
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_path("digests", folder, ".json").is_relative_to(tmp_path / ".cache" / "trainkit" / "digests")


def test_files_are_read_once(folder, at_rest):
    first, count = reads(folder)
    assert count == 3
    assert len({*first}) == 3
    assert reads(folder) == (first, 0)
    assert reads(folder, ["c", "a"]) == ([first[2], first[0]], 0)
    assert sorted(path.name for path in folder.iterdir()) == NAMES


def test_a_file_that_has_just_changed_is_read_again(folder, home):
    first, _ = reads(folder)
    assert reads(folder) == (first, 3)
    assert not home.exists()


def test_only_what_changed_is_read(folder, at_rest):
    before, _ = reads(folder)
    (folder / "b").write_text("CONTENT of b")
    (folder / "d").write_text("new")
    after, count = reads(folder, [*NAMES, "d"])
    assert count == 2
    assert [a == b for a, b in zip(before, after, strict=False)] == [True, False, True]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.integers(0, 11), st.integers(1, 255))
def test_one_byte_is_seen_even_with_size_and_time_put_back(folder, at_rest, place, change):
    path = folder / "a"
    before, _ = reads(folder)
    status, content = path.stat(), bytearray(path.read_bytes())
    time.sleep(0.012)  # the kernel's clock tells no shorter times, which is why fresh files are not kept
    content[place] ^= change
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after, count = reads(folder)
    assert count == 1
    assert after[0] != before[0]


def test_copies_have_the_same_digests(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert reads(tmp_path / "copy") == reads(folder)


@pytest.mark.parametrize("damage", ["", "{", "[]", "3", '{"a": 1}', '{"a": [1, 2, 3, 4]}', '{"a": ["x", 1, 2, 3, 4]}'])
def test_a_damaged_cache_is_made_again(folder, at_rest, damage):
    first, _ = reads(folder)
    path = cache_path("digests", folder, ".json")
    path.write_text(damage)
    assert reads(folder) == (first, 3)
    assert reads(folder) == (first, 0)
    assert sorted(json.loads(path.read_text())) == NAMES


def test_a_cache_that_cannot_be_written_is_no_obstacle(folder, home, at_rest):
    home.parent.mkdir()
    home.write_text("a file in its place")
    first, _ = reads(folder)
    assert reads(folder) == (first, 3)


def test_odd_names(folder, at_rest):
    names = ["é", "\n", "b" * 200]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"\xff"))
    for name in names:
        (folder / name).write_text(name.encode(errors="replace").decode())
    first, _ = reads(folder, names)
    assert reads(folder, names) == (first, 0)


def test_a_file_that_is_gone_is_named(folder):
    (folder / "b").unlink()
    with pytest.raises(DataError, match="b: cannot be read: No such file"):
        file_digests(folder, NAMES, workers=2)


def test_settled():
    now = 10**18
    assert settled([], now)
    assert settled([(1, 1, 1, now - 3 * 10**9)], now)
    assert not settled([(1, 1, 1, now - 3 * 10**9), (1, 1, 1, now - 10**9)], now)
    assert not settled([(1, 1, 1, now + 1)], now)
