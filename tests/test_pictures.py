"""What the training example makes of pictures of every kind, and of files that are none."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torchvision")
pytest.importorskip("lightning")
import pictures
from pictures import LabelledPictures, PictureError, as_seen, check_pictures
from PIL import Image

WHITE = (255, 255, 255)


def saved(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The image as it comes back from a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer)


def grey(*values: float, dtype: Any = np.uint16) -> Image.Image:
    """A picture of one row."""
    return Image.fromarray(np.array([values], dtype=dtype))


def seen(image: Image.Image, white: int = 65535) -> list[tuple[int, ...]]:
    """The pixels, row by row, of what a person sees."""
    result = as_seen(image, white)
    assert result.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(result).reshape(-1, 3).tolist()]


# --- What a person sees --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        saved(grey(0, 32768, 65535), "PNG"),
        saved(grey(0, 32768, 65535), "TIFF"),
        saved(grey(65535, 32767, 0), "TIFF", tiffinfo={262: 0}),  # 0 is white
        grey(0, 32768, 65535, dtype=">u2"),
        saved(grey(0, 32768, 65535, dtype=np.int32), "TIFF"),
        saved(grey(0, 0.5, 1, dtype=np.float32), "TIFF"),
    ],
    ids=["png16", "tiff16", "inverted", "bigendian", "integer", "float"],
)
def test_grey_of_more_than_8_bits(image: Image.Image) -> None:
    assert image.mode in ("I;16", "I;16B", "I", "F")
    assert seen(image) == [(0, 0, 0), (128, 128, 128), WHITE]


def test_grey_of_12_bits() -> None:
    image = saved(grey(0, 16, 2048, 4095), "PNG")
    assert [pixel[0] for pixel in seen(image, 4095)] == [0, 1, 128, 255]
    assert [pixel[0] for pixel in seen(image)] == [0, 0, 8, 16]


@pytest.mark.parametrize(
    ("image", "white", "message"),
    [
        (grey(0, 4096), 4095, "go from 0 to 4096, but 0 is black and 4095 is white: scale them"),
        (grey(0, 70000, dtype=np.int32), 65535, "go from 0 to 70000, but 0 is black and 65535 is white"),
        (grey(-3, 7, dtype=np.int32), 65535, "go from -3 to 7"),
        (grey(0, 1.5, dtype=np.float32), 65535, "go from 0 to 1.5, but 0 is black and 1 is white"),
        (grey(0, np.nan, dtype=np.float32), 65535, "go from nan to nan"),
        (grey(0, np.inf, dtype=np.float32), 65535, "go from 0 to inf"),
    ],
)
def test_refuses_grey_that_has_no_white(image: Image.Image, white: int, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        as_seen(image, white)


def test_what_is_transparent_is_white() -> None:
    colours = Image.new("RGBA", (3, 1), (200, 0, 0, 0))
    colours.putpixel((1, 0), (200, 0, 0, 255))
    colours.putpixel((2, 0), (200, 0, 0, 51))
    expected = [WHITE, (200, 0, 0), (244, 204, 204)]
    assert seen(saved(colours, "PNG")) == expected
    assert seen(saved(colours.convert("LA"), "PNG"))[0] == WHITE
    # One colour of a palette, of grey and of RGB can be declared transparent.
    image = Image.new("RGB", (2, 1), (7, 7, 7))
    image.putpixel((1, 0), (90, 90, 90))
    palette = image.quantize(2)
    for declared, transparency in ((image, (7, 7, 7)), (image.convert("L"), 7), (palette, palette.getpixel((0, 0)))):
        assert seen(saved(declared, "PNG", transparency=transparency)) == [WHITE, (90, 90, 90)], declared.mode


def test_palette_black_and_white_and_print_colours() -> None:
    colours = Image.new("RGB", (2, 1), (10, 200, 30))
    colours.putpixel((1, 0), (250, 0, 90))
    assert seen(saved(colours.quantize(2), "PNG")) == [(10, 200, 30), (250, 0, 90)]
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert seen(saved(bits, "PNG")) == [(0, 0, 0), WHITE]
    # No ink is white; only black ink is black.
    for ink, colour in (((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0)):
        image = saved(Image.new("CMYK", (8, 8), ink), "JPEG")
        assert image.mode == "CMYK"
        assert all(abs(value - colour) < 3 for pixel in seen(image) for value in pixel)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("deep", [False, True])
def test_pictures_are_turned_upright(kind: str, deep: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    image = grey(0, 65535) if deep else grey(0, 255, dtype=np.uint8)
    turned = as_seen(saved(image, kind, exif=exif), 65535)
    assert turned.size == (1, 2)
    assert np.asarray(turned)[:, 0, 0].tolist() == [0, 255]


def test_a_dataset_gives_pictures_and_targets(tmp_path: Path) -> None:
    import torch

    file = tmp_path / "a.png"
    grey(*[4095] * 40).resize((40, 20)).save(file)
    targets = torch.tensor([[1, 0, -1]], dtype=torch.int8)
    data = LabelledPictures([file], targets, 16, 4095)
    picture, target = data[0]
    assert len(data) == 1
    assert picture.shape == (3, 16, 16)
    assert picture.dtype == torch.uint8
    assert picture.eq(255).all()
    assert target.equal(targets[0])
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(PictureError, match=f"^{file}: "):
        data[0]
    file.unlink()
    with pytest.raises(PictureError, match=f"^{file}: .*No such file"):
        data[0]


# --- Checking ------------------------------------------------------------------------------------


def test_white_is_the_smallest_that_no_picture_exceeds(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(4)]
    Image.new("RGB", (2, 2), "white").save(files[0])
    for file, highest in zip(files[1:], (255, 4095, 4096), strict=True):
        grey(0, highest).save(file)
    for count, white in enumerate((255, 255, 255, 4095, 65535)):
        assert check_pictures(files[:count], workers=0, remembered=None) == (white, [])


def huge_png() -> bytes:
    """A PNG of 40,000 by 40,000 pixels, by its header."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_broken_files_are_problems_and_no_exceptions(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(256, size=(50, 50), dtype=np.uint8)
    broken: dict[str, tuple[bytes, str]] = {
        "empty.png": (b"", "the file is empty"),
        "text.jpg": (b"no picture\n" * 100, "is no picture of a kind that Pillow can read"),
        "huge.png": (huge_png(), "has more pixels than Pillow reads: make it smaller"),
    }
    for kind in ("png", "jpeg", "tiff"):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, kind)
        broken[f"cut.{kind}"] = (buffer.getvalue()[: len(buffer.getvalue()) // 2], "")
    buffer = io.BytesIO()
    grey(0, 2, dtype=np.float32).save(buffer, "TIFF")
    broken["bright.tif"] = (buffer.getvalue(), "its grey values go from 0 to 2, but 0 is black and 1 is white")
    for name, (content, _) in broken.items():
        (tmp_path / name).write_bytes(content)
    Image.new("L", (2, 2)).save(tmp_path / "good.png")
    files = [tmp_path / "good.png", *(tmp_path / name for name in broken), tmp_path / "gone.png"]
    white, problems = check_pictures(files, workers=0, remembered=None)
    assert [index for index, _ in problems] == list(range(1, len(files)))
    for (_, problem), (_, expected) in zip(problems[:-1], broken.values(), strict=True):
        assert expected in problem
        assert len(problem) > 10
    assert "No such file" in problems[-1][1]
    assert white == 255


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.png" for index in range(pictures.CHUNK + 8)]
    for file in files:
        Image.new("L", (1, 1)).save(file)
    files[3].write_bytes(b"")
    grey(5000).save(files[-1])
    found = check_pictures(files, workers=2, remembered=tmp_path / "memory")
    assert found == (65535, [(3, "the file is empty")])
    assert found == check_pictures(files, workers=0, remembered=None)


def test_only_new_and_changed_pictures_are_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    check = pictures._check

    def recorded(name: str) -> tuple[int, str]:
        checked.append(Path(name).name)
        return check(name)

    monkeypatch.setattr(pictures, "_check", recorded)
    memory = tmp_path / "new" / "memory.json"
    files = [tmp_path / f"{name}.png" for name in "abc"]
    for file in files:
        grey(5000).save(file)
    files[2].write_bytes(b"broken")

    def check_again() -> list[str]:
        checked.clear()
        white, problems = check_pictures(files, workers=0, remembered=memory)
        assert white == 65535
        assert [index for index, _ in problems] == [2]
        return list(checked)

    assert check_again() == ["a.png", "b.png", "c.png"]
    # The broken one is looked at every time: it may be readable by now, though it is the same file.
    assert check_again() == ["c.png"]
    os.utime(files[1], ns=(0, 0))
    assert check_again() == ["b.png", "c.png"]
    # Another set does not make it forget this one.
    Image.new("L", (1, 1)).save(tmp_path / "d.png")
    assert check_pictures([tmp_path / "d.png"], workers=0, remembered=memory) == (255, [])
    assert check_again() == ["c.png"]
    assert len(json.loads(memory.read_text())) == 3  # a, b and d
    assert os.listdir(memory.parent) == ["memory.json"]
    # What a picture was before it was broken counts for nothing.
    grey(5000).save(tmp_path / "d.png")
    assert check_pictures([tmp_path / "d.png"], workers=0, remembered=memory) == (65535, [])
    (tmp_path / "d.png").write_bytes(b"")
    assert check_pictures([tmp_path / "d.png"], workers=0, remembered=memory)[0] == 255
    # Whatever else it holds counts for nothing.
    for nonsense in ("", "{", "[]", '{"a": 1}', "null", "\0", json.dumps({str(files[0]): [1, 2, "x"]})):
        memory.write_text(nonsense)
        assert check_again() == ["a.png", "b.png", "c.png"], nonsense
    memory.unlink()
    memory.mkdir()
    assert check_again() == check_again() == ["a.png", "b.png", "c.png"]
    assert os.listdir(memory.parent) == ["memory.json"]


def test_an_interrupted_check_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{name}.png" for name in "ab"]
    for file in files:
        Image.new("L", (1, 1)).save(file)
    check = pictures._check

    def interrupted(name: str) -> tuple[int, str]:
        if name.endswith("b.png"):
            raise KeyboardInterrupt
        return check(name)

    monkeypatch.setattr(pictures, "_check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_pictures(files, workers=0, remembered=tmp_path / "memory")
    assert list(json.loads((tmp_path / "memory").read_text())) == [str(files[0])]
