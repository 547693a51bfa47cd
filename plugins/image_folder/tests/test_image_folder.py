import io
import os
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, RandomResizedCrop, Resize
from torchvision.transforms.functional import pil_to_tensor, resized_crop

import trainkit_image_folder
from trainkit import cache
from trainkit.data import Batches, TensorSplit, subset
from trainkit.errors import DataError, RecipeError
from trainkit.provenance import fingerprint
from trainkit.recipe import Recipe, make_options
from trainkit.rng import torch_seed
from trainkit.testing import parameters_of, run_steps
from trainkit_image_folder import Crop, FolderSplit, ImageFolder


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def opened(said=None, **options):
    """Return the data; what is printed goes to the list."""
    text = io.StringIO()
    data = ImageFolder(**options).data(SimpleNamespace(console=Console(file=text, width=40)))
    if said is not None:
        said += text.getvalue().splitlines()
    return data


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
    data = opened(root=root, size=8, in_memory=in_memory)
    assert data.classes == ("a", "b", "c")
    assert data.shape == (3, 8, 8)
    assert list(data.train.targets) == [0] * 4 + [1] * 4 + [2] * 4
    assert list(data.test.targets) == [0, 0, 2, 2]


@pytest.mark.parametrize("size", [8, 16, (5, 12)])
def test_streamed_and_held_images_are_those_of_torchvision(root, size):
    held = opened(root=root, size=size)
    streamed = opened(root=root, size=size, in_memory=False)
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
    assert (opened(root=root, size=8).train.images[0] == 255).all()


def test_in_memory_by_default_only_where_it_fits(root, monkeypatch):
    monkeypatch.setattr(trainkit_image_folder, "_IN_MEMORY", 16 * 3 * 8 * 9)  # 12 training and 4 test images
    assert isinstance(opened(root=root, size=(8, 9)).test, TensorSplit)
    assert isinstance(opened(root=root, size=(9, 9)).test, FolderSplit)
    assert isinstance(opened(root=root, size=(9, 9), in_memory=True).test, TensorSplit)
    assert isinstance(opened(root=root, size=(8, 9), in_memory=False).test, FolderSplit)


def test_workers_decode_what_this_process_decodes(root):
    data = opened(root=root, size=8, in_memory=False, workers=1)
    assert data.workers == 1
    order = torch.tensor([5, 0, 11, 3, 7])
    batches = list(Batches(data.train, 3, torch.device("cpu"), data.workers).iterate(order))
    assert torch.equal(torch.cat([b.images for b in batches]), torch.stack([data.train[i][0] for i in order]))
    assert torch.cat([b.targets for b in batches]).tolist() == [1, 0, 2, 0, 1]


def test_split_can_be_pickled(root):
    split = opened(root=root, size=8, in_memory=False).train
    copy = pickle.loads(pickle.dumps(split))
    assert len(copy) == 12
    assert torch.equal(copy[3][0], split[3][0])
    assert fingerprint(copy) == fingerprint(split)


def prints(folder, labels="abc", **options):
    data = opened(root=folder, **{"size": 8, **options})
    assert data.classes == tuple(labels)
    return fingerprint(data.train), fingerprint(data.test)


@pytest.mark.parametrize("in_memory", [True, False])
def test_fingerprint_follows_contents_names_classes_and_size(root, in_memory):
    train, test = prints(root, in_memory=in_memory)
    assert prints(root, in_memory=not in_memory) == (train, test)
    assert prints(root, size=9)[0] != train
    assert prints(root, size=(8, 8))[0] != train
    path = root / "train" / "b" / "2.png"
    path.rename(path.with_name("9.png"))
    assert prints(root)[0] != train
    assert prints(root)[1] == test
    path.with_name("9.png").rename(path)
    assert prints(root) == (train, test)
    for split in ("train", "test"):
        (root / split / "a").rename(root / split / "d")
    changed = prints(root, "bcd")
    assert changed[0] != train
    assert changed[1] != test


