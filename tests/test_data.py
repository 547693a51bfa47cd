import pickle
import random
import subprocess
import sys
from time import perf_counter, sleep
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data import Batches, Data, TensorSplit, class_targets, epoch_permutation, subset
from trainkit.errors import DataError, RunError
from trainkit.provenance import fingerprint
from trainkit.testing import build_run

CPU = torch.device("cpu")


class Decoded:
    """A map-style split that is not in memory; image i holds the value i."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.full((3, 2, 2), index, dtype=torch.uint8), index % 10


def in_memory(n):
    pairs = [Decoded(n)[i] for i in range(n)]
    return TensorSplit(torch.stack([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs]))


def collected(batches):
    return [(batch.images.tolist(), batch.targets.tolist()) for batch in batches]


@given(st.integers(1, 40), st.integers(1, 15), st.data())
def test_batches_from_any_position_are_the_rest_of_all_batches(n, batch_size, data):
    batches = Batches(in_memory(n), batch_size, CPU)
    indices = epoch_permutation(0, 0, n)
    everything = collected(batches.iterate(indices))
    assert len(everything) == len(batches)
    assert sum(len(targets) for _, targets in everything) == n
    start = data.draw(st.integers(0, len(batches)))
    assert collected(batches.iterate(indices, start)) == everything[start:]


@settings(max_examples=25)
@given(st.integers(1, 30), st.integers(1, 12), st.booleans(), st.integers(0, 3))
def test_decoded_splits_give_the_batches_of_those_in_memory(n, batch_size, shuffled, start):
    indices = epoch_permutation(1, 2, n) if shuffled else None
    memory, decoded = Batches(in_memory(n), batch_size, CPU), Batches(Decoded(n), batch_size, CPU)
    start = min(start, len(memory))
    assert collected(decoded.iterate(indices, start)) == collected(memory.iterate(indices, start))


@pytest.mark.parametrize(
    ("error", "died"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
        (EOFError(), True),
        (ConnectionResetError("Connection reset by peer"), True),
        (RuntimeError("out of memory"), False),
    ],
)
def test_a_dead_worker_is_told_from_other_failures(error, died):
    class Loader:
        batch_sampler = SimpleNamespace()

        def __iter__(self):
            raise error

    batches = Batches(Decoded(4), 2, CPU, workers=2)
    batches._loader = Loader()
    with pytest.raises(RunError if died else type(error)) as caught:
        list(batches.iterate())
    assert ("a process that decodes images died" in str(caught.value)) == died


class Failing(Decoded):
    def __init__(self, error):
        super().__init__(4)
        self.error = error

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("cat.png: cannot be decoded; replace it"), "cat.png: cannot be decoded; replace it"),
        (ValueError("no such colour"), "reading images failed: ValueError: no such colour"),
        (OSError(5, "Input/output error"), "reading images failed: OSError: [Errno 5] Input/output error"),
        (EOFError("half an image\nof two"), "reading images failed: EOFError: half an image of two"),
        (KeyError("cat"), "reading images failed: KeyError: 'cat'"),
    ],
)
def test_an_error_of_a_worker_is_told_without_its_traceback(error, said):
    batches = Batches(Failing(error), 2, CPU, workers=1)
    with pytest.raises(DataError) as caught:
        list(batches.iterate())
    batches.close()
    assert str(caught.value) == said
    assert "Original Traceback" in str(caught.value.__cause__)


def test_an_error_in_this_process_stays_what_it_is():
    error = ValueError("no such colour")
    with pytest.raises(ValueError, match="no such colour") as caught:
        list(Batches(Failing(error), 2, CPU).iterate())
    assert caught.value is error
    assert error.__cause__ is None


def test_workers_outlive_an_epoch_and_keep_the_order():
    batches = Batches(Decoded(23), 5, CPU, workers=2)
    for epoch in range(2):
        indices = epoch_permutation(0, epoch, 23)
        assert [t for b in batches.iterate(indices) for t in b.images[:, 0, 0, 0].tolist()] == indices.tolist()


class Draws:
    """Draws from every global generator for each image, as a user's data set with random crops of its own does."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        drawn = [torch.rand(()).item(), np.random.rand(), random.random(), index / 12]
        return torch.tensor([255 * value for value in drawn]).to(torch.uint8).view(1, 2, 2), index % 10


def images(batches, order, start=0, epoch=0):
    found = [image for batch in batches.iterate(torch.tensor(order), start, epoch) for image in batch.images.tolist()]
    batches.close()
    return found


