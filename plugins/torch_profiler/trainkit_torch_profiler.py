"""Traces of single steps."""

from typing import ClassVar

from attrs import field
from attrs.validators import ge
from torch.profiler import ProfilerActivity, profile, schedule

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

__all__ = ["TorchProfiler"]


@plugin
class TorchProfiler:
    """Record some steps with torch.profiler as a trace for Perfetto or chrome://tracing.

    The trace is ``profile/trace.json`` in the run directory. It holds what ran on the CPU and, if the run is on a GPU,
    on the GPU. Recording slows down the steps that are recorded.

    Args:
        after: steps before recording starts, at least 1: the first ones allocate, tune and compile.
        steps: steps recorded; at least 1.
    """

    observer: ClassVar = True

    after: int = field(default=10, validator=ge(1))
    steps: int = field(default=3, validator=ge(1))
    _profile: profile | None = field(init=False, default=None)

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Start the profiler, which waits for its steps."""
        assert run.dir is not None
        path = run.dir.path / "profile" / "trace.json"

        def save(recorded: profile) -> None:
            path.parent.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(path))
            run.console.print(f"torch_profiler: {path}", markup=False, highlight=False, soft_wrap=True)

        activities = [ProfilerActivity.CPU]
        if run.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        phases = schedule(wait=self.after - 1, warmup=1, active=self.steps, repeat=1)
        self._profile = profile(activities=activities, schedule=phases, on_trace_ready=save)
        self._profile.start()

    @hookimpl
    def step_end(self) -> None:
        """Tell the profiler that a step is over."""
        if self._profile is not None:
            self._profile.step()

    @hookimpl
    def fit_end(self) -> None:
        """Stop the profiler, also where the run ended before all steps were recorded."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
