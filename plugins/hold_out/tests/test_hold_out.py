import io
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sklearn.utils.extmath import _approximate_mode

from trainkit.build import build_with
from trainkit.data import Subset, TensorSplit
from trainkit.errors import RecipeError
from trainkit.hooks import LoadedPlugin, register
from trainkit.plugin import hookimpl, plugin
from trainkit.provenance import fingerprint
from trainkit.recipe import Recipe
from trainkit.testing import build_run, fake_data, run_steps
from trainkit_hold_out import HoldOut, shares


class Lazy:
    """Decodes as needed; image i holds the value i."""

    def __init__(self, targets, tells=True):
        self.of = targets
        self.decoded = 0
        if tells:
            self.targets = targets

    def __len__(self):
        return len(self.of)

    def __getitem__(self, index):
        self.decoded += 1
        return torch.full((3, 8, 8), index, dtype=torch.uint8), self.of[index]


@plugin
class Given:
    """Given training images."""

    train: Any
    validation: Any = None
    workers: int = 0

    @hookimpl
    def data(self):
        data = fake_data()
        return data.replace(train=self.train, validation=self.validation, workers=self.workers)


def in_memory(targets):
    images = torch.arange(len(targets), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    return TensorSplit(images.contiguous(), torch.tensor(targets))


def held(split, seed=0, **options):
    """Return which images stay and which are held out, by the value that each holds."""
    run = SimpleNamespace(recipe=SimpleNamespace(seed=seed), console=Console(file=io.StringIO()))
    data = HoldOut(**options).transform_data(run, fake_data().replace(train=split))
    return [[int(part[i][0][0, 0, 0]) for i in range(len(part))] for part in (data.train, data.validation)]


class_counts = st.lists(st.integers(4, 20), min_size=1, max_size=6)


@given(class_counts, st.integers(0, 2**31))
def test_shares_are_scikit_learns_but_for_ties(counts, seed):
    total = seed % sum(counts)
    theirs = _approximate_mode(np.array(counts), total, np.random.RandomState(seed))
    ours = shares(total, counts)
    assert sum(ours) == total
    remainders = [total * count % sum(counts) for count in counts]
    for mine, other, remainder in zip(ours, theirs, remainders, strict=True):
        # which of two classes with equal remainders gets one more is drawn there
        assert mine == other or remainders.count(remainder) > 1


@given(class_counts, st.floats(0.05, 0.6), st.booleans(), st.booleans(), st.integers(0, 5))
def test_the_splits_are_a_partition_with_the_same_share_of_each_class(counts, fraction, lazy, per_class, seed):
    targets = np.random.default_rng(seed).permutation(np.repeat(range(len(counts)), counts)).tolist()
    total = max(round(fraction * len(targets)), 1)
    given = {"fraction": fraction} if fraction * len(targets) > 0.5 else {"count": total}
    kept = targets if per_class else [float(target) for target in targets]  # no class can be left without images then
    train, validation = held(Lazy(kept) if lazy else in_memory(kept), per_class=per_class, seed=seed, **given)
    assert sorted(train + validation) == list(range(len(targets)))
    assert train == sorted(train)
    assert validation == sorted(validation)
    assert len(validation) == total
    if per_class:
        for label, count in enumerate(counts):
            exact = total * count / len(targets)
            found = sum(targets[i] == label for i in validation)
            assert exact - 1 < found < exact + 1


def test_each_image_is_held_out_equally_often():
    targets = [0] * 12 + [1] * 4
    times = np.zeros(16)
    for seed in range(400):
        _, validation = held(in_memory(targets), seed=seed, count=4)
        assert [targets[i] for i in validation] == [0, 0, 0, 1]
        times[validation] += 1
    assert np.abs(times / 400 - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 400)


def test_the_seed_alone_chooses_the_images():
    split = in_memory([0, 1] * 20)
    first, again, other = (held(split, seed=seed, fraction=0.2) for seed in (3, 3, 4))
    assert first == again != other
    run = build_run({"data": Given(train=split), "hold_out": HoldOut(fraction=0.2, seed=3)}, seed=5)
    assert run.data.validation.images[:, 0, 0, 0].tolist() == first[1]


def test_a_split_in_memory_and_one_that_is_decoded_hold_the_same_images_out():
    targets = np.random.default_rng(0).integers(0, 3, 60).tolist()
    assert held(in_memory(targets), count=9) == held(Lazy(targets), count=9) == held(Lazy(targets, False), count=9)


def test_a_decoded_split_stays_so_and_goes_to_workers():
    split = Lazy([0, 1, 2, 3] * 8)
    run = run_steps({"data": Given(train=split, workers=1), "hold_out": HoldOut(count=8)}, steps=3, batch_size=12)
    assert isinstance(run.data.train, Subset)
    assert run.data.workers == 1
    assert split.decoded <= 2  # to see what the targets are; the rest in the worker
    again = pickle.loads(pickle.dumps(run.data.validation))
    assert torch.equal(again[3][0], run.data.validation[3][0])
    prints = [fingerprint(part) for part in (run.data.train, run.data.validation, again)]
    assert prints[0] != prints[1] == prints[2]


def test_targets_that_cannot_be_told_are_decoded_once_with_a_note():
    split, console = Lazy([0, 1] * 8, tells=False), Console(file=io.StringIO(), width=200)
    options = {"name": "r", "epochs": 1, "batch_size": 8, "device": "cpu"}
    loaded = [LoadedPlugin("data", Given(train=split)), LoadedPlugin("hold_out", HoldOut(count=4))]
    with pytest.raises(Exception, match="model"):  # nothing else is listed
        build_with(Recipe(**options), register(loaded), console)
    assert console.file.getvalue().startswith("hold_out: decodes all 16 training images for their classes")
    assert split.decoded == 17


def test_it_selects_by_the_held_out_images_and_tests_once():
    run = run_steps({"hold_out": HoldOut(fraction=0.25)}, steps=3)
    assert run.selection_split == "validation"
    assert (len(run.data.train), len(run.data.validation)) == (24, 8)
    assert torch.equal(run.data.test.images, fake_data().test.images)


@pytest.mark.parametrize(
    ("split", "options", "said"),
    [
        (in_memory([0] * 9 + [1]), {"count": 9}, "class 'class 1' has 1 training images, and all"),
        (in_memory([0, 1, 2, 3]), {"count": 3, "per_class": False}, "1 training images, and all of them would be"),
        (Lazy([0] * 8 + [1]), {"fraction": 0.7}, r"class 'class 1' has 1 training images, and all of them"),
        (in_memory([0, 1] * 4), {"count": 8}, r"'count': 8 of the 8 training images would be held out"),
        (in_memory([0, 1] * 4), {"fraction": 0.01}, r"'fraction': 0 of the 8 training images"),
        (in_memory([0.5, 1.5]), {"count": 1}, r"'per_class': the data's targets are no classes but float32 \[\]"),
        (Lazy([0.5, 1.5]), {"count": 1}, r"no classes but float.*per_class=false"),
    ],
)
def test_what_cannot_be_held_out_is_refused(split, options, said):
    with pytest.raises(RecipeError, match=said):
        held(split, **options)


def test_targets_of_any_kind_are_held_out_without_classes():
    train, validation = held(in_memory([0.5, 1.5, 2.5]), count=1, per_class=False)
    assert sorted(train + validation) == [0, 1, 2]


def test_a_second_validation_split_is_refused():
    given = Given(train=in_memory([0, 1] * 8), validation=in_memory([0, 1, 2]))
    with pytest.raises(RecipeError, match="'hold_out', transform_data: the data have a validation split of 3 images"):
        build_run({"data": given, "hold_out": HoldOut(count=1)})


@pytest.mark.parametrize("options", [{}, {"fraction": 0.1, "count": 3}])
def test_either_fraction_or_count(options):
    with pytest.raises(ValueError, match="either 'fraction' or 'count'"):
        HoldOut(**options)


@pytest.mark.parametrize("options", [{"fraction": 0}, {"fraction": 1}, {"fraction": float("nan")}, {"count": 0}])
def test_wrong_values_name_the_option(options):
    with pytest.raises(ValueError, match=f"'{next(iter(options))}'"):
        HoldOut(**options)
