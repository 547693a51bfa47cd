import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

import trainkit_image_folder
from trainkit.data import Batches, TensorSplit
from trainkit.errors import DataError, RecipeError
from trainkit.provenance import fingerprint
from trainkit.recipe import Recipe, make_options
from trainkit.testing import parameters_of, run_steps
from trainkit_image_folder import FolderSplit, ImageFolder


def picture(seed, width, height):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def root(tmp_path):
    """Three training classes with four images each, two test classes with two, of many sizes."""
    for split, labels, count in (("train", ["b", "a", "c"], 4), ("test", ["c", "a"], 2)):
        for label in labels:
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                picture([ord(label), i], 9 + i, 17 - 3 * i).save(folder / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("in_memory", [True, False])
def test_classes_targets_and_order(root, in_memory):
    data = ImageFolder(root=root, size=8, in_memory=in_memory).data()
    assert data.classes == ("a", "b", "c")
    assert data.shape == (3, 8, 8)
    assert list(data.train.targets) == [0] * 4 + [1] * 4 + [2] * 4
    assert list(data.test.targets) == [0, 0, 2, 2]


@pytest.mark.parametrize("size", [8, 16, (5, 12)])
def test_streamed_and_held_images_are_those_of_torchvision(root, size):
    held = ImageFolder(root=root, size=size).data()
    streamed = ImageFolder(root=root, size=size, in_memory=False).data()
    assert isinstance(held.train, TensorSplit)
    assert isinstance(streamed.train, FolderSplit)
    assert held.shape == streamed.shape == ((3, size, size) if isinstance(size, int) else (3, *size))
    assert len(held.train) == len(streamed.train) == 12
    for i, label in enumerate("aaaabbbbcccc"):
        image = Image.open(root / "train" / label / f"{i % 4}.png")
        steps = [Resize(size, InterpolationMode.BILINEAR), PILToTensor()]
        expected = Compose([*steps, CenterCrop(size)] if isinstance(size, int) else steps)(image)
        for split in (held.train, streamed.train):
            assert torch.equal(split[i][0], expected)
            assert split[i][1] == "abc".index(label)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.booleans())
def test_every_image_gets_the_promised_shape(tmp_path, width, height, size, square):
    path = tmp_path / "image.png"
    picture(0, width, height).save(path)
    image, target = FolderSplit([(str(path), 3)], size if square else (size, 7), "")[0]
    assert image.shape == ((3, size, size) if square else (3, size, 7))
    assert image.dtype == torch.uint8
    assert target == 3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(root, mode):
    image = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    (root / "train" / "a" / "0.png").unlink()
    image.save(root / "train" / "a" / "0.tiff")
    assert (ImageFolder(root=root, size=8).data().train.images[0] == 255).all()


def test_in_memory_by_default_only_where_it_fits(root, monkeypatch):
    monkeypatch.setattr(trainkit_image_folder, "_IN_MEMORY", 16 * 3 * 8 * 9)  # 12 training and 4 test images
    assert isinstance(ImageFolder(root=root, size=(8, 9)).data().test, TensorSplit)
    assert isinstance(ImageFolder(root=root, size=(9, 9)).data().test, FolderSplit)
    assert isinstance(ImageFolder(root=root, size=(9, 9), in_memory=True).data().test, TensorSplit)
    assert isinstance(ImageFolder(root=root, size=(8, 9), in_memory=False).data().test, FolderSplit)


def test_workers_decode_what_this_process_decodes(root):
    data = ImageFolder(root=root, size=8, in_memory=False, workers=1).data()
    assert data.workers == 1
    order = torch.tensor([5, 0, 11, 3, 7])
    batches = list(Batches(data.train, 3, torch.device("cpu"), data.workers).iterate(order))
    assert torch.equal(torch.cat([b.images for b in batches]), torch.stack([data.train[i][0] for i in order]))
    assert torch.cat([b.targets for b in batches]).tolist() == [1, 0, 2, 0, 1]


def test_split_can_be_pickled(root):
    split = ImageFolder(root=root, size=8, in_memory=False).data().train
    copy = pickle.loads(pickle.dumps(split))
    assert len(copy) == 12
    assert torch.equal(copy[3][0], split[3][0])
    assert fingerprint(copy) == fingerprint(split)