def test_fingerprint_is_that_of_a_copy(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(root, elsewhere, copy_function=shutil.copyfile)  # with times of its own
    assert prints(elsewhere) == prints(root)
    moved = root.with_name("moved")
    root.rename(moved)
    assert prints(moved) == prints(elsewhere)


def test_fingerprint_sees_one_byte_even_with_size_and_time_put_back(root, monkeypatch):
    monkeypatch.setattr(cache, "SETTLE_NS", -(10**9))  # the files count as written long ago
    path = root / "train" / "b" / "2.png"
    picture(0, 8, 8).save(path, format="BMP")
    train, test = prints(root)
    status = path.stat()
    time.sleep(0.012)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert prints(root)[0] != train
    assert prints(root)[1] == test


def test_parts_of_held_and_streamed_splits_have_one_fingerprint(root):
    splits = [opened(root=root, size=8, in_memory=held).train for held in (True, False)]
    parts = [fingerprint(subset(split, torch.tensor([7, 2]))) for split in splits]
    assert parts[0] == parts[1] != fingerprint(splits[0])


def test_contents_are_read_once_and_nothing_is_written_beside_the_data(root, cache_folder, monkeypatch):
    monkeypatch.setattr(cache, "SETTLE_NS", -(10**9))
    before = sorted(root.rglob("*"))
    first = prints(root, in_memory=False)
    monkeypatch.setattr(cache, "read_file", None)
    assert prints(root, in_memory=False) == first
    assert sorted(root.rglob("*")) == before
    assert len(list(cache_folder.glob("trainkit/digests/*.json"))) == 2


def test_reading_much_for_the_first_time_is_said(root, monkeypatch):
    monkeypatch.setattr(trainkit_image_folder, "_WORTH_SAYING", 1)
    said = []
    opened(said, root=root, size=8)
    assert [line.partition(": ")[2] for line in said] == [
        "reading 12 files (0.0 GiB), once, to identify them",
        "reading 4 files (0.0 GiB), once, to identify them",
    ]


def test_images_in_deeper_folders_count_and_hidden_or_other_files_do_not(root):
    deep = root / "train" / "a" / "1_more" / "deeper"
    deep.mkdir(parents=True)
    picture(5, 8, 8).save(deep / "x.JPG", format="PNG")
    (root / "train" / "a" / "._0.png").write_bytes(b"resource fork")
    (root / "train" / "a" / "notes.txt").write_text("notes")
    (root / "train" / ".git").mkdir()
    (root / "train" / "list.txt").write_text("list")
    picture(5, 8, 8).save(root / "train" / "lost.png")
    said = []
    data = opened(said, root=root, size=8)
    assert said == [f"{root}: passed over 3 files: 2 .txt, 1 in no class folder"]
    assert data.classes == ("a", "b", "c")
    assert data.train.targets.tolist() == [0] * 5 + [1] * 4 + [2] * 4
    assert torch.equal(data.train.images[2], PILToTensor()(picture(5, 8, 8)))  # after 0.png and 1.png


def test_folders_of_other_names(root):
    (root / "test").rename(root / "val")
    assert len(opened(root=root, size=8, test="val").test) == 4
    with pytest.raises(DataError, match=r"test: no such folder; .*\.test"):
        opened(root=root, size=8)


def test_test_class_that_training_lacks_is_named(root):
    (root / "test" / "a").rename(root / "test" / "d")
    with pytest.raises(DataError, match=r"test.d: a class that .*train lacks"):
        opened(root=root, size=8)


def test_absent_root_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent.train: no such folder; check plugins\.image_folder\.root"):
        opened(root=tmp_path / "absent", size=8)


@pytest.mark.parametrize("split", ["train", "test"])
def test_split_without_classes_is_named(root, split):
    (root / split).rename(root / "old")
    (root / split).mkdir()
    with pytest.raises(DataError, match=f"{split}: no class folders; expected .*<class>.<image>"):
        opened(root=root, size=8)


def test_empty_class_is_named(root):
    (root / "train" / "empty").mkdir()
    with pytest.raises(DataError, match=r"train.empty: no images \(\.jpg, "):
        opened(root=root, size=8)


def test_undecodable_image_is_named_when_it_is_read(root):
    path = root / "train" / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"b.1\.png: cannot be decoded: .*replace or remove"):
        opened(root=root, size=8)
    data = opened(root=root, size=8, in_memory=False)
    data.train[4], data.train[6]
    with pytest.raises(DataError, match=r"b.1\.png: cannot be decoded"):
        list(Batches(data.train, 4, torch.device("cpu"), workers=0).iterate())


