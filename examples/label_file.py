"""The user's own pictures: a folder, and a CSV file that says which labels each picture has.

The file's first row names the columns: the first column is the picture's file name, relative to
the folder, and every other column is one label. Each further row is one picture; a value is 1 (has
the label), 0 (has it not) or empty (nobody knows):

    picture,cat,dog,outdoors
    a.png,1,0,1
    holiday/b.jpg,0,,1

Everything that can be wrong with the file or with a picture is found here, before any training, and
is reported with the line it stands on.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

# What a value in the file means: the target, and whether it is known.
VALUES = {"0": (0.0, 1.0), "1": (1.0, 1.0), "": (0.0, 0.0)}
# Enough to see what is wrong with a file throughout, without flooding the terminal.
MAX_PROBLEMS_SHOWN = 10


class LabelFileError(ValueError):
    """A label file, or a picture that it names, cannot be used; the message says where and why."""


@dataclass(frozen=True)
class LabelFile:
    """A label file of N pictures and L labels.

    `targets` (N, L) float32 holds 0 and 1. `known` (N, L) float32 is 1 where the file has a value
    and 0 where it has none; the target is 0 there and means nothing. `sha256` is that of the
    file's bytes.
    """

    labels: tuple[str, ...]
    pictures: tuple[Path, ...]
    targets: Tensor
    known: Tensor
    sha256: str


def read_label_file(file: Path, images: Path) -> LabelFile:
    """Read `file`, whose pictures lie under `images`; raise LabelFileError if anything is wrong."""
    content = _read(file)
    rows = _rows(file, content)
    header_line, header = next(rows, (0, []))
    labels = tuple(name.strip() for name in header[1:])
    _check_header(file, header_line, header, labels)

    problems: list[str] = []
    pictures: list[Path] = []
    values: list[list[tuple[float, float]]] = []
    first_line: dict[str, int] = {}  # of each picture, to name both lines of a duplicate
    for line, row in rows:
        if len(row) != len(header):
            problems.append(f"line {line}: {len(row)} values, but the header has {len(header)}")
            continue
        # "a.png" and "./a.png" are one picture.
        name = os.path.normpath(row[0].strip()) if row[0].strip() else ""
        if not name:
            problems.append(f"line {line}: no picture is named")
        elif name in first_line:
            problems.append(f"line {line}: {name!r} is already on line {first_line[name]}")
        elif not (images / name).is_file():
            problems.append(f"line {line}: no picture {name!r} in {images}")
        first_line.setdefault(name, line)
        for label, value in zip(labels, row[1:], strict=True):
            if value.strip() not in VALUES:
                problems.append(f"line {line}: {label!r} must be 0, 1 or empty, got {value!r}")
        pictures.append(images / name)
        values.append([VALUES.get(value.strip(), (0.0, 0.0)) for value in row[1:]])
    _raise_if_any(file, problems)
    if not pictures:
        raise LabelFileError(f"{file}: has a header but no rows")

    targets, known = torch.tensor(values, dtype=torch.float32).unbind(dim=-1)
    nowhere_known = [label for label, any_known in zip(labels, known.any(dim=0), strict=True) if not any_known]
    if nowhere_known:
        raise LabelFileError(f"{file}: no row has a value for {', '.join(map(repr, nowhere_known))}")
    _check_pictures(file, list(first_line.values()), pictures)
    return LabelFile(labels, tuple(pictures), targets, known, hashlib.sha256(content).hexdigest())


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise LabelFileError(f"{file}: cannot be read: {error.strerror}") from error


def _rows(file: Path, content: bytes) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its first line."""
    try:
        # Spreadsheets put a byte order mark in front, which "utf-8-sig" takes away.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise LabelFileError(f"{file}: line {line}: not UTF-8 text") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise LabelFileError(f"{file}: line {line}: {error}") from error
        if row is None:
            return
        if row:
            yield line, row


def _check_header(file: Path, line: int, header: Sequence[str], labels: Sequence[str]) -> None:
    if not header:
        raise LabelFileError(f"{file}: is empty; it needs a header and one row per picture")
    if not labels:
        raise LabelFileError(
            f"{file}: line {line}: the header must name a file column and at least one label, "
            f"separated by commas, got {header[0]!r}"
        )
    problems = [
        f"line {line}: column {column} has no name" for column, label in enumerate(labels, start=2) if not label
    ]
    problems += [
        f"line {line}: {count} columns are called {label!r}"
        for label, count in Counter(labels).items()
        if label and count > 1
    ]
    _raise_if_any(file, problems)


def _check_pictures(file: Path, lines: Sequence[int], pictures: Sequence[Path]) -> None:
    """Decode every picture once: a broken one would else end the training in some later hour."""
    problems = []
    for line, picture in zip(lines, tqdm(pictures, desc="checking pictures", unit="picture", leave=False), strict=True):
        try:
            with Image.open(picture) as image:
                image.load()
        # Pillow's decoders raise many kinds of exception on broken files, SyntaxError among them.
        except Exception as error:
            problems.append(f"line {line}: picture {picture} cannot be read: {error}")
    _raise_if_any(file, problems)


def _raise_if_any(file: Path, problems: Sequence[str]) -> None:
    if not problems:
        return
    shown = [f"{file}: {problem}" for problem in problems[:MAX_PROBLEMS_SHOWN]]
    if len(problems) > len(shown):
        shown.append(f"{file}: and {len(problems) - len(shown)} more problems")
    raise LabelFileError("\n".join(shown))


class LabelledPictures(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The rows `rows` of a label file.

    An item is the picture, (3, image_size, image_size) uint8, red, green and blue; its L targets,
    float32, 0 or 1; and which of them are known, (L,) float32. A picture is stretched to a square,
    so that nothing of it is cut away and no label loses what it speaks of.
    """

    def __init__(self, label_file: LabelFile, rows: Sequence[int], image_size: int) -> None:
        index = torch.as_tensor(rows, dtype=torch.int64)
        self.pictures = tuple(label_file.pictures[row] for row in rows)
        self.targets = label_file.targets[index]
        self.known = label_file.known[index]
        self._image_size = image_size

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes: the pictures of one epoch are those of every other."""

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        size = (self._image_size, self._image_size)
        with Image.open(self.pictures[index]) as image:
            upright = ImageOps.exif_transpose(image)
            pixels = np.array(upright.convert("RGB").resize(size, Image.Resampling.BILINEAR))
        picture = torch.from_numpy(pixels).permute(2, 0, 1)
        return picture, self.targets[index], self.known[index]
