import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit import Batch, Metric
from trainkit.data import Batches, TensorSplit
from trainkit.errors import PluginError, RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.processes import Processes
from trainkit.testing import build_run
from trainkit.trainer import Trainer
from trainkit_random_crop import RandomCrop

CPU = torch.device("cpu")


class Pretended(Processes):
    """One of several processes; the others say what they are given."""

    def __init__(self, rank, world, others=()):
        self.rank, self.world, self.others = rank, world, others

    def any(self, flag):
        return flag or any(other is not None for other in self.others)

    def all_gather(self, value):
        return [value, *self.others]


class Plain(list):
    """A split that is decoded."""

    def __init__(self, n):
        super().__init__((torch.full((1, 2, 2), i, dtype=torch.uint8), i) for i in range(n))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.integers(0, 2), st.booleans(), st.randoms())
def test_shares_of_every_batch_are_disjoint_and_complete(n, batch_size, world, start, in_memory, random):
    order = torch.tensor(random.sample(range(n), n))
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2)
    split = TensorSplit(images, torch.arange(n)) if in_memory else Plain(n)

    def batches(processes, **options):
        return list(Batches(split, batch_size, CPU, processes=processes).iterate(order, start, **options))

    whole = batches(Processes())
    seen: dict[int, list[int]] = {}
    for rank in range(world):
        for batch in batches(Pretended(rank, world)):
            first, total = batch.share or (0, len(batch))
            assert batch.targets.tolist() == batch.indices.tolist() == batch.images[:, 0, 0, 0].tolist()
            number = order.tolist().index(int(batch.indices[0])) // batch_size - start
            assert total == len(whole[number])
            assert torch.equal(batch.indices, whole[number].indices[first : first + len(batch)])
            seen.setdefault(number, []).extend(batch.indices.tolist())
    assert [seen[number] for number in range(len(whole))] == [batch.indices.tolist() for batch in whole]
    assert [b.indices.tolist() for b in batches(Pretended(0, world), whole=True)] == [b.indices.tolist() for b in whole]


@plugin
class Drawing:
    """Draws in a hook of a batch."""

    @hookimpl
    def transform_batch(self, run, batch):
        batch.images = batch.images + float(run.rng("drawing").random())
        return batch


def test_an_image_is_augmented_alike_in_every_process_and_batches_draw_for_themselves():

    crop = RandomCrop(size=8, padding=2)
    run = build_run({"random_crop": crop})
    pipeline, indices = run.transforms["train"], torch.arange(6)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    whole = pipeline(images, run.rng, indices)
    parts = [pipeline(images[i : i + 2], run.rng, indices[i : i + 2], share=(i, 6)) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)


def test_streams_differ_between_processes_within_a_batch_alone():
    drawn, elsewhere = [], []
    for rank in (0, 1):
        run = build_run({"drawing": Drawing()})
        run.processes = Pretended(rank, 2)
        images = torch.zeros(2, *run.data.shape, dtype=torch.uint8)
        batch = run.prepare(Batch(images, torch.zeros(2, dtype=torch.int64), share=(2 * rank, 4)))
        drawn.append(float(batch.images.flatten()[0]))
        elsewhere.append(run.rng("drawing").random())
    assert drawn[0] != drawn[1]
    assert elsewhere[0] == elsewhere[1]


@plugin
class Partial:
    """Reports what one process sees."""

    @hookimpl
    def metrics(self, split):
        return {"seen": Metric(3.0)}


def test_a_metric_of_one_process_alone_is_refused():
    run = build_run({"partial": Partial()})
    run.processes = Pretended(0, 2, [{"test_seen": 4.0}])
    with pytest.raises(PluginError, match="test_seen is 3.0 in process 0 and 4.0 in process 1.*all_reduce"):
        Trainer(run).metrics("test")
    run.processes = Pretended(0, 2, [{"test_seen": 3.0}])
    assert Trainer(run).metrics("test")["test_seen"].value == 3.0


def test_who_is_asked_to_stop_stops_when_all_know():
    run = build_run({})
    run.processes = Pretended(0, 2, [None])
    run.stop("SIGTERM", exit_code=143)
    assert not run.is_stopping()
    run.agree()
    assert (run.stop_reason, run.exit_code, run.ended) == ("SIGTERM", 143, None)
    other = build_run({})
    other.processes = Pretended(0, 2, [("early", 0, True)])
    other.agree()
    assert (other.stop_reason, other.exit_code, other.ended) == ("early", 0, "early")


def test_one_of_several_processes_needs_a_plugin_that_joins_them(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"one of 2 processes \(WORLD_SIZE\).*plugins.ddp="):
        build_run({})


@given(st.integers(0, 1000), st.integers(1, 9))
def test_shares_differ_by_one_at_most(images, world):
    parts = [Pretended(rank, world).share(images) for rank in range(world)]
    assert np.concatenate([np.arange(images)[part] for part in parts]).tolist() == list(range(images))
    sizes = {part.stop - part.start for part in parts}
    assert max(sizes) - min(sizes) <= 1
