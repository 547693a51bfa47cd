"""Networks of torchvision."""

import textwrap
from typing import Any

import torch
from attrs import Attribute, field
from torch import Tensor, nn

from trainkit import Run
from trainkit.errors import RecipeError, did_you_mean
from trainkit.plugin import hookimpl, plugin

__all__ = ["TorchvisionModel"]

#: Options of the networks with auxiliary classifiers, which in training would give further outputs beside the logits.
#: ``init_weights`` is torchvision's default; left out, it warns that the default will change.
WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": True}
AUXILIARY = {"googlenet": WITHOUT_AUXILIARY, "inception_v3": WITHOUT_AUXILIARY}

#: What `kwargs` cannot have.
REFUSED = ("name", "num_classes", "weights", "pretrained", "aux_logits")


def _check_kwargs(plugin: object, attribute: "Attribute[dict[str, Any]]", value: dict[str, Any]) -> None:
    for key in value:
        if key in REFUSED:
            raise ValueError(
                f"'kwargs' cannot have {key!r}: the classes are the data's, weights are never downloaded, and a "
                "network gives logits alone"
            )


@plugin
class TorchvisionModel:
    """Train one of torchvision's classification networks, from random weights.

    Its modules and initial weights are torchvision's, and the number of classes is the data's. Nothing is downloaded.
    Without their auxiliary classifiers, ``googlenet`` and ``inception_v3`` are smaller than the published ones.

    Args:
        name: of the network, as ``torchvision.models.list_models`` gives it, such as ``resnet18``.
        kwargs: what its builder takes besides the number of classes, such as ``{width_mult: 0.5}`` for ``mobilenet_v2``
            or ``{image_size: 32}`` for ``vit_b_16``.
    """

    name: str
    kwargs: dict[str, Any] = field(factory=dict, validator=_check_kwargs)

    @hookimpl
    def model(self, run: Run) -> nn.Module:
        """Build the network.

        Raises:
            RecipeError: there is no network of this name, it does not take these arguments, or not these images.
        """
        from torchvision import models  # type: ignore[import-untyped]  # imported here, because that is slow

        known = models.list_models(module=models)
        if self.name not in known:
            near = did_you_mean(self.name, known) or f"; torchvision has {', '.join(known)}"
            raise RecipeError(f"'name': torchvision has no classification network {self.name!r}{near}")
        if run.data.shape[0] != 3:
            raise RecipeError(
                f"torchvision's networks take images of 3 channels, and these have {run.data.shape[0]}; take a network "
                "that is built for any number of channels, such as `resnet`"
            )
        kwargs = {**AUXILIARY.get(self.name, {}), **self.kwargs}
        try:
            model: nn.Module = models.get_model(self.name, weights=None, num_classes=len(run.data.classes), **kwargs)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"'kwargs': torchvision's {self.name} does not take them: {error}") from error
        _check_logits(model, run, f"torchvision's {self.name}")
        return model


def _check_logits(model: nn.Module, run: Run, what: str) -> None:
    """Check that the network takes the run's images and gives logits.

    One blank image passes through it in evaluation mode, which changes neither the network nor random numbers.
    """
    size = "x".join(map(str, run.image_shape))
    model.eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, *run.image_shape))
    except Exception as error:  # layers raise many kinds
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise RecipeError(
            f"{what} does not take the images, {size} after the training transforms: {reason}; "
            "choose another network, or options that fit in 'kwargs', or transforms that give another size"
        ) from error
    model.train()
    if not isinstance(output, Tensor) or output.shape != (1, len(run.data.classes)):
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise RecipeError(f"{what} must give logits [1, {len(run.data.classes)}] for one image, not {found}")
