"""Image files: the one place where they are found, read and brought to 8 bits and to size.

Every limit holds for what is really read and decoded, whatever a file or its folder says of itself. Pillow is imported
when the first image is read.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import attrs
import numpy as np
from numpy.typing import NDArray

from trainkit.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_BYTES",
    "MAX_PIXELS",
    "MAX_SIDE",
    "FoundImages",
    "Size",
    "displayed",
    "entries",
    "find_images",
    "open_image",
    "read_file",
    "read_image",
    "resize_and_crop",
    "to_tensor",
]

#: How the names of image files end, in lower case.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
#: The formats behind these names. Pillow is offered no others: it hands some, such as EPS, to programs that it starts.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM")

MAX_BYTES = 2**28  #: of a file
MAX_SIDE = 65_535  #: pixels of an image's width and height: the most that JPEG can hold
MAX_PIXELS = 2**30 // 12  #: pixels of an image, 89 million: Pillow warns of more
MAX_RATIO = 16  #: of an image's longer side to its shorter one, before the sides beyond are cropped

ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 274, 258, 262  # tags of EXIF and of TIFF

#: One number is the side of a square; two are height and width.
Size = int | tuple[int, int]


# ---- find


@attrs.frozen
class FoundImages:
    """What :func:`find_images` finds.

    Args:
        paths: the image files, in the order of their names, folder by folder.
        passed_over: how many files are no images, by the ends of their names.
    """

    paths: list[str]
    passed_over: Counter[str]


def find_images(folder: str | os.PathLike[str]) -> FoundImages:
    """Find the images in a folder and in the folders below it; hidden files and folders are passed over.

    Links are followed.

    Raises:
        DataError: a folder cannot be read, a link is broken or leads back to a folder above it, or what is named as an
            image is no regular file.
    """
    top = os.fspath(folder)
    found = FoundImages([], Counter())
    # Files and folders share one order. A folder waits with the folders above it; a file, which has none, with None.
    waiting: list[tuple[str, frozenset[tuple[int, int]] | None]] = [(top, frozenset())]
    while waiting:
        path, above = waiting.pop()
        if above is None:
            found.paths.append(path)
            continue
        identity = _identity(path)
        if identity in above:
            raise DataError(f"{path}: a link to a folder that it lies in, which has no end; remove it")
        inside: list[tuple[str, frozenset[tuple[int, int]] | None]] = []
        for entry, status in entries(path):
            if stat.S_ISDIR(status.st_mode):
                inside.append((entry.path, above | {identity}))
            elif not entry.name.lower().endswith(IMAGE_SUFFIXES):
                found.passed_over[os.path.splitext(entry.name)[1].lower()] += 1
            elif stat.S_ISREG(status.st_mode):
                inside.append((entry.path, None))
            else:
                raise DataError(f"{entry.path}: named as an image and no regular file; remove it")
        waiting += reversed(inside)
    return found


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    return status.st_dev, status.st_ino


def entries(folder: str | os.PathLike[str]) -> list[tuple[os.DirEntry[str], os.stat_result]]:
    """Return what a folder holds, sorted by name, each with its status; hidden names are passed over.

    Raises:
        DataError: the folder cannot be read, or a link in it is broken.
    """
    found = []
    try:
        with os.scandir(folder) as listing:
            visible = [entry for entry in listing if not entry.name.startswith(".")]
        for entry in visible:
            try:
                found.append((entry, os.stat(entry.path)))
            except OSError as error:
                if not entry.is_symlink():
                    raise
                target = os.readlink(entry.path)
                raise DataError(f"{entry.path}: a broken link to {target}: {error.strerror}; remove it") from error
    except OSError as error:
        raise DataError(f"{error.filename or os.fspath(folder)}: {error.strerror}") from error
    return sorted(found, key=lambda pair: pair[0].name)


# ---- read


def read_file(path: str | os.PathLike[str]) -> tuple[bytes, os.stat_result]:
    """Return a regular file's content, and its status from before it was read.

    Raises:
        DataError: it cannot be read, is no regular file, or holds more than :data:`MAX_BYTES`.
    """
    try:
        _refuse_others(path, os.stat(path))  # opening some devices has effects of its own
        # A FIFO that takes the file's place now would keep this process waiting.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb", buffering=0) as file:
            status = os.fstat(handle)
            _refuse_others(path, status)
            blocks = []
            left = MAX_BYTES + 1
            block_size = max(min(status.st_size, MAX_BYTES) + 1, 1 << 16)
            while left and (block := file.read(min(left, block_size))):
                blocks.append(block)
                left -= len(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not left:
        raise DataError(f"{path}: more than {MAX_BYTES:,} bytes; reduce or remove it")
    return b"".join(blocks), status


def _refuse_others(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: cannot be read: no regular file; remove it")
    if status.st_size > MAX_BYTES:
        raise DataError(f"{path}: {status.st_size:,} bytes, and {MAX_BYTES:,} are allowed; reduce or remove it")


def read_image(path: str | os.PathLike[str], mode: Literal["RGB", "L"] = "RGB") -> Tensor:
    """Return an image file as uint8 [C, H, W]; see :func:`open_image`."""
    return to_tensor(open_image(path, mode))


def open_image(path: str | os.PathLike[str], mode: Literal["RGB", "L"] = "RGB") -> Image:
    """Return an image file decoded, upright, opaque and with 8 bits.

    * It is turned as its EXIF orientation says.
    * Transparency is put on white.
    * 16 bits are scaled from 0..65535 (TIFF of 12 bits: 0..4095), and so are 32-bit integers in 0..65535.
    * Floats in 0..1 are scaled by 255. Other floats, and other 32-bit integers, are scaled by their own range: the
      least value of the image becomes 0 and the greatest 255. NaN counts as the least value, infinity as the end of
      the range.
    * Colour profiles are not applied. Of several frames or pages it is the first.

    Args:
        path: a regular file of one of the formats :data:`FORMATS`, whatever its name.
        mode: ``RGB`` or, for one channel, ``L``.

    Raises:
        DataError: the file cannot be read or decoded, or is larger than :data:`MAX_BYTES`, :data:`MAX_SIDE` or
            :data:`MAX_PIXELS`.
    """
    from PIL import Image, UnidentifiedImageError

    content, _ = read_file(path)
    try:
        with Image.open(BytesIO(content), formats=_formats()) as image:
            _check_size(path, image.size)
            image.load()
            _check_size(path, image.size)  # some formats know their size only now
            return _upright(_opaque(_eight_bits(image), mode), _orientation(image))
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: more than {MAX_PIXELS:,} pixels; reduce or remove it") from error
    except UnidentifiedImageError as error:
        kinds = ", ".join(_formats())
        raise DataError(f"{path}: cannot be decoded: none of {kinds}; replace or remove it") from error
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = str(error) or type(error).__name__
        raise DataError(f"{path}: cannot be decoded: {reason}; replace or remove it") from error


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that this Pillow can read."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(path: str | os.PathLike[str], size: tuple[int, int]) -> None:
    width, height = size
    if max(size) > MAX_SIDE or width * height > MAX_PIXELS:
        raise DataError(
            f"{path}: {width:,}x{height:,} pixels, and {MAX_SIDE:,} a side and {MAX_PIXELS:,} in all are allowed; "
            "reduce or remove it"
        )


def _eight_bits(image: Image) -> Image:
    """Return an image of 16 bits, 32 bits or floats scaled to 8 bits, and others as they are."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    from PIL import Image

    values = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode == "F":
        scaled = _by_range(values, unit=True)
    elif image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        scaled = _by_range(values, unit=False)
    else:
        most = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
        scaled = ((values.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # white is 0; up to Pillow 13.0 that is heeded for 8 bits only
        scaled = 255 - scaled
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # this value, which scaling may give to others
        scaled[values == transparent] = 255
    return Image.fromarray(scaled)


def _by_range(values: NDArray[Any], unit: bool) -> NDArray[np.uint8]:
    """Scale [H, W] to bytes by the range of its finite values; `unit`: values in 0..1 are scaled by 255."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("it holds no finite value")
    low, high = float(finite.min()), float(finite.max())
    if unit and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = np.empty(values.shape, np.uint8)
    for line, result in zip(values, scaled, strict=True):  # a line at a time, because float64 takes 8 bytes a pixel
        inside = np.nan_to_num(line.astype(np.float64), nan=low, posinf=high, neginf=low)
        result[:] = np.rint((inside - low) * 255 / ((high - low) or 1))
    return scaled


def _opaque(image: Image, mode: Literal["RGB", "L"]) -> Image:
    """Return an image in `mode`, on white where it is transparent."""
    if image.has_transparency_data:
        from PIL import Image

        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colours.size, (255, 255, 255, 255)), colours)
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF does not make the pixels unreadable
        return 1


def _upright(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(orientation)
    return image if turn is None else image.transpose(turn)


# ---- resize


def resize_and_crop(image: Image, size: Size) -> Tensor:
    """Return an image at a size, uint8 [C, H, W], as torchvision's ``Resize`` and ``CenterCrop`` do with Pillow.

    Args:
        image: from :func:`open_image`.
        size: one number: the shorter side is resized to it (bilinear, antialiased), then a square is cropped from the
            centre. Of an image more than :data:`MAX_RATIO` times as long as wide, what lies beyond that around the
            centre is cropped first: it would be resized to be thrown away. Two numbers: height and width, whatever the
            proportions were.
    """
    from torchvision.transforms.functional import center_crop, resize  # type: ignore[import-untyped]

    if isinstance(size, int):
        width, height = image.size
        longest = MAX_RATIO * min(image.size)
        if max(image.size) > longest:
            left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
            image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
        return to_tensor(center_crop(resize(image, [size]), [size]))
    return to_tensor(resize(image, list(size)))


def to_tensor(image: Image) -> Tensor:
    """Return an image of 8 bits a channel as uint8 [C, H, W]."""
    import torch

    pixels = np.asarray(image)
    channels_first = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
    return torch.from_numpy(np.array(channels_first, order="C"))  # a copy, which may be written


def displayed(image: Tensor) -> NDArray[Any]:
    """Return an image as matplotlib draws it, [H, W, C].

    Args:
        image: [C, H, W] on the CPU. Of other than 1 or 3 channels the first alone is drawn.
    """
    shown = image if len(image) == 3 else image[:1]
    array: NDArray[Any] = shown.permute(1, 2, 0).numpy()
    return array
