"""Networks of timm."""

import textwrap
from typing import Any

import torch
from attrs import Attribute, field
from torch import Tensor, nn

from trainkit import Run
from trainkit.errors import RecipeError, did_you_mean
from trainkit.plugin import hookimpl, plugin

__all__ = ["TimmModel"]


#: What `kwargs` cannot have, besides all that has "pretrained" in its name.
REFUSED = ("model_name", "num_classes", "in_chans", "checkpoint_path", "cache_dir")


def _check_kwargs(plugin: object, attribute: "Attribute[dict[str, Any]]", value: dict[str, Any]) -> None:
    for key in value:
        if key in REFUSED or "pretrained" in key:
            raise ValueError(
                f"'kwargs' cannot have {key!r}: channels and classes are the data's, and weights are neither "
                "downloaded nor read from a file"
            )


@plugin
class TimmModel:
    """Train one of timm's networks, from random weights (Wightman, PyTorch Image Models).

    Its modules and initial weights are timm's; the numbers of channels and classes are the data's. Nothing is
    downloaded.

    Args:
        name: of the network, as ``timm.list_models`` gives it, such as ``resnet18``; without the tag of weights.
        kwargs: what ``timm.create_model`` takes besides, such as ``{drop_path_rate: 0.1}``, or
            ``{img_size: 32}`` for networks of one image size.
    """

    name: str
    kwargs: dict[str, Any] = field(factory=dict, validator=_check_kwargs)

    @hookimpl
    def model(self, run: Run) -> nn.Module:
        """Build the network.

        Raises:
            RecipeError: there is no network of this name, it does not take these arguments, or not these images.
        """
        import timm  # imported here, because that is slow

        # Only timm's own names: create_model would also take the name of a repository, and download from it.
        known = timm.list_models()
        if self.name not in known:
            near = did_you_mean(self.name.partition(".")[0], known) or "; `timm.list_models()` gives all names"
            raise RecipeError(f"'name': timm has no network {self.name!r}{near}")
        channels, classes = run.data.shape[0], len(run.data.classes)
        try:
            model: nn.Module = timm.create_model(self.name, in_chans=channels, num_classes=classes, **self.kwargs)
        except (TypeError, ValueError, AssertionError) as error:
            raise RecipeError(f"'kwargs': timm's {self.name} does not take them: {error}") from error
        _check_logits(model, run, f"timm's {self.name}")
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
            "choose another network, or options that fit in 'kwargs', such as `img_size`, or transforms that give "
            "another size"
        ) from error
    model.train()
    if not isinstance(output, Tensor) or output.shape != (1, len(run.data.classes)):
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise RecipeError(f"{what} must give logits [1, {len(run.data.classes)}] for one image, not {found}")
