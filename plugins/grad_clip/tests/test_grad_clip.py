import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.testing import assert_refuses, parameters_of, run_steps
from trainkit_grad_clip import GradClip


class Parameters:
    def __init__(self, gradients):
        self.model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(len(g))) for g in gradients])
        for parameter, gradient in zip(self.model, gradients, strict=True):
            parameter.grad = torch.tensor(gradient, dtype=torch.float32)

    def gradients(self):
        return torch.cat([p.grad for p in self.model])


vectors = st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5), min_size=1, max_size=3)


@given(vectors, st.floats(0.01, 10))
def test_value_bounds_each_element_and_keeps_the_rest(gradients, limit):
    run = Parameters(gradients)
    before = run.gradients().clone()
    GradClip(limit=limit).gradients_ready(run)
    assert torch.equal(run.gradients(), before.clamp(-limit, limit))


@given(vectors, st.floats(0.01, 10))
def test_norm_scales_all_gradients_together(gradients, limit):
    run = Parameters(gradients)
    before = run.gradients().double()
    GradClip(limit=limit, mode="norm").gradients_ready(run)
    scale = min(1.0, limit / (float(before.square().sum().sqrt()) + 1e-6))  # torch's own epsilon
    torch.testing.assert_close(run.gradients().double(), before * scale, rtol=1e-5, atol=1e-6)


def test_parameters_move_at_most_by_learning_rate_times_limit():
    free, clipped = run_steps({}, steps=1), run_steps({"grad_clip": GradClip(limit=1e-3)}, steps=1)
    start = run_steps({"grad_clip": GradClip(limit=1e-30)}, steps=1)
    move = max(float((a - b).abs().max()) for a, b in zip(parameters_of(clipped), parameters_of(start), strict=True))
    unclipped = max(float((a - b).abs().max()) for a, b in zip(parameters_of(free), parameters_of(start), strict=True))
    assert move == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert unclipped > move


def test_limit_must_be_positive():
    assert_refuses(GradClip, "limit", 0, -1)
