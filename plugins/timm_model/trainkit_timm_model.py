"""Networks of timm."""

import textwrap
from typing import Any

import torch
from attrs import Attribute, field
from attrs.validators import matches_re, optional
from torch import Tensor, nn

from trainkit import Run
from trainkit.errors import RecipeError, did_you_mean
from trainkit.plugin import hookimpl, plugin
from trainkit.provenance import digest

__all__ = ["TimmModel"]


#: What `kwargs` cannot have, besides all that has "pretrained" in its name.
REFUSED = ("model_name", "num_classes", "in_chans", "checkpoint_path", "cache_dir")


def _check_kwargs(plugin: object, attribute: "Attribute[dict[str, Any]]", value: dict[str, Any]) -> None:
    for key in value:
        if key in REFUSED or "pretrained" in key:
            raise ValueError(
                f"'kwargs' cannot have {key!r}: channels and classes are the data's, and weights are those that "
                "`pretrained`, or the plugin start_weights, says"
            )


@plugin
class TimmModel:
    """Train one of timm's networks, from random or from published weights (Wightman, PyTorch Image Models).

    Its modules and initial weights are timm's; the numbers of channels and classes are the data's. Nothing is
    downloaded, unless `pretrained` says so.

    Args:
        name: of the network, as ``timm.list_models`` gives it, such as ``resnet18``; without the tag of weights.
        pretrained: start from timm's weights of this network, which are downloaded once: those of `tag`. The head keeps
            its initial values where the classes are others. The record has their content.
        tag: which weights, such as ``a1_in1k``, as ``timm.list_pretrained`` gives them; by default timm's own choice.
        kwargs: what ``timm.create_model`` takes besides, such as ``{drop_path_rate: 0.1}``, or
            ``{img_size: 32}`` for networks of one image size.
    """

    name: str
    pretrained: bool = False
    tag: str | None = field(default=None, validator=optional(matches_re(r"[A-Za-z0-9_]+")))
    kwargs: dict[str, Any] = field(factory=dict, validator=_check_kwargs)
    _loaded: dict[str, Any] = field(init=False, factory=dict)  # for the record

    @hookimpl
    def model(self, run: Run) -> nn.Module:
        """Build the network.

        Raises:
            RecipeError: there is no network of this name, it does not take these arguments, or not these images; or its
                weights cannot be had.
        """
        if self.tag is not None and not self.pretrained:
            raise RecipeError("'tag': names weights, and `pretrained` is false; set `pretrained: true`")
        import timm  # imported here, because that is slow

        # Only timm's own names: create_model would also take the name of a repository, and download from it.
        known = timm.list_models()
        if self.name not in known:
            near = did_you_mean(self.name.partition(".")[0], known) or "; `timm.list_models()` gives all names"
            raise RecipeError(f"'name': timm has no network {self.name!r}{near}")
        if self.pretrained and run.dry:  # a network to be loaded, or a trial
            self._name_of_weights()
        model = self._with_weights(run) if self.pretrained and not run.dry else self._build(run, self.name)
        _check_logits(model, run, f"timm's {self.name}")
        return model

    def _build(self, run: Run, name: str, **weights: Any) -> nn.Module:
        import timm

        channels, classes = run.data.shape[0], len(run.data.classes)
        try:
            model: nn.Module = timm.create_model(name, in_chans=channels, num_classes=classes, **weights, **self.kwargs)
        except (TypeError, ValueError, AssertionError) as error:
            raise RecipeError(f"'kwargs': timm's {self.name} does not take them: {error}") from error
        return model

    def _name_of_weights(self) -> str:
        """Return what timm calls the weights: the network's name and a tag.

        Raises:
            RecipeError: there are none.
        """
        import timm

        known = timm.list_pretrained(f"{self.name}.*")
        if not known:
            raise RecipeError(f"'pretrained': timm has no weights of {self.name}; drop it, or take another network")
        if self.tag is None:
            return f"{self.name}.{timm.models.get_pretrained_cfg(self.name).tag}"  # type: ignore[union-attr]
        if f"{self.name}.{self.tag}" not in known:
            tags = ", ".join(name.partition(".")[2] for name in known)
            raise RecipeError(f"'tag': timm has no weights {self.tag!r} of {self.name}; there are {tags}")
        return f"{self.name}.{self.tag}"

    def _with_weights(self, run: Run) -> nn.Module:
        name = self._name_of_weights()
        try:
            model = self._build(run, name, pretrained=True)
        except RecipeError:
            raise
        except Exception as error:  # each way to fetch files has errors of its own
            said = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            raise RecipeError(
                f"'pretrained': the weights {name} could not be fetched ({said}); where the network is closed, fetch "
                f"them elsewhere, `timm.create_model({name!r}, pretrained=True)`, save its state_dict with torch.save, "
                "and list the plugin start_weights with that file in place of `pretrained`"
            ) from error
        config: dict[str, Any] = getattr(model, "pretrained_cfg", {})
        self._loaded = {"weights": f"{name} {digest(model.state_dict())}"}
        said = f"timm_model: weights {name}, of {config.get('num_classes')} classes"
        if "mean" in config:
            mean, std = (", ".join(f"{value:g}" for value in config[key]) for key in ("mean", "std"))
            said += f", trained on images of {config['input_size'][-1]} pixels normalized by mean [{mean}], std [{std}]"
        run.console.print(said, markup=False, highlight=False, soft_wrap=True)
        return model

    @hookimpl
    def provenance(self) -> dict[str, Any]:
        """Say which weights the run began with, by content."""
        return self._loaded


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
