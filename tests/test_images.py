"""Image files as they come: of every depth, turned, transparent, damaged, huge, and no files at all."""

import os
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from trainkit import images
from trainkit.errors import DataError
from trainkit.images import IMAGE_SUFFIXES, MAX_RATIO, find_images, open_image, read_image, resize_and_crop

on_disk = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs and links")


def picture(seed, width, height, channels=3):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values.squeeze())


def saved(path, image, **options):
    image.save(path, **options)
    return read_image(path)


def png(width, height, depth=8, colour=0, lines=b""):
    """A PNG file that claims to have this size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(width, bits, photometric, line):
    """A TIFF file of one line."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(line)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(line)) + line + directory


# ---- depth


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff", "pgm"])
def test_a_ramp_of_16_bits_keeps_its_levels(tmp_path, kind):
    ramp = np.linspace(0, 65535, 32).astype(np.uint16).reshape(4, 8)
    if kind == "pgm":
        (tmp_path / "x").write_bytes(b"P5\n8 4\n65535\n" + ramp.astype(">u2").tobytes())
    elif kind == "big-endian tiff":
        Image.frombytes("I;16B", (8, 4), ramp.astype(">u2").tobytes()).save(tmp_path / "x", format="TIFF")
    else:
        Image.fromarray(ramp).save(tmp_path / "x", format=kind)
    image = read_image(tmp_path / "x")
    assert image.dtype == torch.uint8
    assert image.shape == (3, 4, 8)
    assert torch.equal(image[0], torch.from_numpy(np.rint(ramp / 257).astype(np.uint8)))
    assert len(image.unique()) == 32


def test_16_bits_of_each_colour_keep_their_levels(tmp_path):
    ramp = np.linspace(0, 65535, 32).astype(">u2")
    line = b"\0" + np.stack([ramp, ramp[::-1], ramp], -1).tobytes()
    (tmp_path / "x").write_bytes(png(32, 1, 16, 2, line))
    assert [len(channel.unique()) for channel in read_image(tmp_path / "x")] == [32] * 3


@on_disk
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=50))
def test_16_bits_are_scaled_from_their_whole_range(tmp_path, values):
    image = saved(tmp_path / "x.png", Image.fromarray(np.array([values], np.uint16)))
    assert image[0, 0].tolist() == [round(value / 257) for value in values]


def test_12_bits_are_scaled_from_theirs(tmp_path):
    (tmp_path / "x").write_bytes(tiff(4, 12, 1, bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x10])))
    expected = [round(value * 255 / 4095) for value in (0, 4095, 2048, 16)]
    assert read_image(tmp_path / "x")[0, 0].tolist() == expected


@pytest.mark.parametrize("bits", [8, 16])
def test_white_may_be_0(tmp_path, bits):
    line = np.linspace(0, 2**bits - 1, 32).astype(f"<u{bits // 8}").tobytes()
    (tmp_path / "x").write_bytes(tiff(32, bits, 0, line))
    found = read_image(tmp_path / "x")[0, 0].tolist()
    assert (found[0], found[-1]) == (255, 0)
    assert len({*found}) == 32


@on_disk
@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=2, max_size=40))
def test_floats_are_scaled_by_their_range(tmp_path, values):
    array = np.array([values], np.float32)
    line = saved(tmp_path / "x.tiff", Image.fromarray(array))[0, 0].numpy()
    exact = array[0].astype(np.float64)
    low, high = exact.min(), exact.max()
    if low >= 0 and high <= 1:
        assert line.tolist() == np.rint(exact * 255).tolist()
    elif low < high:
        assert (line[exact.argmin()], line[exact.argmax()]) == (0, 255)
        assert np.abs((exact - low) / (high - low) * 255 - line).max() <= 0.5 + 1e-9
    else:
        assert not line.any()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 0.25], [0, 64]),
        ([np.nan, 10, 20, np.inf, -np.inf], [0, 0, 255, 255, 0]),
        ([-3e38, 3e38, 0], [0, 255, 128]),
        ([7, 7], [0, 0]),
    ],
)
def test_odd_floats(tmp_path, values, expected):
    image = saved(tmp_path / "x.tiff", Image.fromarray(np.array([values], np.float32)))
    assert image[0, 0].tolist() == expected


def test_floats_without_a_finite_one_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(DataError, match=r"x\.tiff: cannot be decoded: it holds no finite value; replace"):
        read_image(tmp_path / "x.tiff")


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 257, 65535], [0, 1, 255]), ([-100, 0, 100], [0, 128, 255]), ([0, 2**31 - 1], [0, 255])],
)
def test_32_bits(tmp_path, values, expected):
    image = saved(tmp_path / "x.tiff", Image.fromarray(np.array([values], np.int32)))
    assert image[0, 0].tolist() == expected


