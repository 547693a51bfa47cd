"""A network in use: from a run's directory to predictions, without its data set."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainkit.build import build_network
from trainkit.data import Data
from trainkit.errors import CheckpointError, DataError, UsageError, did_you_mean
from trainkit.hooks import load_plugins
from trainkit.images import entries, find_images, open_image, resize_and_crop
from trainkit.recipe import load_recipe
from trainkit.rng import stream
from trainkit.run import Run
from trainkit.rundir import MAX_CHECKPOINT, RunDir, read_regular

if TYPE_CHECKING:
    from rich.console import Console

    from trainkit.images import Size

__all__ = [
    "Images",
    "LoadedModel",
    "confusion_matrix",
    "count_confusion",
    "count_images",
    "evaluated_model",
    "load_model",
    "model_files",
    "pack_safetensors",
    "read_safetensors",
    "untrained",
]

#: Images as :meth:`LoadedModel.preprocess` takes them.
Images = Tensor | NDArray[np.uint8] | str | os.PathLike[str] | Sequence["str | os.PathLike[str]"]

BATCH = 100  # images that predict() holds at once


@attrs.frozen(eq=False, kw_only=True)
class LoadedModel:
    """A trained network with all that its use needs.

    Args:
        model: the network as it was evaluated, in evaluation mode: the averaged weights, where a plugin averages.
        classes: class names, by output; empty where there are none.
        has_class_targets: whether it was trained to tell which class an image is of, and no other targets.
        shape: channels, height and width of images before the transforms.
        resize: how image files come to that shape; see :class:`trainkit.Data`.
        epoch: epochs that were completed when it was saved.
        metrics: what was measured of it then, by name; empty where it was saved within an epoch.
        recipe: the name of its recipe.
        run: the parts of the run that map images to outputs: transforms, contexts, device.
    """

    model: nn.Module
    classes: tuple[str, ...]
    has_class_targets: bool
    shape: tuple[int, int, int]
    resize: Size
    epoch: int
    metrics: dict[str, float]
    recipe: str
    run: Run

    def preprocess(self, images: Images) -> Tensor:
        """Return images as the network saw the test split: float32 [N, C, H, W] on the model's device.

        Args:
            images: uint8 [N, C, H, W] or one image [C, H, W] of :attr:`shape`, as a tensor or an array; or a path, or a
                sequence of paths, of image files, which are read, turned upright and resized as the data plugin does.

        Raises:
            DataError: a file cannot be read, or the images have another type or shape.
        """
        if isinstance(images, str | os.PathLike):
            images = [images]
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images)
        if not isinstance(images, Tensor):
            images = torch.stack([self.read(path) for path in images]) if images else torch.empty(0, *self.shape).byte()
        images = images[None] if images.dim() == 3 else images
        if images.dtype != torch.uint8 or images.dim() != 4 or tuple(images.shape[1:]) != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise DataError(f"expected uint8 images [N, {wanted}], got {images.dtype} {list(images.shape)}")
        pipeline = self.run.transforms["test"]
        seed = self.run.recipe.seed
        return pipeline(images.to(self.run.device), lambda purpose: stream(seed, purpose, 0, 0))

    def read(self, path: str | os.PathLike[str]) -> Tensor:
        """Return an image file as the data plugin would: uint8 of :attr:`shape`.

        Raises:
            DataError: it cannot be read or decoded, or is too large.
        """
        return resize_and_crop(open_image(path, "L" if self.shape[0] == 1 else "RGB"), self.resize)

    @torch.no_grad()
    def outputs(self, images: Images) -> Tensor:
        """Return what the network gives for images, float32 [N, ...] on the CPU: logits, where targets are classes.

        Args:
            images: see :meth:`preprocess`; any number, of which a hundred at a time are on the device.
        """
        found = [self._call(self.preprocess(part)) for part in _parts(images)]
        return torch.cat(found) if found else torch.empty(0, len(self.classes))

    def _call(self, images: Tensor) -> Tensor:
        with self.run.context:
            output: Tensor = self.model(images)
        return output.float().cpu()

    def predict(self, images: Images) -> Tensor:
        """Return the probability of each class, float32 [N, classes] on the CPU; not a number where an output is none.

        Args:
            images: see :meth:`preprocess`.

        Raises:
            UsageError: the targets that it was trained on are no classes.
        """
        if not self.has_class_targets:
            raise UsageError("the network was trained on targets that are no classes; outputs() gives what it computes")
        return self.outputs(images).softmax(1)


def _parts(images: Images) -> Iterator[Images]:
    """Yield a hundred images at a time."""
    if isinstance(images, str | os.PathLike):
        images = [images]
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 3:
        images = images[None]
    for start in range(0, len(images), BATCH):
        yield images[start : start + BATCH]


@attrs.frozen
class _NotThere:
    """Stands for the images of a split that is not opened."""

    name: str
    images: int

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> NoReturn:
        raise DataError(f"image {index} of the {self.name} split is needed, and the data set is not opened here")


def load_model(
    run_dir: str | Path, checkpoint: str = "best", *, device: str | None = None, console: Console | None = None
) -> LoadedModel:
    """Load the network of a run as it was evaluated. Its data set is not needed.

    The recipe's plugins must be installed. They build the network again, for classes and shape from ``data.json``.

    Args:
        run_dir: the directory of a run.
        checkpoint: ``best``, ``last`` or another file's name in ``checkpoints/``; where that file is absent, in
            ``weights/``.
        device: where it computes; by default the recipe's device.
        console: where plugins print for people; by default nowhere.

    Raises:
        TrainkitError: the directory is not that of a run, a plugin is missing, or the checkpoint is not whole.
    """
    directory = RunDir(Path(run_dir))
    recipe = load_recipe(directory.recipe_path(), [] if device is None else [f"device={device}"])
    network = _network_file(directory, checkpoint)
    is_evaluated = network.suffix == ".safetensors"
    state = _stored(network) if is_evaluated else directory.load_state(checkpoint)
    data, has_class_targets = _described(directory)
    run = build_network(recipe, load_plugins(recipe), data, console or _nowhere())
    try:
        run.model.load_state_dict(state["model"])
        epoch = int(state["position"]["epoch"])
        metrics = _metrics(state)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{directory.path}: checkpoint {checkpoint!r} is not of its recipe: {said}") from error
    return LoadedModel(
        model=run.model.eval() if is_evaluated else evaluated_model(run, state),
        classes=data.classes,
        has_class_targets=has_class_targets,
        shape=data.shape,
        resize=data.file_size,
        epoch=epoch,
        metrics=metrics,
        recipe=recipe.name,
        run=run,
    )


def untrained(run_dir: str | Path, *, console: Console | None = None) -> Run:
    """Build the network of a run again, on this machine's device and untrained: no data set or checkpoint is needed.

    Args:
        run_dir: the directory of a run.
        console: where plugins print for people; by default nowhere.

    Raises:
        TrainkitError: the directory is not that of a run, or a plugin is missing.
    """
    directory = RunDir(Path(run_dir))
    recipe = load_recipe(directory.recipe_path(), ["device=auto"])
    return build_network(recipe, load_plugins(recipe), _described(directory)[0], console or _nowhere())


def model_files(run_dir: str | Path, checkpoint: str = "best") -> list[Path]:
    """Return the files of a run's directory that :func:`load_model` needs: a folder with these alone is enough for it.

    Args:
        run_dir: the directory of a run.
        checkpoint: as for :func:`load_model`.
    """
    directory = RunDir(Path(run_dir))
    named = sorted(path for path in (directory.path / "files").rglob("*") if path.is_file())  # by the recipe's plugins
    recipes = directory.versions("recipe.yaml")
    return [*recipes, directory.path / "data.json", _network_file(directory, checkpoint), *named]


def _network_file(directory: RunDir, checkpoint: str) -> Path:
    """Return the checkpoint, or where there is none the network that was stored for use elsewhere, if that is there."""
    path = directory.path / "checkpoints" / f"{checkpoint}.pt"
    weights = directory.path / "weights" / f"{checkpoint}.safetensors"
    return weights if weights.exists() and not path.exists() else path


def _stored(path: Path) -> dict[str, Any]:
    """Return what is needed of a checkpoint from a network that was stored for use elsewhere.

    Raises:
        CheckpointError: it cannot be read, or was not stored by trainkit.
    """
    model, metadata = read_safetensors(path)
    try:
        told = json.loads(metadata["trainkit"])
        position = {"epoch": told["epoch"], "step": told.get("step")}
        return {"model": model, "position": position, "history": [told.get("metrics", {})]}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a network that trainkit stored: {error!r}") from error


def _metrics(state: Mapping[str, Any]) -> dict[str, float]:
    """Return the record of the epoch that ended where a state was saved; empty where none did."""
    history = state.get("history")
    last = history[-1] if history else {}
    if "step" not in last or last["step"] != state["position"]["step"]:
        return {}
    return {str(name): float(value) for name, value in last.items() if name not in ("epoch", "step")}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and its metadata.

    Where the metadata have an entry ``shared``, a JSON object, the names in it stand for the tensors that they name.

    Raises:
        CheckpointError: it cannot be read, or is no such file.
    """
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise CheckpointError(
            f"{path}: the package safetensors is needed to read it: `pip install safetensors`"
        ) from error
    try:
        content = read_regular(path, MAX_CHECKPOINT)
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata: dict[str, str] = header.get("__metadata__", {})
        tensors.update({name: tensors[kept] for name, kept in json.loads(metadata.get("shared", "{}")).items()})
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # safetensors raises an error of its own
        raise CheckpointError(f"{path}: not a safetensors file: {' '.join(str(error).split())[:200]}") from error
    return tensors, metadata


