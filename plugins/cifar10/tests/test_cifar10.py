import io
import os
import pickle
import tarfile
import time
import zipfile
from hashlib import md5
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

import trainkit_cifar10
from trainkit import cache
from trainkit.cache import cache_path
from trainkit.errors import DataError
from trainkit.testing import run_steps
from trainkit_cifar10 import CLASSES, Cifar10

OLD_CACHE = ".trainkit-cifar10.pt"  # what earlier versions kept in the data folder
SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "cifar10" / "test.zip"

WET = SimpleNamespace(dry=False)


def pixels(split, target, number):
    """What the image of this name holds, [32, 32, 3]."""
    return np.random.default_rng([split == "train", target, number]).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.fixture(autouse=True)
def cached(tmp_path, tmp_path_factory, monkeypatch):
    """Where what is decoded from `root` is kept; files that have just been written count as at rest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(cache, "SETTLE_NS", -(10**9))
    return cache_path("cifar10", tmp_path, ".pt")


@pytest.fixture
def root(tmp_path):
    """Class folders: two training images and one test image a class."""
    for split, count in (("train", 2), ("test", 1)):
        for target, name in enumerate(CLASSES):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(pixels(split, target, number)).save(folder / f"{number}.png")
    return tmp_path


def publish(root, monkeypatch):
    """Write small files in the published format and make their checksums the published ones."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name, value):
        (folder / name).write_bytes(pickle.dumps(value, protocol=2))
        return [name, md5((folder / name).read_bytes()).hexdigest()]

    def batch(name, split, number):
        data = np.stack([pixels(split, t, number).transpose(2, 0, 1).reshape(-1) for t in reversed(range(10))])
        return write(name, {"data": data, "labels": list(reversed(range(10)))})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{n + 1}", "train", n) for n in range(5)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", "test", 0)])
    meta = write("batches.meta", {"label_names": list(CLASSES)})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return folder


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def same(a, b):
    return all(
        torch.equal(x.images, y.images) and torch.equal(x.targets, y.targets)
        for x, y in ((a.train, b.train), (a.test, b.test))
    )


def test_class_folders_become_both_splits(root):
    data = Cifar10(root=root).data(WET)
    assert data.classes == CLASSES == tuple(sorted(CLASSES))
    assert data.shape == (3, 32, 32)
    assert data.train.images.shape == (20, 3, 32, 32)
    assert data.train.targets.tolist() == sorted(list(range(10)) * 2)
    assert data.test.targets.tolist() == list(range(10))
    for i in range(20):
        assert np.array_equal(data.train.images[i].numpy(), pixels("train", i // 2, i % 2).transpose(2, 0, 1))


def test_published_files_become_both_splits(tmp_path, monkeypatch):
    publish(tmp_path, monkeypatch)
    data = Cifar10(root=tmp_path).data(WET)
    assert data.train.images.shape == (50, 3, 32, 32)
    assert data.train.images.is_contiguous()
    assert data.train.targets.tolist() == list(reversed(range(10))) * 5
    assert np.array_equal(data.train.images[13].numpy(), pixels("train", 6, 1).transpose(2, 0, 1))
    assert np.array_equal(data.test.images[0].numpy(), pixels("test", 9, 0).transpose(2, 0, 1))


def test_published_archive_is_unpacked_without_network(tmp_path, monkeypatch):
    folder = publish(tmp_path / "source", monkeypatch)
    archive = tmp_path / "data" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive.read_bytes()).hexdigest())
    assert same(Cifar10(root=archive.parent).data(WET), Cifar10(root=tmp_path / "source").data(WET))


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_unpublished_pickle_is_refused_unopened(tmp_path, monkeypatch, name):
    folder, marker = publish(tmp_path, monkeypatch), tmp_path / "marker"
    (folder / name).write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(DataError, match=f"{name}: .*not the published file.*download=true"):
        Cifar10(root=tmp_path).data(WET)
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())
    assert marker.exists()  # it would have run


def test_archive_with_wrong_checksum_is_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / CIFAR10.filename, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cifar-10-batches-py/evil"), io.BytesIO())
    with pytest.raises(DataError, match=r"not the published file.*c58f30108f718f92721af3b95e74349a"):
        Cifar10(root=tmp_path).data(WET)
    assert [p.name for p in tmp_path.iterdir()] == [CIFAR10.filename]


