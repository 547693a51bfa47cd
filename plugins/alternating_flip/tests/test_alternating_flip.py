import numpy as np
import pytest
import torch

from trainkit.rng import stream
from trainkit.testing import build_run, fake_data, run_steps, watch
from trainkit.transforms import Pipeline
from trainkit_alternating_flip import AlternatingFlip


def flips(run, epoch, indices=None):
    """Return whether each image is mirrored in an epoch, seen from what the network gets."""
    stored = run.data.train.images
    indices = torch.arange(len(stored)) if indices is None else indices
    plain = stored[indices]
    got = run.transforms["train"](plain, lambda name: stream(run.recipe.seed, name), indices, epoch)
    mirrored = (got == plain.flip(3).float() / 255).flatten(1).all(1)
    assert torch.equal(mirrored, ~(got == plain.float() / 255).flatten(1).all(1))
    return mirrored


def test_each_image_alternates_from_epoch_to_epoch():
    run = build_run({"alternating_flip": AlternatingFlip()})
    first = flips(run, 0)
    for epoch in range(1, 6):
        assert torch.equal(flips(run, epoch), first ^ (epoch % 2 == 1))


def test_in_the_first_epoch_half_of_the_images_are_mirrored_and_the_seed_decides_which():
    data = watch(data=lambda: fake_data(n=4000, size=4))
    one, same, other = (
        flips(build_run({"data": data, "alternating_flip": AlternatingFlip()}, seed=seed), 0) for seed in (1, 1, 2)
    )
    assert one.float().mean() == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(4000))
    assert torch.equal(one, same)
    assert (one == other).float().mean() == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(4000))


def test_an_images_coin_does_not_depend_on_its_batch():
    run = build_run({"alternating_flip": AlternatingFlip()})
    indices = torch.tensor([7, 3, 3, 31, 0])
    assert torch.equal(flips(run, 0, indices), flips(run, 0)[indices])


def test_a_run_shows_each_image_from_both_sides_in_two_epochs():
    seen = {}

    def note(run, batch):
        if run.split == "train":
            for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
                seen.setdefault(index, []).append(image)

    run = run_steps({"alternating_flip": AlternatingFlip(), "note": watch(forward_end=note)}, steps=8)
    assert sorted(seen) == list(range(len(run.data.train)))
    assert all(torch.equal(one, other.flip(2)) and not torch.equal(one, other) for one, other in seen.values())


def test_training_images_only():
    run = build_run({"alternating_flip": AlternatingFlip()})
    assert run.transforms["test"].steps == Pipeline([]).steps
    assert [name for name, _ in run.transforms["train"].steps] == ["alternating_flip/train"]
