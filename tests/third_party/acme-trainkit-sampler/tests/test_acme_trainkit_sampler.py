import pytest
import torch
from acme_trainkit_sampler import Sampler
from torch.nn.functional import cross_entropy

from trainkit.testing import assert_conforms, assert_refuses, build_run, run_steps, watch


def orders(sampler, epochs=3, **recipe):
    """Train and return the images of each epoch, as they came."""
    seen = {}
    note = watch(forward_end=lambda run, batch: run.split == "train" and seen.setdefault(run.epoch, []).append(batch))
    steps = epochs * build_run({"sampler": sampler}).steps_per_epoch
    run_steps({"sampler": sampler, "watch": note}, steps=steps, epochs=epochs, **recipe)
    return [torch.cat([batch.indices for batch in batches]).tolist() for batches in seen.values()]


def test_an_epoch_has_a_part_of_the_images_each_once():
    for order in orders(Sampler(fraction=0.5)):
        assert len(order) == len(set(order)) == 16


def test_hard_images_are_preferred():
    sampler = Sampler(fraction=1.0)
    run = run_steps({"sampler": sampler}, steps=4)
    losses = torch.arange(32.0)
    sampler.load_state_dict({"losses": losses, "drawn_by": losses})
    sampler.fraction, run.epoch = 0.25, 2
    drawn = []
    for epoch in range(2, 202):
        run.epoch = epoch
        drawn.append(sampler.epoch_order(run))
    counts = torch.cat(drawn).bincount(minlength=32)
    assert counts[24:].sum() > 4 * counts[:8].sum()


def test_the_last_loss_of_each_image_is_kept():
    expected = torch.full((32,), -1.0)

    def note(run, batch, output):
        if run.split == "train":
            expected[batch.indices] = cross_entropy(output.detach(), batch.targets, reduction="none")

    sampler = Sampler()
    run_steps({"sampler": sampler, "watch": watch(forward_end=note)}, steps=4, epochs=2)
    torch.testing.assert_close(sampler.state_dict()["losses"], expected)


def test_images_that_were_never_seen_come_next():
    first, second = orders(Sampler(fraction=0.5, power=50.0, warmup=1), epochs=2)
    assert len(set(first) & set(second)) < 6  # unseen ones count as the hardest: 8 would be expected by chance


def test_it_keeps_the_promises_of_every_plugin():
    assert_conforms(Sampler, fraction=0.5, warmup=0)


@pytest.mark.parametrize(("key", "value"), [("fraction", 0), ("fraction", 1.5), ("power", -1), ("warmup", -1)])
def test_wrong_options_are_refused(key, value):
    assert_refuses(Sampler, key, value)
