from typing import ClassVar

import torch
from attrs import field
from attrs.validators import gt

from trainkit import Run
from trainkit.plugin import hookimpl, plugin


@plugin
class SAM:
    """Step with the gradient at the worst point near by (Foret et al., ICLR 2021).

    Args:
        rho: radius of the neighbourhood, in the Euclidean norm over all parameters.
    """

    conflicts: ClassVar = ("accumulate",)  # the second gradient is that of the step's last batch alone

    rho: float = field(default=0.05, validator=gt(0))

    @hookimpl
    def optimizer_step(self, run: Run) -> None:
        """Climb to that point, take the gradient there, and step from where the parameters were (algorithm 1)."""
        parameters = [p for p in run.model.parameters() if p.grad is not None]
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            before = [p.clone() for p in parameters]
            for p in parameters:
                p.add_(p.grad * (self.rho / (norm + 1e-12)))
        run.optimizer.zero_grad()
        _, loss = run.compute_loss(run.batch)
        loss.backward()
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
        run.optimizer.step()
