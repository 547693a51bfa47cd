"""Export a run's network for use elsewhere.

An ONNX or torch.export file takes uint8 images and gives logits: what was done to test images, such as normalization,
is part of it, so nobody can forget it. A safetensors file holds weights alone. Each file is compared with the run's
network on real images before it is written, and a model card says what it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal

import attrs
import numpy as np
from numpy.typing import NDArray

from trainkit import numerics
from trainkit.cli.output import add_allow_local, number, print_json, printable, table, terminal
from trainkit.errors import DataError, RunError, TrainkitError, UsageError
from trainkit.images import find_images
from trainkit.recipe import data_root, load_recipe
from trainkit.rundir import RunDir, as_mapping, as_numbers, atomic_write, read_regular

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from trainkit import LoadedModel
    from trainkit.data import Data, Split
    from trainkit.recipe import Recipe

__all__ = ["EXPORT", "Check", "Stored", "check", "export_onnx", "export_torch", "model_card", "quantize", "stored"]

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
IMAGES = 256  # that the file is checked on, and as many others that quantization is calibrated on
TOLERANCE = 1e-3  # of the largest output: float32 sums in another order differ by less
AGREEMENT = 0.9  # of the classes that a quantized network must share with the one that it is made of
LARGEST = 1 << 40  # bytes of a file
CLASSES = 50  # that a model card names
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch-export": (), "safetensors": ("safetensors",)}
COUNTED = 512  # bytes from which on a tensor's copies are counted; scales of normalizations may be equal by chance


# ---- the network with its preprocessing


def deployable(model: LoadedModel) -> nn.Module:
    """Return the network with the transforms of test images before it: uint8 [N, C, H, W] to logits, in float32.

    Raises:
        UsageError: a transform of test images draws parameters for each image.
    """
    import torch

    pipeline = model.run.transforms["test"]
    size = (model.shape[1], model.shape[2])
    for (name, step), arriving in zip(pipeline.steps, pipeline.sizes(size)[:-1], strict=True):
        if step.draw(model.run.rng(name), 1, arriving):
            raise UsageError(f"the transform {name!r} draws parameters for each test image, which no file can hold")

    class Deployable(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model.model.to(memory_format=torch.contiguous_format).float().eval().requires_grad_(False)

        def forward(self, images: Tensor) -> Tensor:
            outputs: Tensor = self.network(pipeline.apply(images, [{} for _ in pipeline.steps]))
            return outputs

    return Deployable().eval()


def _program(network: nn.Module, shape: tuple[int, int, int]) -> Any:
    """Return the network as torch.export captures it, for any number of images."""
    import torch

    example = torch.zeros(2, *shape, dtype=torch.uint8)
    sizes = {"images": {0: torch.export.Dim("images", min=1)}}
    with _explained("torch.export cannot capture the network"):
        program = torch.export.export(network, (example,), dynamic_shapes=sizes)
    # torch notes at each operation where its code lies on this machine; the file goes to others.
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Make one clear error of whatever a library raises: exporters and runtimes have many kinds.

    Raises:
        RunError: the block failed.
    """
    try:
        yield
    except Exception as problem:
        said = " ".join(str(problem).split())[:300]
        raise RunError(f"{what}: {type(problem).__name__}: {said}") from problem


def export_torch(network: nn.Module, shape: tuple[int, int, int], facts: Mapping[str, Any], path: Path) -> None:
    """Write a torch.export archive; `facts` are in it as ``trainkit.json``."""
    import torch

    program = _program(network, shape)
    with _explained("torch.export cannot write the network"):
        torch.export.save(program, path, extra_files={"trainkit.json": json.dumps(facts)})


