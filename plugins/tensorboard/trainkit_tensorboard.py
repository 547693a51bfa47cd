"""Records for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import field

from trainkit import Run
from trainkit.plugin import hookimpl, plugin

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoard"]

FOLDER = "tensorboard"
POSITION = ("epoch", "step")  # of a record; all else in it is a value


@plugin
class TensorBoard:
    """Write every record for TensorBoard, by metric and split.

    ``tensorboard --logdir runs`` shows all runs below a folder. A value ``test_accuracy`` is the curve ``test`` in the
    chart ``accuracy``. The steps are optimizer steps. A run that is resumed goes on where its checkpoint lies: what was
    written beyond that is hidden. The recipe is shown under *text*.
    """

    observer: ClassVar = True

    _writer: SummaryWriter | None = field(init=False, default=None)

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Open the files of this session, in the run directory."""
        import tensorboard  # noqa: F401  # what torch's writer is made of; imported here, because that is slow
        from torch.utils.tensorboard import SummaryWriter

        assert run.dir is not None
        beyond = run.step + 1 if run.step else None
        self._writer = SummaryWriter(str(run.dir.path / FOLDER), purge_step=beyond)
        if beyond is None:
            recipe = "\n".join(f"    {line}" for line in run.recipe.to_yaml().splitlines())  # Markdown's code
            self._writer.add_text("recipe", recipe, 0)

    @hookimpl
    def log(self, run: Run, record: dict[str, float]) -> None:
        """Write one record."""
        if self._writer is None:
            return
        for name, value in record.items():
            if name not in POSITION:
                self._writer.add_scalar(_tag(run, name), value, int(record["step"]))

    @hookimpl
    def epoch_end(self) -> None:
        """Let TensorBoard see the epoch."""
        if self._writer is not None:
            self._writer.flush()

    @hookimpl
    def fit_end(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _tag(run: Run, name: str) -> str:
    """Return ``accuracy/test`` for ``test_accuracy``, so that the splits of a metric share a chart."""
    split = next((split for split in run.data.splits if name.startswith(f"{split}_")), None)
    return name if split is None else f"{name.removeprefix(f'{split}_')}/{split}"