# ---- colours


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", ["1", "L", "P", "RGB", "CMYK", "LA", "RGBA", "PA"])
def test_white_stays_white_and_black_black(tmp_path, kind, mode):
    image = Image.new("RGB", (4, 2), (255, 255, 255))
    image.paste((0, 0, 0), (2, 0, 4, 2))
    image = image.convert("P").convert("PA") if kind == "PA" else image.convert(kind)
    path = tmp_path / ("x.tiff" if kind != "PA" else "x.png")
    (image if kind != "PA" else image.convert("RGBA")).save(path)
    found = read_image(path, mode)
    assert found.shape == (3 if mode == "RGB" else 1, 2, 4)
    assert (found[:, :, :2] == 255).all()
    assert (found[:, :, 2:] == 0).all()


@on_disk
@given(st.tuples(*[st.integers(0, 255)] * 4))
def test_transparency_is_put_on_white(tmp_path, colour):
    image = saved(tmp_path / "x.png", Image.new("RGBA", (1, 1), colour))
    alpha = colour[3] / 255
    for value, expected in zip(image.flatten().tolist(), colour[:3], strict=True):
        assert abs(value - (expected * alpha + 255 * (1 - alpha))) <= 1


def test_a_transparent_colour_or_palette_entry_is_white(tmp_path):
    grey = saved(tmp_path / "grey.png", Image.new("L", (2, 2), 40), transparency=40)
    colour = saved(tmp_path / "colour.png", Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([9, 9, 9, 8, 8, 8])
    of_png = saved(tmp_path / "palette.png", palette, transparency=bytes([255, 0]))
    of_gif = saved(tmp_path / "palette.gif", palette, transparency=1)
    deep = saved(tmp_path / "deep.png", Image.fromarray(np.full((2, 2), 600, np.uint16)), transparency=600)
    for image in (grey, colour, of_png, of_gif, deep):
        assert (image == 255).all()
    assert (saved(tmp_path / "other.gif", palette, transparency=0) == 8).all()


def test_a_grey_value_of_two_channels_is_not_its_alpha(tmp_path):
    image = saved(tmp_path / "x.png", Image.fromarray(np.full((1, 1, 2), [77, 255], np.uint8), "LA"))
    assert image.flatten().tolist() == [77] * 3


def test_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (255, 0, 99)]
    for kind in ("gif", "png", "tiff", "mpo"):
        image = saved(tmp_path / f"x.{kind}", frames[0], save_all=True, append_images=frames[1:])
        assert (image[:, 0, 0] - torch.tensor([255, 0, 0])).abs().max() <= 2


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_can_be_read(tmp_path, suffix):
    kind = {".jpe": "JPEG", ".jfif": "JPEG", ".apng": "PNG", ".tif": "TIFF", ".jpg": "JPEG", ".pgm": "PPM"}
    name = kind.get(suffix, suffix[1:].upper())
    name = "PPM" if name in ("PBM", "PNM") else name
    if name.lower() in ("avif", "webp") and not features.check(name.lower()):
        pytest.skip(f"this Pillow has no {name}")
    Image.new("1" if suffix == ".pbm" else "RGB", (8, 8), "white").save(tmp_path / f"x{suffix.upper()}", format=name)
    assert find_images(tmp_path).paths == [str(tmp_path / f"x{suffix.upper()}")]
    assert (read_image(tmp_path / f"x{suffix.upper()}") >= 250).all()


