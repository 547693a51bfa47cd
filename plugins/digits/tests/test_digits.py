from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from trainkit.errors import DataError
from trainkit.testing import assert_refuses, build_run, run_steps
from trainkit_digits import Digits


def rows(split):
    """Images and targets as a sorted list, to compare as a multiset."""
    return sorted((image.numpy().tobytes(), int(t)) for image, t in zip(split.images, split.targets, strict=True))


def test_values_are_scaled_and_none_is_lost_or_twice():
    data = Digits().data()
    source = load_digits()
    images = np.array([[[round(v * 255 / 16) for v in row] for row in image] for image in source.images], np.uint8)
    expected = sorted((image.tobytes(), int(t)) for image, t in zip(images, source.target, strict=True))
    assert sorted(rows(data.train) + rows(data.test)) == expected
    assert (data.train.images.min(), data.train.images.max()) == (0, 255)


def test_scikit_learn_is_asked_where_its_file_lies_elsewhere(monkeypatch, tmp_path):
    found = Digits().data()
    monkeypatch.setattr("trainkit_digits.distribution", lambda name: SimpleNamespace(locate_file=tmp_path.joinpath))
    asked = Digits().data()
    for one, other in ((found.train, asked.train), (found.test, asked.test)):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


def test_shape_classes_and_counts():
    data = Digits().data()
    assert data.shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert data.train.images.shape == (1442, 1, 8, 8)
    assert data.test.images.shape == (355, 1, 8, 8)


def test_default_split_is_every_fifth_image_of_each_class():
    data, source = Digits().data(), load_digits()
    for digit in range(10):
        images = torch.from_numpy(source.data[source.target == digit])
        scaled = (images * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
        assert torch.equal(data.test.images[data.test.targets == digit], scaled[4::5])


@settings(max_examples=10)
@given(st.fractions(Fraction(1, 50), Fraction(49, 50), max_denominator=64))
def test_split_is_stratified(fraction):
    data = Digits(test_fraction=float(fraction)).data()
    total, test = (torch.bincount(t, minlength=10) for t in (torch.tensor(load_digits().target), data.test.targets))
    assert torch.equal(torch.bincount(data.train.targets, minlength=10) + test, total)
    for n, found in zip(total.tolist(), test.tolist(), strict=True):
        assert n * fraction - 1 - 1e-9 < found <= n * fraction + 1e-9


def test_split_does_not_depend_on_the_seed():
    a, b = (build_run({"digits": Digits()}, seed=seed).data for seed in (0, 1))
    assert torch.equal(a.train.images, b.train.images)
    assert torch.equal(a.test.targets, b.test.targets)


def test_fraction_lies_between_0_and_1():
    assert_refuses(Digits, "test_fraction", 0, 1, -0.1, 1.5)


def test_fraction_too_small_for_any_image():
    with pytest.raises(DataError, match="test split has no images"):
        Digits(test_fraction=0.001).data()


def test_trains():
    assert run_steps({"digits": Digits()}, steps=3, batch_size=64).step == 3