def pack_safetensors(model: nn.Module, description: dict[str, Any]) -> bytes:
    """Return a network's state dict as a safetensors file.

    Args:
        model: the network. Entries that share memory, such as a shared kernel, are stored under the first name; the
            file's metadata maps the other names to it in ``shared``.
        description: plain data for the metadata's ``trainkit``.
    """
    from safetensors.torch import save

    kept: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in kept:
            shared[name] = kept[place]
        else:
            kept[place] = name
            tensors[name] = tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
    metadata = {"format": "pt", "trainkit": json.dumps(description), "shared": json.dumps(shared)}
    return save(tensors, metadata)


def _described(directory: RunDir) -> tuple[Data, bool]:
    """Return the data that a run's ``data.json`` describes, and whether their targets are classes.

    Raises:
        UsageError: the file is not what a run writes.
    """
    recorded = directory.read_json("data.json")
    try:
        splits = {str(name): _NotThere(str(name), int(split["images"])) for name, split in recorded["splits"].items()}
        channels, height, width = map(int, recorded["shape"])
        resize = recorded.get("resize", height if height == width else [height, width])
        data = Data(
            train=splits.pop("train"),
            test=splits.pop("test"),
            validation=splits.pop("validation", None),
            more=splits,
            classes=tuple(map(str, recorded["classes"])),
            shape=(channels, height, width),
            resize=resize if isinstance(resize, int) else (int(resize[0]), int(resize[1])),
        )
        return data, recorded.get("target", "class") == "class"
    except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
        raise UsageError(f"{directory.path / 'data.json'}: not what a run writes: {error!r}") from error


