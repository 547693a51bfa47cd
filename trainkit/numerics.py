"""``numerics: portable``: arithmetic that does not depend on the model of the CPU. Loads no torch.

torch and its libraries choose instructions by what the CPU has, and others sum in another order or round differently.
Portable numerics cap them at what every x86-64 CPU has since 2008, and fix the number of threads. These settings are
read when torch is loaded, so they must be made before.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from trainkit.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from trainkit.recipe import Recipe

__all__ = ["SETTINGS", "check", "prepare", "widest_float"]

#: What torch, oneDNN and MKL read when they are loaded.
SETTINGS = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
#: Sums over parts depend on the number of threads; one is what every machine has. Whoever sets another has chosen it.
THREADS = {"OMP_NUM_THREADS": "1"}


def prepare(recipe: Recipe) -> None:
    """Make the settings that a recipe's numerics need, if torch is not loaded yet."""
    if recipe.numerics == "portable" and "torch" not in sys.modules:
        os.environ.update(SETTINGS)
        for name, value in THREADS.items():
            os.environ.setdefault(name, value)


def widest_float(device: torch.device) -> torch.dtype:
    """Return what to add up in on a device: float64, but float32 on Apple's GPUs (MPS), which have no float64."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def check(recipe: Recipe, device: torch.device) -> None:
    """Check that the settings were made before torch was loaded.

    Raises:
        RecipeError: they were not, or the device is not the CPU.
    """
    if recipe.numerics != "portable":
        return
    import torch

    if device.type != "cpu":
        raise RecipeError(
            f"{recipe.where}: numerics: portable is for the CPU, and the device is {device}; set device=cpu"
        )
    missing = [f"{name}={value}" for name, value in SETTINGS.items() if os.environ.get(name) != value]
    if missing or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX"):
        settings = " ".join(f"{name}={value}" for name, value in {**SETTINGS, **THREADS}.items())
        raise RecipeError(
            f"{recipe.where}: numerics: portable needs settings that torch reads when it is loaded, and it was loaded "
            f"without them; start Python with {settings}, or use `trainkit run`, which makes them"
        )


def check_context(recipe: Recipe, context: object) -> None:
    """Check that a context around the forward pass computes in float32.

    Raises:
        RecipeError: it is torch's autocast, whose precision CPUs differ in.
    """
    import torch

    if recipe.numerics == "portable" and isinstance(context, torch.autocast):
        raise RecipeError(
            f"{recipe.where}: numerics: portable is float32, and a plugin provides mixed precision; drop it, such as "
            "with plugins.autocast=false"
        )
