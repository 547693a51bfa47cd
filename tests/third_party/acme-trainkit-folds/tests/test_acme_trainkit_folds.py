import pytest
import torch
from acme_trainkit_folds import Folds

from trainkit import Data
from trainkit.errors import TrainkitError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import assert_conforms, assert_refuses, build_run, fake_data, run_steps, watch


class Lazy:
    """A split that is not in memory; reading an image says so."""

    def __init__(self, split):
        self.split, self.targets = split, split.targets

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        return self.split[index]


@plugin
class LazyData:
    """Data that are decoded one by one."""

    @hookimpl
    def data(self):
        data = fake_data()
        return Data(train=Lazy(data.train), test=Lazy(data.test), classes=data.classes, shape=data.shape)


def pixels(split):
    return {split[i][0].numpy().tobytes() for i in range(len(split))}


@pytest.mark.parametrize("data", [{}, {"data": LazyData()}], ids=["tensors", "lazy"])
def test_the_folds_are_all_training_images_each_once(data):
    every = build_run(data).data.train
    runs = [build_run({**data, "folds": Folds(fold=i, folds=4)}, seed=i).data for i in range(4)]
    assert [len(run.validation) for run in runs] == [8] * 4
    folds = [pixels(run.validation) for run in runs]
    assert set.union(*folds) == pixels(every)
    for run, fold in zip(runs, folds, strict=True):
        assert pixels(run.train) == pixels(every) - fold


def test_each_fold_has_its_share_of_each_class():
    for i in range(4):
        validation = build_run({"folds": Folds(fold=i, folds=4)}).data.validation
        assert torch.bincount(validation.targets).tolist() == [2, 2, 2, 2]


def test_the_validation_split_selects_and_the_test_split_is_evaluated_once():
    splits = []
    note = watch(metrics=lambda run, split: splits.append((run.epoch, split)))
    run = run_steps({"folds": Folds(fold=1, folds=4), "watch": note}, steps=6, epochs=2)
    assert run.selection_split == "validation"
    assert splits == [(0, "train"), (0, "validation"), (1, "train"), (1, "validation"), (2, "test")]


def test_it_keeps_the_promises_of_every_plugin():
    assert_conforms(Folds, fold=1, folds=4)


def test_wrong_options_are_refused():
    assert_refuses(Folds, "fold")
    assert_refuses(Folds, "fold", -1, 5)
    assert_refuses(Folds, "folds", 1, fold=0)
    assert_refuses(Folds, "fold", 3, folds=3)


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(TrainkitError, match="32 training images"):
        build_run({"folds": Folds(fold=0, folds=33)})
    with pytest.raises(TrainkitError, match="validation"):
        build_run({"a": Folds(fold=0), "b": Folds(fold=0)})