def evaluated_model(run: Run, state: Mapping[str, Any]) -> nn.Module:
    """Return the network that a run evaluates, in evaluation mode: its own, or what a plugin gives in its place.

    Args:
        run: a run whose network is built, and loaded from `state`.
        state: what ``Run.state_dict`` returned.

    Raises:
        CheckpointError: the plugin's state is missing or not its own.
    """
    run.model.eval()
    provider = run.hooks.only("eval_model")
    if provider is None:
        return run.model
    plugin = provider.plugin
    with run.hooks.blaming(CheckpointError):
        for implementation in run.hooks.implementations("built"):
            if implementation.plugin is plugin:
                implementation(run)
        if hasattr(plugin.instance, "load_state_dict"):
            try:
                saved = state["plugins"][plugin.name]["state"]
            except (KeyError, TypeError) as error:
                raise CheckpointError(f"{plugin}: the checkpoint holds no state of it") from error
            plugin.instance.load_state_dict(saved)
        model: nn.Module = provider(run) or run.model
    return model.eval()


@torch.no_grad()
def confusion_matrix(run: Run, split: str) -> Tensor:
    """Return how often each class is taken for each, int64 [classes, classes] on the CPU; rows are true classes.

    An image whose output is not finite is taken for no class, so its row lacks it.

    Args:
        run: a run that is built, whose targets are classes. The network is the one that it evaluates.
        split: a split's name.
    """
    n = len(run.data.classes)
    counts = torch.zeros(n * n, dtype=torch.int64, device=run.device)
    model = run.evaluated_model()
    was_training = model.training
    model.eval()
    try:
        for batch in run.iterate(split):
            output, _ = run.compute_loss(batch, model)
            count_confusion(counts, batch.targets, output)
    finally:
        model.train(was_training)
        run.batches[split].close()
    return counts.view(n, n).cpu()


