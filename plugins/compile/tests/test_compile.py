from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from trainkit.errors import RecipeError, RunError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import build_run, parameters_of, run_steps
from trainkit_compile import Compile

WARNING = "compile: warning: compilation failed"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled_by(monkeypatch):
    """Replaces the slow code generator behind torch.compile; tracing, guards and differentiation stay torch's."""
    original = torch.compile

    def replace(backend):
        monkeypatch.setattr(torch, "compile", partial(original, backend=backend))

    return replace


class Counting:
    """Runs graphs as they are and counts them; fails from number `limit` on."""

    def __init__(self, limit=1000):
        self.graphs, self.limit = 0, limit

    def __call__(self, graph, inputs):
        if self.graphs == self.limit:
            raise RuntimeError("no compiler here\n\nand a long explanation")
        self.graphs += 1
        return graph.forward


@plugin
class SharedKernel:
    """A network in which two convolutions use one parameter, with batch normalization and, if wanted, a graph break."""

    breaks: bool = False

    @hookimpl
    def model(self):
        convs = [nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2)]
        convs[1].weight = convs[0].weight
        middle = [GraphBreak()] if self.breaks else []
        return nn.Sequential(
            convs[0], nn.BatchNorm2d(3), nn.ReLU(), *middle, convs[1], nn.Flatten(), nn.Linear(3 * 64, 4)
        )


class GraphBreak(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


def assert_same_run(run, expected):
    state = run.model.state_dict()
    assert list(state) == list(expected.model.state_dict())
    for name, value in expected.model.state_dict().items():  # with the statistics of batch normalization
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
    assert run.step == expected.step


@pytest.mark.slow
def test_torchs_compiler_trains_the_same_network():
    # without a C++ compiler this checks the way on without one
    run, expected = run_steps({"compile": Compile()}, steps=2), run_steps({}, steps=2)
    assert_same_run(run, expected)


@pytest.mark.parametrize("breaks", [False, True])
def test_shared_kernels_statistics_and_names_are_those_of_a_run_without_it(compiled_by, breaks):
    compiled_by("aot_eager")
    plugins = {"model": SharedKernel(breaks=breaks)}
    run = run_steps({**plugins, "compile": Compile()}, steps=8, epochs=2)
    assert_same_run(run, run_steps(plugins, steps=8, epochs=2))
    assert run.forward is not run.model
    assert len(parameters_of(run)) == 5


def test_training_and_evaluation_mode_reach_the_network(compiled_by):
    counting = Counting()
    compiled_by(counting)
    run = build_run({"model": SharedKernel(), "compile": Compile()})
    images = torch.rand(8, 3, 8, 8)
    for _ in range(2):
        for mode in (True, False):
            run.forward.train(mode)
            assert {m.training for m in run.model.modules()} == {mode}
            assert run.forward.training is mode
            statistics = run.model[1].running_mean.clone()
            output = run.forward(images)
            assert torch.equal(run.model[1].running_mean, statistics) is (not mode)
            torch.testing.assert_close(output, run.model(images))
    assert counting.graphs == 2  # one a mode, used again in the second round


@pytest.mark.parametrize(
    ("dynamic", "graphs"),
    # batches of 12, 12 and 8 for training, then 12 and 4 for testing, twice
    [(None, 3), (True, 2), (False, 4)],
)
def test_how_often_other_batch_sizes_compile(compiled_by, dynamic, graphs):
    counting = Counting()
    compiled_by(counting)
    run = run_steps({"compile": Compile(dynamic=dynamic)}, steps=6, epochs=2, batch_size=12)
    assert counting.graphs == graphs
    assert_same_run(run, run_steps({}, steps=6, epochs=2, batch_size=12))


@pytest.mark.parametrize("limit", [0, 1], ids=["at once", "in the first evaluation"])
def test_a_failing_compiler_is_said_once_and_training_goes_on(compiled_by, capsys, limit):
    counting = Counting(limit)
    compiled_by(counting)
    run = run_steps({"compile": Compile()}, steps=8, epochs=2)
    assert counting.graphs == limit
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "compile" in line)
    assert line.startswith(WARNING)
    assert "no compiler here" in line
    assert_same_run(run, run_steps({}, steps=8, epochs=2))


def test_a_compiler_that_fails_at_the_backward_pass_is_said_and_training_goes_on(compiled_by, capsys):
    def as_it_is(graph, inputs):
        return make_boxed_func(graph.forward)

    compiled_by(aot_autograd(fw_compiler=as_it_is, bw_compiler=Counting(limit=0)))
    run = run_steps({"compile": Compile()}, steps=8, epochs=2)
    assert capsys.readouterr().out.count(WARNING) == 1
    assert_same_run(run, run_steps({}, steps=8, epochs=2))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_graphs_that_overwrite_gradients_are_refused_where_several_batches_make_a_step(mode):
    gpu, batches = torch.device("cuda"), SimpleNamespace(device=torch.device("cuda"), batches_per_step=4)
    with pytest.raises(RecipeError, match=f"'mode': {mode} records CUDA graphs.*adds up those of 4; set default"):
        Compile(mode=mode).fit_start(batches)
    Compile(mode=mode).fit_start(SimpleNamespace(device=gpu, batches_per_step=1))
    Compile(mode=mode).fit_start(SimpleNamespace(device=torch.device("cpu"), batches_per_step=4))
    Compile(mode="max-autotune-no-cudagraphs").fit_start(batches)


def test_a_python_that_torch_cannot_compile_is_said_and_training_goes_on(monkeypatch, capsys):
    def refuse(*args, **options):
        raise RuntimeError("torch.compile is not supported on Python 9")

    monkeypatch.setattr(torch, "compile", refuse)
    run = run_steps({"compile": Compile()}, steps=2)
    assert run.forward is run.model
    assert f"{WARNING}, the run goes on without it: torch.compile is not supported" in capsys.readouterr().out


def test_an_error_of_the_network_itself_stays_its_own(compiled_by):
    compiled_by("aot_eager")
    run = build_run({"compile": Compile()})
    with pytest.raises(RuntimeError, match="channels"):
        run.forward(torch.rand(8, 5, 8, 8))


def test_fullgraph_makes_a_graph_break_an_error(compiled_by):
    compiled_by("aot_eager")
    run = build_run({"model": SharedKernel(breaks=True), "compile": Compile(fullgraph=True)})
    with pytest.raises(RunError, match="'fullgraph': the network cannot be compiled as one graph.*fullgraph: false"):
        run.forward(torch.rand(8, 3, 8, 8))


def test_options_are_torchs(monkeypatch):
    seen = {}
    monkeypatch.setattr(torch, "compile", lambda model, **options: seen.update(options) or model)
    build_run({"compile": Compile(mode="max-autotune", dynamic=False, fullgraph=True)})
    assert seen == {"mode": "max-autotune", "dynamic": False, "fullgraph": True}