def test_all_images_that_cannot_be_decoded_are_named_at_once(root):
    for split, names in (("train", ["a/0", "b/2", "c/3"]), ("test", ["c/1"])):
        for name in names:
            (root / split / f"{name}.png").write_bytes(b"rubbish")
    with pytest.raises(DataError, match="4 images cannot be used; replace or remove them: ") as caught:
        opened(root=root, size=8)
    for name in ("a/0", "b/2", "c/3", "c/1"):
        assert f"{Path(name)}.png: cannot be decoded" in str(caught.value)
    for path in root.rglob("*.png"):
        path.write_bytes(b"rubbish")
    with pytest.raises(DataError, match="16 images cannot be used; .*; and 6 more$") as caught:
        opened(root=root, size=8)
    assert str(caught.value).count("cannot be decoded") == 10


def test_one_class_alone_is_refused(root):
    (root / "train" / "b").rename(root / "b")
    (root / "train" / "c").rename(root / "c")
    with pytest.raises(DataError, match=r"train: one class alone, 'a', .*; add a folder for each class$"):
        opened(root=root, size=8)


def test_a_folder_one_level_too_deep_is_refused(root):
    for split in ("train", "test"):
        (root / split).rename(root / "flowers")
        (root / split).mkdir()
        (root / "flowers").rename(root / split / "flowers")
    with pytest.raises(
        DataError, match=r"one class alone, 'flowers'.*set plugins\.image_folder\.train and \.test to train"
    ):
        opened(root=root, size=8)
    assert opened(root=root, size=8, train="train/flowers", test="test/flowers").classes == ("a", "b", "c")


def test_broken_link_to_a_class_is_named(root):
    (root / "train" / "d").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"train.d: a broken link to nowhere"):
        opened(root=root, size=8)


# ---- random_resized_crop


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    st.integers(1, 50),
    st.integers(1, 50),
    st.sampled_from([8, 20, (5, 9)]),
    st.sampled_from([Crop(), Crop((0.5, 0.6), (1.0, 1.0)), Crop((0.01, 0.02), (0.2, 9.0))]),
    st.integers(0, 2**40),
)
def test_crops_are_those_of_torchvision(tmp_path, width, height, size, crop, seed):
    picture(0, width, height).save(tmp_path / "x.png")
    split = FolderSplit([(str(tmp_path / "x.png"), 0)], size, "", crop)
    torch.manual_seed(seed)
    image, _ = split[0]
    torch.manual_seed(seed)
    transform = RandomResizedCrop(size, crop.scale, crop.ratio, InterpolationMode.BILINEAR)
    assert torch.equal(image, pil_to_tensor(transform(picture(0, width, height))))


def test_crops_depend_on_seed_epoch_and_index_alone(root):
    data = opened(root=root, size=8, random_resized_crop=Crop(), workers=1)

    def images(seed, epoch, order, workers=0):
        batches = Batches(data.train, 5, torch.device("cpu"), workers, seed=seed)
        found = list(batches.iterate(torch.tensor(order), epoch=epoch))
        batches.close()
        return dict(
            zip(torch.cat([b.indices for b in found]).tolist(), torch.cat([b.images for b in found]), strict=True)
        )

    order = list(range(12))
    first = images(3, 2, order)
    torch.manual_seed(torch_seed(3, "data/train/0", 2, 7))
    path = data.train.samples[7][0]
    with Image.open(path) as image:
        box = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        assert torch.equal(first[7], pil_to_tensor(resized_crop(image, *box, [8, 8])))
    again = images(3, 2, order[::-1], workers=1)
    assert all(torch.equal(first[i], again[i]) for i in order)
    for other in (images(4, 2, order), images(3, 3, order)):
        assert not all(torch.equal(first[i], other[i]) for i in order)


@pytest.mark.parametrize("in_memory", [None, True, False])
def test_only_training_images_are_cropped_and_always_as_needed(root, in_memory):
    plain = opened(root=root, size=8)
    data = opened(root=root, size=8, random_resized_crop=Crop(), in_memory=in_memory)
    assert isinstance(data.train, FolderSplit)
    assert isinstance(data.test, FolderSplit if in_memory is False else TensorSplit)
    assert data.workers == 2
    assert all(torch.equal(data.test[i][0], plain.test[i][0]) for i in range(4))
    assert fingerprint(data.train) == fingerprint(plain.train)
    assert data.shape == plain.shape