def test_missing_published_file_is_named(tmp_path, monkeypatch):
    (publish(tmp_path, monkeypatch) / "data_batch_5").unlink()
    with pytest.raises(DataError, match="data_batch_5: missing"):
        Cifar10(root=tmp_path).data(WET)


def test_download_without_network_says_what_to_do(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(trainkit_cifar10.utils, "download_and_extract_archive", fail)
    with pytest.raises(DataError, match=r"Name or service not known.*put it at .*cifar-10-python\.tar\.gz"):
        Cifar10(root=tmp_path / "data", download=True).data(WET)


def test_download_leaves_class_folders_and_whole_files_alone(root, monkeypatch):
    monkeypatch.setattr(trainkit_cifar10.utils, "download_and_extract_archive", None)
    assert len(Cifar10(root=root, download=True).data(WET).train) == 20
    publish(root, monkeypatch)
    assert len(Cifar10(root=root, download=True).data(WET).train) == 50


def test_second_opening_decodes_nothing_and_the_data_folder_stays_as_it_was(root, cached, monkeypatch):
    first = Cifar10(root=root).data(WET)
    monkeypatch.setattr(trainkit_cifar10, "read_image", None)
    assert same(Cifar10(root=root).data(WET), first)
    assert cached.exists()
    assert sorted(p.name for p in root.iterdir()) == ["test", "train"]


def test_files_that_have_just_changed_are_not_kept(root, cached, monkeypatch):
    monkeypatch.setattr(cache, "SETTLE_NS", 2 * 10**9)
    Cifar10(root=root).data(WET)
    assert not cached.exists()


@pytest.mark.parametrize("change", ["content", "name", "new", "gone", "time", "byte"])
def test_cache_follows_the_files(root, cached, change):
    first = Cifar10(root=root).data(WET)
    before = cached.stat().st_ino
    path = root / "train" / "bird" / "1.png"
    status = path.stat()
    time.sleep(0.012)  # the kernel's clock tells no shorter times
    if change == "content":
        Image.new("RGB", (32, 32), (1, 2, 3)).save(path)
    elif change == "name":
        path.rename(path.with_name("0_.png"))
    elif change == "new":
        Image.new("RGB", (32, 32)).save(path.with_name("2.PNG"))
    elif change == "gone":
        path.unlink()
    elif change == "time":
        os.utime(path, ns=(0, 0))
    else:  # another image in as many bytes, with the time of change put back
        other = root / "train" / "bird" / "0.png"
        content = other.read_bytes()
        path.write_bytes(content + bytes(max(0, status.st_size - len(content))))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    data = Cifar10(root=root).data(WET)
    assert len(data.train) == 20 + (change == "new") - (change == "gone")
    assert (data.train.images[5, :, 0, 0].tolist() == [1, 2, 3]) == (change == "content")
    assert torch.equal(data.train.images[4], data.train.images[5]) == (change == "byte")
    assert cached.stat().st_ino != before
    assert same(data, first) == (change in ("name", "time"))


def forged(path, **changes):
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, **changes}, path)