def test_fingerprint_follows_files_and_size_but_not_the_place(root):
    def prints(folder, size=8):
        data = ImageFolder(root=folder, size=size, in_memory=False).data()
        return fingerprint(data.train), fingerprint(data.test)

    train, test = prints(root)
    assert prints(root) == (train, test)
    assert prints(root, 9)[0] != train
    moved = root.with_name("moved")
    root.rename(moved)
    assert prints(moved) == (train, test)
    path = moved / "train" / "b" / "2.png"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert prints(moved)[0] != train
    assert prints(moved)[1] == test
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prints(moved) == (train, test)
    path.rename(path.with_name("9.png"))
    assert prints(moved)[0] != train


def test_images_in_deeper_folders_count_and_hidden_or_other_files_do_not(root):
    deep = root / "train" / "a" / "1_more" / "deeper"
    deep.mkdir(parents=True)
    picture(5, 8, 8).save(deep / "x.JPG", format="PNG")
    (root / "train" / "a" / "._0.png").write_bytes(b"resource fork")
    (root / "train" / "a" / "notes.txt").write_text("notes")
    (root / "train" / ".git").mkdir()
    (root / "train" / "list.txt").write_text("list")
    data = ImageFolder(root=root, size=8).data()
    assert data.classes == ("a", "b", "c")
    assert data.train.targets.tolist() == [0] * 5 + [1] * 4 + [2] * 4
    assert torch.equal(data.train.images[2], PILToTensor()(picture(5, 8, 8)))  # after 0.png and 1.png


def test_folders_of_other_names(root):
    (root / "test").rename(root / "val")
    assert len(ImageFolder(root=root, size=8, test="val").data().test) == 4
    with pytest.raises(DataError, match=r"test: No such file or directory.*\.test"):
        ImageFolder(root=root, size=8).data()


def test_test_class_that_training_lacks_is_named(root):
    (root / "test" / "a").rename(root / "test" / "d")
    with pytest.raises(DataError, match=r"test.d: a class that .*train lacks"):
        ImageFolder(root=root, size=8).data()


def test_absent_root_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent.train: No such file.*plugins\.image_folder\.root"):
        ImageFolder(root=tmp_path / "absent", size=8).data()


@pytest.mark.parametrize("split", ["train", "test"])
def test_split_without_classes_is_named(root, split):
    (root / split).rename(root / "old")
    (root / split).mkdir()
    with pytest.raises(DataError, match=f"{split}: no class folders; expected .*<class>.<image>"):
        ImageFolder(root=root, size=8).data()


def test_empty_class_is_named(root):
    (root / "train" / "empty").mkdir()
    with pytest.raises(DataError, match=r"train.empty: no images \(\.jpg, "):
        ImageFolder(root=root, size=8).data()


def test_undecodable_image_is_named_when_it_is_read(root):
    path = root / "train" / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"b.1\.png: cannot be decoded: .*replace or remove"):
        ImageFolder(root=root, size=8).data()
    data = ImageFolder(root=root, size=8, in_memory=False).data()
    data.train[4], data.train[6]
    with pytest.raises(DataError, match=r"b.1\.png: cannot be decoded"):
        list(Batches(data.train, 4, torch.device("cpu"), workers=0).iterate())


def options(**given):
    return make_options(
        Recipe(name="r", epochs=1, batch_size=1, plugins={"image_folder": given}), "image_folder", ImageFolder
    )


def test_options_as_a_recipe_gives_them():
    plugin = options(root="~/flowers", size=[48, 64])
    assert plugin.root == Path.home() / "flowers"
    assert plugin.size == (48, 64)
    assert options(root="flowers", size=64).size == 64


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("size", {"root": "x"}),
        ("root", {"size": 8}),
        ("size", {"root": "x", "size": 0}),
        ("size", {"root": "x", "size": [8, -1]}),
        ("size", {"root": "x", "size": [8, 8, 8]}),
        ("size", {"root": "x", "size": "large"}),
        ("workers", {"root": "x", "size": 8, "workers": -1}),
    ],
)
def test_wrong_options_are_named(key, given):
    with pytest.raises(RecipeError, match=rf"plugins\.image_folder\.{key}: "):
        options(**given)


def test_streaming_and_holding_train_the_same(root):
    runs = [
        run_steps({"image_folder": ImageFolder(root=root, size=8, in_memory=held, workers=0)}, steps=3)
        for held in (True, False)
    ]
    for a, b in zip(*(parameters_of(run) for run in runs), strict=True):
        assert torch.equal(a, b)