def test_crops_as_a_recipe_gives_them(root):
    assert options(root="x", size=8, random_resized_crop={}).random_resized_crop == Crop()
    given = options(root="x", size=8, random_resized_crop={"scale": [0.2, 1], "ratio": [1, 1]}).random_resized_crop
    assert given == Crop((0.2, 1.0), (1.0, 1.0))
    for wrong in ({"scale": [1, 0.5]}, {"ratio": [0, 1]}, {"size": 8}):
        with pytest.raises(RecipeError, match=r"plugins\.image_folder\.random_resized_crop"):
            options(root="x", size=8, random_resized_crop=wrong)


def test_a_run_with_crops_trains_the_same_with_any_number_of_workers(root):
    crop = Crop((0.2, 1.0))
    runs = [
        run_steps({"image_folder": ImageFolder(root=root, size=8, random_resized_crop=crop, workers=workers)}, steps=3)
        for workers in (0, 2)
    ]
    for a, b in zip(*(parameters_of(run) for run in runs), strict=True):
        assert torch.equal(a, b)


# ---- options


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


def test_folders_of_classes_alone_are_divided_the_same_way_whatever_else_there_is(root):
    shutil.rmtree(root / "test")
    options = {"root": root / "train", "train": ".", "test_fraction": 0.25, "size": 8}
    data = opened(**options)
    assert (len(data.train), len(data.test), data.classes) == (9, 3, ("a", "b", "c"))
    assert list(data.test.targets) == [0, 1, 2]
    aside = {image.numpy().tobytes() for image in data.test.images}
    assert not aside & {image.numpy().tobytes() for image in data.train.images}
    shutil.copytree(root / "train" / "a", root / "train" / "d")
    more = opened(**options)
    assert aside < {image.numpy().tobytes() for image in more.test.images}
    with pytest.raises(DataError, match="class 'a' has 4 images, of which test_fraction leaves none"):
        opened(**{**options, "test_fraction": 0.9})


SPLITS = "path,label,split\n"


def table(root, text):
    (root / "labels.csv").write_text(text)
    return opened(root=root, table="labels.csv", size=8)


def test_a_table_names_files_labels_and_splits(root):
    rows = ["train/a/0.png,cat,train", "train/b/1.png,dog,train", "test/a/0.png,dog,val", "test/c/1.png,cat,test"]
    data = table(root, "\ufeff" + SPLITS + "\n".join(rows))
    assert data.classes == ("cat", "dog")
    for split, path, target in (
        ("train", "train/b/1.png", 1),
        ("validation", "test/a/0.png", 1),
        ("test", "test/c/1.png", 0),
    ):
        image, label = data.splits[split][len(data.splits[split]) - 1]
        assert label == target
        expected = Compose([Resize(8), CenterCrop(8), PILToTensor()])(Image.open(root / path))
        assert torch.equal(image, expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,label\n", "expected a first line with the columns path,label"),
        ("path,label\ntrain/a/0.png,\n", "line 2: expected a path, a label"),
        (
            "path,label,split\ntrain/a/0.png,cat,held\n",
            "line 2: .* a label and train, validation or test",
        ),
        ("path,label\n../secret.png,cat\n", "line 2: '../secret.png' leads out of"),
        ("path,label\n/etc/secret.png,cat\n", "leads out of"),
        (SPLITS + "train/a/0.png,cat,test\n", "it lists no training images"),
        (
            "path,label\ntrain/a/0.png,cat\ntrain/b/0.png,dog\n",
            "no test images; set .*test_fraction",
        ),
        (
            "path,label,split\ntrain/a/0.png,cat,train\ntrain/b/0.png,cat,test\n",
            "one class alone, 'cat'.*add rows",
        ),
        (
            "path,label,split\na.png,cat,train\nb.png,dog,train\nc.png,owl,test\n",
            "'owl' is a class of which",
        ),
        (SPLITS + "no.png,cat,train\ntrain/b/0.png,dog,train\ntest/a/0.png,cat,test\n", "no.png"),
    ],
)
def test_a_wrong_table_is_one_clear_error(root, text, said):
    with pytest.raises(DataError, match=said):
        table(root, text)