def count_confusion(counts: Tensor, targets: Tensor, output: Tensor) -> None:
    """Add a batch to the counts of which class is taken for which; nothing is read from the device.

    Args:
        counts: int64 [classes * classes], true classes first.
        targets: int64 [N].
        output: logits [N, classes]. A row that is not finite is not counted: argmax alone calls it class 0.
    """
    finite = output.detach().isfinite().all(1)
    places = targets * output.shape[1] + output.detach().argmax(1)
    counts.scatter_add_(0, places, finite.to(counts.dtype))


def count_images(model: LoadedModel, folder: Path, bad: list[str]) -> Tensor:
    """Return how often each class is taken for each in folders of images, int64 [classes, classes]; rows are true ones.

    Args:
        model: a network that was trained to tell classes.
        folder: holds one folder a class, named as the network's classes are, itself or in a folder ``test`` in it. Not
            every class need be there.
        bad: gets a line for each image that is not counted: a file that cannot be read, or an output that is not
            finite.

    Raises:
        DataError: a folder is none of a class, or there are no images.
        UsageError: the network was trained on targets that are no classes.
    """
    if not model.has_class_targets:
        raise UsageError(f"{folder}: images in folders of classes, and the network was not trained to tell classes")
    samples = _labelled(model, folder)
    counts = torch.zeros(len(model.classes) ** 2, dtype=torch.int64)
    for start in range(0, len(samples), BATCH):
        images, targets, names = [], [], []
        for path, target in samples[start : start + BATCH]:
            try:
                images.append(model.read(path))
            except DataError as problem:
                bad.append(str(problem))
            else:
                targets.append(target)
                names.append(path)
        if images:
            output = model.outputs(torch.stack(images))
            count_confusion(counts, torch.tensor(targets), output)
            finite = output.isfinite().all(1).tolist()
            bad += [
                f"{name}: the network's output is not finite" for name, ok in zip(names, finite, strict=True) if not ok
            ]
    return counts.view(len(model.classes), -1)


def _labelled(model: LoadedModel, folder: Path) -> list[tuple[str, int]]:
    """Return the images in folders of classes, with the number of their class."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    top = folder / "test" if (folder / "test").is_dir() and "test" not in model.classes else folder
    samples = []
    for entry, status in entries(top):
        if not stat.S_ISDIR(status.st_mode):
            continue
        if entry.name not in model.classes:
            near = did_you_mean(entry.name, model.classes) or f"; there are {', '.join(model.classes[:20])}"
            raise DataError(f"{entry.path}: the network has no class {entry.name!r}{near}")
        target = model.classes.index(entry.name)
        samples += [(path, target) for path in find_images(entry.path).paths]
    if not samples:
        raise DataError(f"{top}: no images in folders of classes; expected {top / model.classes[0] / '<image>'}")
    return samples


def _nowhere() -> Console:
    from rich.console import Console

    return Console(quiet=True)
