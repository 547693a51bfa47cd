import json

from trainkit.testing import assert_refuses, run_steps
from trainkit_torch_profiler import TorchProfiler


def trace(folder):
    return json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]


def test_the_trace_holds_the_steps_asked_for(tmp_path):
    run_steps({"p": TorchProfiler(after=2, steps=3)}, steps=8, run_dir=tmp_path)
    events = trace(tmp_path)
    assert {e["name"] for e in events if e["name"].startswith("ProfilerStep")} == {
        f"ProfilerStep#{n}" for n in (2, 3, 4)
    }
    assert sum(e["name"] == "aten::nll_loss_backward" for e in events) == 3  # test batches have no backward


def test_a_run_that_ends_early_keeps_what_was_recorded(tmp_path):
    run_steps({"p": TorchProfiler(after=1, steps=100)}, steps=4, run_dir=tmp_path)
    assert any(e["name"] == "aten::cross_entropy_loss" for e in trace(tmp_path))


def test_counts_begin_at_one():
    assert_refuses(TorchProfiler, "after", 0)
    assert_refuses(TorchProfiler, "steps", 0)