ORDER = [3, 7, 3, 0, 11, 3, 5, 9]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_image_is_drawn_alike_wherever_it_is_decoded(workers):
    whole = images(Batches(Draws(), 3, CPU), ORDER)
    batches = Batches(Draws(), 3, CPU, workers=workers)
    assert images(batches, ORDER) == whole
    for start in (1, 2):  # resumed inside the epoch; what was drawn before counts as repetitions
        assert images(batches, ORDER, start) == whole[3 * start :]
    first, second, third = (whole[n] for n, index in enumerate(ORDER) if index == 3)
    assert first != second != third != first
    assert whole[1] != images(batches, ORDER, epoch=1)[1]
    assert whole[1] != images(Batches(Draws(), 3, CPU, seed=1), ORDER)[1]
    assert whole[1] != images(Batches(Draws(), 3, CPU, name="test"), ORDER)[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_as_before_after_a_pass(workers):
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = state()
    images(Batches(Draws(), 3, CPU, workers=workers), ORDER)
    assert state() == before


@pytest.mark.parametrize(
    ("image", "target", "said"),
    [
        (torch.zeros(1, 2, 2), 0, "image 0 of the test split must be uint8 .C, H, W., not float32 .1, 2, 2."),
        (torch.zeros(2, 2, dtype=torch.uint8), 0, "not uint8 .2, 2."),
        ("picture", 0, "must be uint8 .C, H, W., not str"),
        (torch.zeros(1, 2, 2, dtype=torch.uint8), "cat", "the target of image 0 of the test split must be a class or"),
    ],
)
def test_what_a_split_gives_is_checked(image, target, said):
    class Wrong(Decoded):
        def __getitem__(self, index):
            return image, target

    with pytest.raises(DataError, match=said):
        next(Batches(Wrong(4), 2, CPU, name="test").iterate())


@pytest.mark.parametrize(
    ("target", "dtype", "shape"),
    [
        (3, torch.int64, ()),
        (np.int64(3), torch.int64, ()),
        (0.5, torch.float32, ()),
        (torch.ones(4), torch.float32, (4,)),
    ],
)
def test_targets_of_any_shape_are_stacked(target, dtype, shape):
    class Any(Decoded):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], target

    data = Data(train=Any(4), test=in_memory(2), classes=(), shape=(3, 2, 2))
    batch = next(Batches(data.train, 2, CPU).iterate())
    assert (batch.targets.dtype, batch.targets.shape) == (dtype, (2, *shape))
    assert data.has_class_targets == (dtype == torch.int64)


def test_a_data_set_has_its_splits_by_name():
    one, two = in_memory(2), in_memory(3)
    data = Data(train=two, test=one, more={"corrupted": one}, classes=("a",), shape=(3, 2, 2))
    assert list(data.splits) == ["train", "test", "corrupted"]
    assert list(data.replace(validation=one).splits) == ["train", "validation", "test", "corrupted"]
    assert data.replace(train=one).train is one
    assert two.subset(torch.tensor([2, 0])).images[:, 0, 0, 0].tolist() == [2, 0]


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 200))
def test_order_is_a_permutation_and_a_function_of_seed_and_epoch(seed, epoch, n):
    assert sorted(epoch_permutation(seed, epoch, n).tolist()) == list(range(n))
    assert torch.equal(epoch_permutation(seed, epoch, n), epoch_permutation(seed, epoch, n))
    if n > 30:
        assert not torch.equal(epoch_permutation(seed, epoch, n), epoch_permutation(seed, epoch + 1, n))


@pytest.mark.parametrize(
    ("images", "targets", "said"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), r"uint8 \[N, C, H, W\], not float32"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"not uint8 \[2, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"\[2, ...\], not int64 \[3\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [0, 1], r"targets must be a tensor .*, not list"),
    ],
)
def test_tensors_of_the_wrong_form_are_refused(images, targets, said):
    with pytest.raises(DataError, match=said):
        TensorSplit(images, targets)


def test_an_empty_split_is_refused():
    with pytest.raises(DataError, match="test split has no images"):
        Data(train=in_memory(2), test=Decoded(0), classes=("a",), shape=(3, 2, 2))


class WithTargets(Decoded):
    """Tells its targets, so that nothing need be decoded for them."""

    def __init__(self, targets):
        super().__init__(len(targets))
        self.targets = targets

    def __getitem__(self, index):
        return torch.zeros(1, 1, 1, dtype=torch.uint8), self.targets[index]