@pytest.mark.parametrize("damage", ["empty", "cut", "pixel", "other", "shape", "type", "few"])
def test_damaged_cache_is_made_again(root, cached, damage, monkeypatch):
    first = Cifar10(root=root).data(WET)
    content = bytearray(cached.read_bytes())
    images = [first.train.images, first.test.images]
    if damage == "empty":
        cached.write_bytes(b"")
    elif damage == "cut":
        cached.write_bytes(content[: len(content) // 2])
    elif damage == "pixel":
        at = content.index(first.train.images[7].numpy().tobytes())
        content[at] ^= 1
        cached.write_bytes(content)
    elif damage == "other":
        torch.save([1, 2], cached)
    elif damage == "shape":
        forged(cached, images=[part.view(-1, 3, 16, 64) for part in images])
    elif damage == "type":
        forged(cached, images=[part.float() for part in images])
    else:
        forged(cached, images=[images[0][:5], images[1]])
    assert same(Cifar10(root=root).data(WET), first)
    monkeypatch.setattr(trainkit_cifar10, "read_image", None)
    assert same(Cifar10(root=root).data(WET), first)


def test_caches_that_come_with_the_data_are_not_believed(root, cached):
    first = Cifar10(root=root).data(WET)
    forged(cached, images=[torch.zeros_like(first.train.images), first.test.images])
    cached.rename(root / OLD_CACHE)
    assert same(Cifar10(root=root).data(WET), first)


def test_cache_that_cannot_be_written_is_no_obstacle(root, cached):
    (cached / "below").mkdir(parents=True)  # stands in for a read-only folder, which root can write
    for _ in range(2):
        assert len(Cifar10(root=root).data(WET).train) == 20


def test_malicious_cache_does_not_run(root, cached, tmp_path):
    first = Cifar10(root=root).data(WET)
    torch.save(Malicious(tmp_path / "marker"), cached)
    assert same(Cifar10(root=root).data(WET), first)
    assert not (tmp_path / "marker").exists()


def test_hidden_and_other_files_are_ignored(root):
    first = Cifar10(root=root).data(WET)
    (root / "train" / "cat" / "._0.png").write_bytes(b"resource fork")
    (root / "train" / "cat" / "notes.txt").write_text("notes")
    assert same(Cifar10(root=root).data(WET), first)


def test_grey_and_jpeg_images_become_rgb(root):
    (root / "test" / "truck" / "0.png").unlink()
    Image.new("L", (32, 32), 77).save(root / "test" / "truck" / "0.JPEG", quality=100)
    assert (Cifar10(root=root).data(WET).test.images[9] == 77).all()


def test_nothing_there_says_what_to_do(tmp_path):
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=r"no CIFAR-10 here.*train/<class>.*plugins\.cifar10\.download=true"):
            Cifar10(root=root).data(WET)


@pytest.mark.parametrize("path", ["test", "train/dog"])
def test_missing_folder_is_named(root, path):
    (root / path).rename(root / "elsewhere")
    with pytest.raises(DataError, match=f"{path}.*: no such folder.*must each hold.*airplane"):
        Cifar10(root=root).data(WET)


def test_empty_class_is_named(root):
    (root / "test" / "frog" / "0.png").unlink()
    with pytest.raises(DataError, match=r"test.frog: no PNG or JPEG files"):
        Cifar10(root=root).data(WET)


def test_undecodable_image_is_named(root, cached):
    path = root / "train" / "horse" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"horse.1\.png: cannot be decoded: .*replace or remove"):
        Cifar10(root=root).data(WET)
    assert not cached.exists()


def test_wrong_size_is_named(root):
    Image.new("RGB", (31, 64)).save(root / "train" / "ship" / "0.png")
    with pytest.raises(DataError, match=r"ship.0\.png: 31x64 pixels, not 32x32"):
        Cifar10(root=root).data(WET)


def test_home_is_expanded(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("USERPROFILE", str(root))
    assert len(Cifar10(root=Path("~")).data(WET).train) == 20


def test_trains_from_class_folders_and_from_their_cache(root):
    runs = [run_steps({"cifar10": Cifar10(root=root)}, steps=3) for _ in range(2)]
    for a, b in zip(*(r.model.parameters() for r in runs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real images")
def test_real_images(tmp_path):
    with zipfile.ZipFile(SHARED) as archive:
        for label in CLASSES:
            names = sorted(n for n in archive.namelist() if f"test/{label}/" in n and n.endswith(".png"))[:3]
            for split in ("train", "test"):
                folder = tmp_path / split / label
                folder.mkdir(parents=True)
                for name in names:
                    (folder / Path(name).name).write_bytes(archive.read(name))
    data = Cifar10(root=tmp_path).data(WET)
    path = sorted((tmp_path / "test" / "truck").iterdir())[-1]
    assert np.array_equal(data.test.images[-1].permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))
    assert data.test.targets.bincount().tolist() == [3] * 10


def test_a_dry_run_fetches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trainkit_cifar10.utils, "download_and_extract_archive", None)
    with pytest.raises(DataError, match="a dry run fetches and unpacks nothing"):
        Cifar10(root=tmp_path, download=True).data(SimpleNamespace(dry=True))