def export_onnx(network: nn.Module, shape: tuple[int, int, int], facts: Mapping[str, Any], path: Path) -> None:
    """Write an ONNX model; its metadata hold `facts`, as JSON under ``trainkit``, and class names under ``classes``."""
    import onnx
    import onnxscript  # noqa: F401  # what torch's exporter is made of
    import torch

    program = _program(network, shape)
    with _quiet(), _explained("torch.onnx cannot export the network"):
        made: Any = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
        model = made.model_proto
        for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
            del node.metadata_props[:]  # the exporter's notes, as large as a small network's weights
        for key, value in (("trainkit", json.dumps(facts)), ("classes", json.dumps(facts["classes"]))):
            entry = model.metadata_props.add()
            entry.key, entry.value = key, value
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "images"
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "images"
        onnx.checker.check_model(model)
        onnx.save(model, path)


def quantize(path: Path, target: Path, calibration: NDArray[np.uint8]) -> None:
    """Write an ONNX model with int8 weights and activations, whose ranges are those on calibration images.

    Args:
        path: the model in float32.
        target: where to write it.
        calibration: uint8 [N, C, H, W].
    """
    import onnx
    from onnxruntime import quantization  # type: ignore[import-untyped]

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.waiting = iter(np.array_split(calibration, max(1, len(calibration) // 32)))

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            images = next(self.waiting, None)
            return None if images is None else {"images": images}

    with _quiet(), _explained("onnxruntime cannot quantize the network; export it without --quantize"):
        quantization.quantize_static(
            str(path),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
        )
        onnx.checker.check_model(str(target))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporters say of their own progress and deprecations from people."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _parts(images: Tensor) -> list[Tensor]:
    """Return a hundred images at a time."""
    return [images[start : start + 100] for start in range(0, len(images), 100)]


def run_file(path: Path, form: str, images: Tensor, model: LoadedModel) -> Tensor:
    """Return what an exported file gives for images, uint8 [N, C, H, W]; a hundred at a time.

    Weights alone are put into the run's network first.
    """
    import torch

    with _explained("the file that was made cannot be run"):
        if form == "onnx":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            outputs = [session.run(None, {"images": part.numpy()})[0] for part in _parts(images)]
            return torch.from_numpy(np.concatenate(outputs))
        network: Any
        if form == "torch-export":
            network = torch.export.load(path).module()
        else:
            from trainkit.inference import read_safetensors

            model.model.load_state_dict(read_safetensors(path)[0])
            network = deployable(model)
        with torch.no_grad():
            return torch.cat([network(part) for part in _parts(images)])


# ---- what is found of a file


@attrs.frozen
class Stored:
    """What a file stores.

    Args:
        file: its bytes.
        tensors: bytes of the tensors in it.
        network: bytes of the network's own tensors, each shared one counted once.
        shared: how many of the network's names stand for a tensor that has another name, too.
        copies: how many large tensors the file holds more than once.
    """

    file: int
    tensors: int
    network: int
    shared: int
    copies: int

    def sentence(self) -> str:
        """Return what is said of shared kernels."""
        if not self.shared:
            return "the network shares no tensors"
        how = "each is stored once" if not self.copies else f"{self.copies} of the file's tensors are copies"
        return f"{self.shared} names of the network stand for shared tensors: {how}"


def stored(path: Path, form: str, network: nn.Module) -> Stored:
    """Look into a file."""
    import torch

    unique = {(t.data_ptr(), tuple(t.shape)): t.numel() * t.element_size() for t in network.state_dict().values()}
    contents: list[bytes] = []
    if form == "onnx":
        import onnx

        contents = [onnx.numpy_helper.to_array(tensor).tobytes() for tensor in onnx.load(path).graph.initializer]
    elif form == "torch-export":
        weights: dict[int, Tensor] = {}
        for tensor in torch.export.load(path).state_dict.values():
            weights.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        contents = [tensor.detach().numpy().tobytes() for tensor in weights.values()]
    else:
        from safetensors.numpy import load_file

        contents = [array.tobytes() for array in load_file(path).values()]
    digests = Counter(hashlib.blake2b(content).digest() for content in contents if len(content) >= COUNTED)
    return Stored(
        file=path.stat().st_size,
        tensors=sum(map(len, contents)),
        network=sum(unique.values()),
        shared=len(network.state_dict()) - len(unique),
        copies=sum(count - 1 for count in digests.values()),
    )


@attrs.frozen
class Check:
    """How an exported file compares with the run's network.

    Args:
        images: how many real images were looked at.
        source: where they are from.
        difference: the largest difference between two outputs.
        largest: the largest output.
        agree: of how many images the class is the same.
        as_evaluated: of how many it is the class that the run's own evaluation gives, which may compute in bfloat16.
        accuracy: of file and network, in percent; None where the classes are not known.
    """

    images: int
    source: str
    difference: float
    largest: float
    agree: int
    as_evaluated: int
    accuracy: tuple[float, float] | None


@attrs.frozen
class Exported:
    """A file that was written, and what is known of it.

    Args:
        path: the file.
        form: its format.
        quantized: whether it computes with int8.
        check: how it compares with the run's network.
        stored: what it stores.
        unquantized: bytes of the float32 file that a quantized one is made of; None for others.
    """

    path: Path
    form: str
    quantized: bool
    check: Check
    stored: Stored
    unquantized: int | None = None


def check(outputs: Tensor, expected: Tensor, evaluated: Tensor, targets: Tensor | None, source: str) -> Check:
    """Compare outputs of a file with those of the network in float32, and as the run evaluates it."""
    found, own = outputs.argmax(1), expected.argmax(1)
    accuracy = None
    if targets is not None:
        of_file, of_network = (100 * float((each == targets).double().mean()) for each in (found, own))
        accuracy = (of_file, of_network)
    return Check(
        images=len(outputs),
        source=source,
        difference=float((outputs - expected).abs().max()),
        largest=float(expected.abs().max()),
        agree=int((found == own).sum()),
        as_evaluated=int((found == evaluated.argmax(1)).sum()),
        accuracy=accuracy,
    )


def refuse(found: Check, quantized: bool) -> None:
    """Refuse a file that does not compute what the network does.

    Raises:
        RunError: it differs by more than rounding, or, where it is quantized, in more than a tenth of the classes.
    """
    if quantized and found.agree < AGREEMENT * found.images:
        raise RunError(
            f"the quantized network gives the same class as the run's for {found.agree} of {found.images} images "
            "alone, so nothing is written; export it without --quantize"
        )
    if not quantized and not found.difference <= TOLERANCE * max(1.0, found.largest):
        raise RunError(
            f"the exported network differs from the run's by {found.difference:.3g} on {found.source}, where outputs "
            f"reach {found.largest:.3g}, so nothing is written; that is a fault of the exporter or of trainkit"
        )


# ---- images


def _of_split(split: Split, count: int) -> tuple[Tensor, Tensor]:
    """Return some images of a split, evenly spaced, and their targets."""
    import torch

    indices = torch.linspace(0, len(split) - 1, min(count, len(split))).long().tolist()
    images, targets = zip(*(split[index] for index in indices), strict=True)
    return torch.stack(images), torch.tensor([int(target) for target in targets])


def _from_files(model: LoadedModel, paths: list[Path]) -> Tensor:
    import torch

    names = [name for path in paths for name in (find_images(path).paths if path.is_dir() else [str(path)])]
    if not names:
        raise DataError(f"{', '.join(map(str, paths))}: no images here")
    return torch.stack([model.read(name) for name in names[:IMAGES]])


def _open_data(run_dir: RunDir, overrides: list[str], model: LoadedModel, console: Console) -> Data:
    """Open the run's data set.

    Raises:
        UsageError: it cannot be opened, or is another one.
    """
    from trainkit.build import build

    try:
        data = build(load_recipe(run_dir.recipe_path(), overrides), console=console, dry=True).data
    except TrainkitError as problem:
        raise UsageError(
            f"the run's data set cannot be opened, and the file is checked on real images: {problem}; give others "
            "with --images, or say with --data where the data lie"
        ) from problem
    if (data.classes, data.shape) != (model.classes, model.shape):
        raise UsageError(
            "the data set that was opened has other classes or another shape than the one that the network was "
            "trained on, so nothing can be compared; say with --data where that one lies, or give images with --images"
        )
    return data


# ---- the model card

LOADING = {
    "onnx": """\
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession({file})
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
{image}array = np.array(image, np.uint8).reshape({height}, {width}, {channels}).transpose(2, 0, 1)
(logits,) = session.run(None, {{"images": array[None]}})
print(classes[int(logits[0].argmax())])
""",
    "torch-export": """\
import json

import numpy as np
import torch
from PIL import Image, ImageOps

facts = {{"trainkit.json": ""}}
network = torch.export.load({file}, extra_files=facts).module()
classes = json.loads(facts["trainkit.json"])["classes"]
{image}array = np.array(image, np.uint8).reshape({height}, {width}, {channels}).transpose(2, 0, 1)
with torch.no_grad():
    logits = network(torch.from_numpy(array)[None])
print(classes[int(logits[0].argmax())])
""",
    "safetensors": """\
import json

from safetensors import safe_open

with safe_open({file}, "pt") as file:
    metadata = file.metadata()
    weights = {{name: file.get_tensor(name) for name in file.keys()}}
weights |= {{name: weights[kept] for name, kept in json.loads(metadata["shared"]).items()}}
facts = json.loads(metadata["trainkit"])  # classes, shape, and what was done to an image
print(len(weights), "tensors;", len(facts["classes"]), "classes")
""",
}


#: How a snippet brings an image to size, as :func:`trainkit.images.resize_and_crop` does.
OPENED = 'image = ImageOps.exif_transpose(Image.open("image.png")).convert("{mode}")\n'
RESIZED = "image = image.resize(({width}, {height}), Image.Resampling.BILINEAR)\n"
CROPPED = """\
size, shorter = {size}, min(image.size)
image = image.resize([int(size * side / shorter) for side in image.size], Image.Resampling.BILINEAR)
left, top = [round((side - size) / 2) for side in image.size]
image = image.crop((left, top, left + size, top + size))
"""


def measured_of(run_dir: RunDir, model: LoadedModel, checkpoint: str) -> dict[str, float]:
    """Return what was measured of the weights that are exported.

    With a validation split the test split is evaluated at the run's end, on the weights of ``best``.
    """
    splits = as_mapping(_json(run_dir, "data.json").get("splits"))
    final = as_numbers(_json(run_dir, "result.json").get("final"))
    tested = {name: value for name, value in final.items() if name.startswith("test_")}
    return {**model.metrics, **(tested if checkpoint == "best" and "validation" in splits else {})}


def model_card(run_dir: RunDir, model: LoadedModel, measured: Mapping[str, float], exported: Exported) -> str:
    """Return a description of an exported network for whoever gets it, in Markdown.

    Every text that comes from a recipe, a data set or a name is written so that Markdown shows it and obeys none of it.
    """
    recipe, checked, kept, form = model.run.recipe, exported.check, exported.stored, exported.form
    splits = {
        name: split
        for name, split in as_mapping(_json(run_dir, "data.json").get("splits")).items()
        if isinstance(split, dict)
    }
    channels, height, width = model.shape
    classes = ", ".join(map(_text, model.classes[:CLASSES])) + (", ..." if len(model.classes) > CLASSES else "")
    facts = {
        "file": f"{_text(exported.path.name)}, {form}{', int8' if exported.quantized else ''}, {kept.file:,} bytes"
        + (f" ({exported.unquantized:,} before int8)" if exported.unquantized else ""),
        "takes": f"images, uint8 `[N, {channels}, {height}, {width}]`; normalization is inside",
        "gives": "logits, float32 `[N, classes]`",
        "classes": f"{len(model.classes)}: {classes}",
        "parameters": f"{model.run.parameters:,}",
        "weights": f"those that the run evaluated, epoch {model.epoch}",
        "shared kernels": f"{kept.sentence()}; {kept.tensors:,} bytes of tensors",
    }
    if form == "safetensors":
        facts["takes"] = "weights alone: the network and its preprocessing are those of the recipe below"
        del facts["gives"]
    compared = (
        f"The file was compared with the run's network on {checked.images} images ({_text(checked.source)}): the "
        f"largest difference of two outputs is {checked.difference:.3g}, where outputs reach {checked.largest:.3g}; "
        f"{checked.agree} of {checked.images} classes are the same."
    )
    if checked.accuracy is not None:
        compared += " Accuracy on them: {:.2f} % from the file, {:.2f} % from the run.".format(*checked.accuracy)
    places = {"size": model.resize, "mode": "L" if channels == 1 else "RGB"}
    places |= {"channels": channels, "height": height, "width": width}
    sized = OPENED + (CROPPED if isinstance(model.resize, int) else RESIZED)
    snippet = LOADING[form].format(file=ascii(exported.path.name), image=sized.format(**places), **places)
    limits = (
        "It knows the classes above and no others: every image gets one of them. Probabilities (softmax of the logits) "
        "are not calibrated. It was not tested on images of other sources than those above."
    )
    if form == "torch-export":
        limits += (
            " Load files of this format from people that you trust alone: torch does not promise that they run no code."
        )
    parts = [
        f"# {_text(recipe.name)}",
        _text(recipe.description) or "A network that classifies images.",
        f"Source: {_text(recipe.source)}" if recipe.source else "",
        _table(["", ""], facts.items()),
        "## Result",
        _table([f"epoch {model.epoch}", "measured"], ((_text(n), number(v)) for n, v in measured.items())),
        _table(["", "expected"], ((_text(n), number(v)) for n, v in recipe.expect.items())) if recipe.expect else "",
        compared,
        "## Data",
        _table(
            ["split", "images", "content"],
            ((_text(n), _text(s.get("images", "-")), _text(s.get("content", "-"))) for n, s in splits.items()),
        ),
        f"Images are resized to {_resize(model.resize)} as the recipe's data plugin does it, upright and on white.",
        "## Load it",
        _fenced(snippet, "python"),
        "## What it was made with",
        _fenced(_without_places(recipe).to_yaml(), "yaml"),
        _table(["", ""], ((name, _text(v)) for name, v in _environment(_json(run_dir, "environment.json")).items())),
        "## Limits",
        limits,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(columns: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _text(value: object) -> str:
    """Return text that Markdown shows as it is, on one line."""
    line = " ".join(printable(value).split())
    return "".join(f"\\{letter}" if letter in r"\`*_[]<>|~$&#!" else letter for letter in line)


def _without_places(recipe: Recipe) -> Recipe:
    """Return a recipe in which a file or folder that is given by its absolute path has its name alone."""

    def shortened(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shortened(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [shortened(inner) for inner in value]
        for kind in (PurePosixPath, PureWindowsPath):
            if isinstance(value, str) and (kind(value).is_absolute() or value.startswith("~")):
                return kind(value).name
        return value

    return attrs.evolve(recipe, plugins=shortened(recipe.plugins))


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _json(run_dir: RunDir, name: str) -> dict[str, Any]:
    try:
        return as_mapping(run_dir.read_json(name))
    except TrainkitError:
        return {}


def _environment(recorded: Mapping[str, Any]) -> dict[str, Any]:
    packages = as_mapping(recorded.get("packages"))
    found = {"trainkit": as_mapping(recorded.get("trainkit")).get("version"), "revision": recorded.get("revision")}
    found |= {"torch": packages.get("torch"), "Python": recorded.get("python"), "CPU": recorded.get("processor")}
    found |= {"device": recorded.get("device"), "GPU": as_mapping(recorded.get("gpu")).get("model")}
    return {name: value for name, value in found.items() if value}


def _resize(size: int | tuple[int, int]) -> str:
    if isinstance(size, int):
        return f"{size} pixels on the shorter side, and a square is cropped from the centre,"
    return f"{size[0]} x {size[1]} pixels"


# ---- the command


class _Export:
    """``trainkit export``."""

    HELP = "Export a run's network with its preprocessing and class names, checked on real images, with a model card."
    EXAMPLES = """\
examples:
  trainkit export runs/photos/20260101-120000-0 --format onnx
  trainkit export runs/photos/20260101-120000-0 --format onnx --quantize -o small.onnx
  trainkit export runs/photos/20260101-120000-0 --format safetensors --images new/
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a run")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of its recipe")
        parser.add_argument("--data", metavar="ROOT", help="where the data lie, their plugin's option root")
        parser.add_argument("--format", choices=list(FORMATS), default="onnx", help="default: onnx")
        parser.add_argument("--quantize", action="store_true", help="int8 weights and activations; onnx alone")
        parser.add_argument("--checkpoint", default="best", metavar="NAME", help="best (default) or last")
        parser.add_argument(
            "--images", nargs="+", metavar="PATH", type=Path, help="check on these, not on the run's test images"
        )
        parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="default: the recipe's name")
        parser.add_argument("--json", action="store_true", help="print JSON")
        add_allow_local(parser)

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Export, check, and write file and model card, or neither."""
        form: Literal["onnx", "torch-export", "safetensors"] = args.format
        if args.quantize and form != "onnx":
            raise UsageError(f"--quantize: int8 is offered for onnx, and not for {form}")
        if missing := [name for name in PACKAGES[form] if find_spec(name) is None]:
            raise UsageError(f"--format {form}: packages are missing: `pip install {' '.join(missing)}`")
        run_dir = RunDir(args.run_dir)
        path = run_dir.recipe_path()
        overrides: list[str] = list(args.overrides)
        if args.data is not None:
            overrides.append(data_root(load_recipe(path, overrides), args.data))
        numerics.prepare(load_recipe(path, overrides))
        from trainkit.inference import load_model

        console = terminal(stderr=args.json)
        model = load_model(args.run_dir, args.checkpoint, device="cpu")
        if not model.has_class_targets:
            raise UsageError(f"{args.run_dir}: its targets are no classes, and what is exported tells classes")
        output: Path = args.output or Path(f"{model.recipe}{FORMATS[form]}")
        if output.suffix != FORMATS[form]:
            raise UsageError(f"{output}: the name of a file of this format ends in {FORMATS[form]}")
        if output.resolve().is_relative_to(run_dir.path.resolve()):
            raise UsageError(f"{output}: lies in the run's directory, which stays as the run left it; write elsewhere")
        network = deployable(model)
        images = _images(args.images, run_dir, overrides, model, console)
        measured = measured_of(run_dir, model, args.checkpoint)
        facts = _facts(run_dir, model, measured)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"network{FORMATS[form]}"
            what = (path, form, args.quantize)
            exported = attrs.evolve(_export(model, network, facts, images, what), path=output)
            card = output.with_name(f"{output.name}.md")
            text = model_card(run_dir, model, measured, exported)
            _write(output, read_regular(path, LARGEST), card, text)
        if args.json:
            print_json({**attrs.asdict(exported), "path": str(output), "card": str(card)})
            return 0
        checked, kept = exported.check, exported.stored
        rows = [
            ("checked on", f"{checked.images} images: {checked.source}"),
            ("largest difference", f"{checked.difference:.3g}, of outputs up to {checked.largest:.3g}"),
            ("same class", f"{checked.agree} of {checked.images}; as evaluated: {checked.as_evaluated}"),
        ]
        if checked.accuracy is not None:
            rows.append(
                ("accuracy on these", "{:.2f} % from the file, {:.2f} % from the run".format(*checked.accuracy))
            )
        rows.append(("stored", f"{kept.file:,} bytes, {kept.tensors:,} of tensors; the network has {kept.network:,}"))
        if exported.unquantized is not None:
            rows.append(("before int8", f"{exported.unquantized:,} bytes"))
        rows.append(("shared kernels", kept.sentence()))
        console.print(table(["export", ""], rows))
        for each in (output, card):
            console.print(printable(each), markup=False, highlight=False, soft_wrap=True)
        return 0


def _write(output: Path, content: bytes, card: Path, text: str) -> None:
    """Write a file and its model card, or neither.

    Raises:
        UsageError: one of them cannot be written.
    """
    for path, data in ((output, content), (card, text)):
        try:
            atomic_write(path, data)
        except OSError as problem:
            if path is card:
                output.unlink()
            raise UsageError(f"{path}: cannot be written: {problem.strerror}") from problem


@attrs.frozen
class Images:
    """What a file is checked on.

    Args:
        images: uint8 [N, C, H, W].
        targets: int64 [N], or None where they are not known.
        calibration: other images, uint8, for the ranges of a quantized network.
        source: where the images are from.
        evaluated: what the run's evaluation gives for them.
    """

    images: Tensor
    targets: Tensor | None
    calibration: Tensor
    source: str
    evaluated: Tensor


def _images(
    paths: list[Path] | None, run_dir: RunDir, overrides: list[str], model: LoadedModel, console: Console
) -> Images:
    if paths:
        images = _from_files(model, paths)
        return Images(images, None, images, ", ".join(path.name for path in paths), model.outputs(images))
    data = _open_data(run_dir, overrides, model, console)
    images, targets = _of_split(data.test, IMAGES)
    calibration, _ = _of_split(data.train, IMAGES)
    return Images(images, targets, calibration, _described(data.test, run_dir), model.outputs(images))


def _described(test: Split, run_dir: RunDir) -> str:
    """Return which images these are: those that the run was tested on, or others."""
    from trainkit.provenance import fingerprint

    recorded = as_mapping(as_mapping(_json(run_dir, "data.json").get("splits")).get("test")).get("content")
    return "of the test split" if fingerprint(test) == recorded else "of a test split that is not the run's own"


def _facts(run_dir: RunDir, model: LoadedModel, measured: Mapping[str, float]) -> dict[str, Any]:
    """Return what a file says of its network, as JSON can hold it: without NaN and infinity."""
    return {
        "recipe": model.recipe,
        "epoch": model.epoch,
        "classes": list(model.classes),
        "shape": list(model.shape),
        "metrics": {name: value if math.isfinite(value) else None for name, value in measured.items()},
        "data": {name: value for name, value in _json(run_dir, "data.json").items() if name != "splits"},
    }


def _export(
    model: LoadedModel, network: nn.Module, facts: dict[str, Any], of: Images, what: tuple[Path, str, bool]
) -> Exported:
    """Write a file and compare it with the network.

    Args:
        model: the run's network.
        network: from :func:`deployable`.
        facts: what the file says of it.
        of: the images that it is checked on.
        what: the file, its format, and whether to quantize.
    """
    import torch

    from trainkit.inference import pack_safetensors

    path, form, quantized = what
    with torch.no_grad():
        expected = torch.cat([network(part) for part in _parts(of.images)])
    if form == "safetensors":
        path.write_bytes(pack_safetensors(model.model, facts))
    else:
        (export_onnx if form == "onnx" else export_torch)(network, model.shape, facts, path)
    found = check(run_file(path, form, of.images, model), expected, of.evaluated, of.targets, of.source)
    refuse(found, quantized=False)
    unquantized = None
    if quantized:
        whole = path.rename(path.with_name("whole.onnx"))
        unquantized = whole.stat().st_size
        quantize(whole, path, of.calibration.numpy())
        source = of.source + ("; int8 is calibrated on the same images" if of.targets is None else "")
        found = check(run_file(path, form, of.images, model), expected, of.evaluated, of.targets, source)
        refuse(found, quantized=True)
    return Exported(path, form, quantized, found, stored(path, form, model.model), unquantized)


EXPORT = _Export