# ---- orientation


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_upright(tmp_path, kind, orientation):
    upright = picture(1, 16, 8)
    backwards = [None, None, 0, 3, 1, 5, 2, 6, 4]  # Pillow's names for what turns an upright image into that
    stored = upright
    if 2 <= orientation <= 8:
        stored = upright.transpose(Image.Transpose(backwards[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"jpeg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    image = saved(tmp_path / f"x.{kind}", stored, exif=exif, **options)
    assert image.shape == (3, 8, 16)
    assert (image.int() - PILToTensor()(upright).int()).abs().max() <= (4 if kind == "jpeg" else 0)


def test_16_bits_are_turned_too(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    image = saved(tmp_path / "x.png", Image.fromarray(np.array([[0, 65535]], np.uint16)), exif=exif)
    assert image[0].tolist() == [[0], [255]]


def test_damaged_exif_is_no_obstacle(tmp_path):
    assert saved(tmp_path / "x.jpg", Image.new("RGB", (8, 4)), exif=b"Exif\0\0II*\0\xff\xff\xff\xffrubbish").shape == (
        (3, 4, 8)
    )


# ---- what is no image


@on_disk
@given(st.integers(0, 400), st.sampled_from(["png", "jpeg", "gif", "tiff", "bmp", "webp"]))
def test_a_cut_file_is_named_or_whole(tmp_path, kept, kind):
    path = tmp_path / f"x.{kind}"
    picture(0, 12, 12).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    said = ""
    try:
        assert read_image(path).shape == (3, 12, 12)
    except DataError as error:
        said = str(error)
    assert not said or (said.startswith(f"{path}: ") and said.endswith("; replace or remove it") and "0x" not in said)


@on_disk
@given(st.binary(max_size=200))
def test_rubbish_is_a_data_error(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.jpg: cannot be decoded: none of JPEG, .*; replace or remove it"):
        read_image(tmp_path / "x.jpg")


def test_formats_that_start_other_programs_are_not_offered(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.jpg")
    with pytest.raises(DataError, match="cannot be decoded: none of"):
        read_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("size", [(1, 400_000), (400_000, 1), (65_535, 65_535), (2**31 - 1, 2**31 - 1), (9_500, 9_500)])
def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, size):
    (tmp_path / "x.png").write_bytes(png(*size))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"x\.png: .*pixels.*reduce or remove it"):
        read_image(tmp_path / "x.png")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**7


@posix
def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    for name in ("fifo.png", "zero.png", ".", "/dev/null"):
        with pytest.raises(DataError, match="cannot be read: no regular file; remove it"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match=r"absent\.png: cannot be read: No such file"):
        read_image(tmp_path / "absent.png")


def test_files_are_bounded_by_what_is_read(tmp_path, monkeypatch):
    path = tmp_path / "x.bmp"
    picture(0, 8, 8).save(path)
    monkeypatch.setattr(images, "MAX_BYTES", path.stat().st_size)
    read_image(path)
    monkeypatch.setattr(images, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(DataError, match="bytes.*are allowed; reduce or remove it"):
        read_image(path)
    true, claimed = os.fstat, list(os.stat(path))
    claimed[6] = 0  # as files in /proc say
    monkeypatch.setattr(os, "stat", lambda path: os.stat_result(claimed))
    monkeypatch.setattr(os, "fstat", lambda handle: os.stat_result([*list(true(handle))[:6], 0, 0, 0, 0]))
    with pytest.raises(DataError, match=r"x\.bmp: more than \d+ bytes; reduce or remove it"):
        read_image(path)


# ---- find


def test_images_are_found_in_order(tmp_path):
    for name in ("b/2.png", "b/10.PNG", "a.jpg", "b/c/x.gif", "z.tif", ".hidden.png", ".git/x.png", "b/._2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("notes.txt", "b/more.txt", "b/Thumbs.db", "README"):
        (tmp_path / name).touch()
    found = find_images(tmp_path)
    expected = ["a.jpg", "b/10.PNG", "b/2.png", "b/c/x.gif", "z.tif"]
    assert found.paths == [str(tmp_path / name) for name in expected]
    assert found.passed_over == {".txt": 2, ".db": 1, "": 1}


@posix
def test_links_are_followed_and_broken_or_endless_ones_named(tmp_path):
    real = tmp_path / "real"
    (tmp_path / "top").mkdir()
    real.mkdir()
    (real / "1.png").touch()
    for name in ("a", "b"):
        (tmp_path / "top" / name).symlink_to(real)
    top = tmp_path / "top"
    assert find_images(top).paths == [str(top / "a" / "1.png"), str(top / "b" / "1.png")]
    (real / "up").symlink_to(top)
    with pytest.raises(DataError, match=r"a.up: a link to a folder that it lies in"):
        find_images(top)
    (real / "up").unlink()
    (real / "gone.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone\.png: a broken link to nowhere: No such file.*; remove it"):
        find_images(top)
    (real / "gone.png").unlink()
    (real / "self").symlink_to("self")
    with pytest.raises(DataError, match=r"self: a broken link to self: .*; remove it"):
        find_images(top)
    (real / "self").unlink()
    os.mkfifo(real / "2.png")
    with pytest.raises(DataError, match=r"2\.png: named as an image and no regular file; remove it"):
        find_images(top)


def test_absent_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="absent: No such file"):
        find_images(tmp_path / "absent")


# ---- resize


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_sizes_are_those_of_torchvision(width, height, first, second, square):
    image = picture(0, width, height)
    if square and max(width, height) > MAX_RATIO * min(width, height):
        assert resize_and_crop(image, first).shape == (3, first, first)
        return
    steps = [Resize(first), CenterCrop(first)] if square else [Resize((first, second))]
    expected = Compose([*steps, PILToTensor()])(image)
    assert torch.equal(resize_and_crop(image, first if square else (first, second)), expected)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 65_535)])
def test_a_very_long_image_is_cropped_before_it_is_resized(tmp_path, size):
    resource = pytest.importorskip("resource")
    strip = Image.new("L", size, 0)
    middle = [side // 2 for side in size]
    strip.paste(200, (max(0, middle[0] - 100), max(0, middle[1] - 100), middle[0] + 100, middle[1] + 100))
    strip.save(tmp_path / "x.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image = resize_and_crop(open_image(tmp_path / "x.png"), 224)
    assert image.shape == (3, 224, 224)
    assert (image == 200).all()
    resize_and_crop(open_image(tmp_path / "x.png"), (224, 224))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10  # KiB


def test_one_channel(tmp_path):
    picture(0, 9, 7).save(tmp_path / "x.png")
    grey = read_image(tmp_path / "x.png", "L")
    assert grey.shape == (1, 7, 9)
    assert torch.equal(grey, PILToTensor()(picture(0, 9, 7).convert("L")))
    assert resize_and_crop(open_image(tmp_path / "x.png", "L"), 4).shape == (1, 4, 4)