@given(st.integers(1, 20), st.data())
def test_a_subset_of_any_split_is_its_images_in_the_order_of_the_indices(n, data):
    indices = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=30)))
    for split in (in_memory(n), Decoded(n)):
        part = pickle.loads(pickle.dumps(subset(split, indices)))
        assert [int(part[i][0][0, 0, 0]) for i in range(len(part))] == indices.tolist()
        assert class_targets(part).tolist() == [i % 10 for i in indices.tolist()]


def test_a_subset_is_identified_by_the_whole_split_and_its_indices():
    splits = [subset(Decoded(n), torch.tensor(i)) for n, i in [(5, [0, 1]), (5, [1, 0]), (6, [0, 1]), (5, [0, 1])]]
    first, *different, again = map(fingerprint, splits)
    assert first == again
    assert first not in different


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_targets_that_a_split_tells_are_taken_without_decoding(kind, monkeypatch):
    split = WithTargets(kind([2, 0, 1]))
    monkeypatch.setattr(WithTargets, "__getitem__", lambda split, index: pytest.fail("decoded"))
    assert class_targets(split).tolist() == [2, 0, 1]
    assert class_targets(subset(split, torch.tensor([2, 0]))).tolist() == [1, 2]


@pytest.mark.parametrize("targets", [[0.5, 1.5], [torch.tensor([0, 1]), torch.tensor([1, 1])], torch.zeros(2, 3)])
def test_targets_that_are_no_classes_are_told_from_classes(targets):
    assert class_targets(WithTargets(targets)) is None


def test_as_many_targets_as_images():
    split = WithTargets([0, 1])
    split.targets = [0, 1, 2]
    with pytest.raises(DataError, match="2 images and 3 targets"):
        class_targets(split)


def test_the_time_of_waiting_for_a_batch_is_the_time_of_decoding():
    class Slow(Decoded):
        def __getitem__(self, index):
            sleep(0.02)
            return super().__getitem__(index)

    batches, start = Batches(Slow(4), 2, CPU), perf_counter()
    for _ in batches.iterate():
        assert start < batches.asked < batches.arrived - 0.04
        assert batches.arrived <= perf_counter()
        sleep(0.05)  # of the step, which is not waited for


def test_a_pass_outside_of_the_loop_has_the_order_of_the_epoch():
    run = build_run({})
    seen = torch.cat([batch.indices for batch in run.iterate("train")])
    assert torch.equal(seen, epoch_permutation(0, 0, 32))


def test_a_given_digest_identifies_a_split_and_its_parts():
    images, targets = torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.arange(6)
    plain, given_one = TensorSplit(images, targets), TensorSplit(images, targets, digest="of the files")
    assert given_one.fingerprint() == given_one.to(torch.device("cpu")).fingerprint() == "of the files"
    assert plain.fingerprint() == TensorSplit(images.clone(), targets).fingerprint() != "of the files"

    class Lazy:
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return images[index], int(targets[index])

        def fingerprint(self):
            return "of the files"

    indices = torch.tensor([4, 0, 5])
    assert subset(given_one, indices).fingerprint() == subset(Lazy(), indices).fingerprint()
    assert subset(given_one, indices.flip(0)).fingerprint() != subset(given_one, indices).fingerprint()


EXITS = """
import torch
from trainkit.data import Batches

class Fails:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return (torch.zeros(3, 2, 2, dtype=torch.uint8), 0) if index != 30 else 1 / 0

batches = Batches(Fails(), 2, torch.device("cpu"), workers=2)
try:
    list(batches.iterate())
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.slow
def test_a_process_whose_workers_are_still_at_work_ends():
    done = subprocess.run([sys.executable, "-c", EXITS], capture_output=True, text=True, timeout=40, check=False)
    assert (done.returncode, done.stdout) == (0, "DataError\n"), done.stderr


def test_looking_at_the_kind_of_targets_moves_no_generator():
    class Draws:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.randint(0, 256, (3, 2, 2)).to(torch.uint8), torch.rand(3)

    data = Data(train=Draws(), test=Draws(), classes=("a", "b", "c"), shape=(3, 2, 2))
    before = torch.get_rng_state()
    assert not data.has_class_targets
    assert torch.equal(data.first_target, data.first_target)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_kind_of_targets_is_told_without_decoding():
    class Lazy:
        targets = (0, 1)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise AssertionError("decoded")

    assert Data(train=Lazy(), test=Lazy(), classes=("a", "b"), shape=(3, 2, 2)).has_class_targets
