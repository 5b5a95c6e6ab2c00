"""Canvases of scanned handwritten digits: multi-label pictures, real ones, with no download.

scikit-learn ships 1,797 scans of handwritten digits, 8x8 grey pixels each (`load_digits`). A canvas
shows one to four of them, each enlarged and put at a random place; its labels say which of the ten
digits are present.

The scans are split into a train and a test part *before* any canvas is composed, so that no test
canvas shows a scan that training has seen. A canvas is a function of (seed, part, epoch, index) and
of nothing else: composed again at any time, in any order, in any process, it comes out the same to
the bit. That lets training see new canvases in every epoch and still be resumed exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

LABELS = tuple(str(digit) for digit in range(10))

# A quarter of the scans of each digit, 450 in all, is kept for the test canvases.
TEST_FRACTION = 0.25
MAX_DIGITS = 4
# Sides of an enlarged digit as fractions of the canvas's side: 16 to 20 of 48 pixels. Four of them
# cover 44 to 69 % of the canvas: they fit, though not without touching.
SMALLEST_DIGIT, LARGEST_DIGIT = 1 / 3, 5 / 12
# Below this a digit would be drawn smaller than its scan's own 8 pixels.
SMALLEST_CANVAS = 24
# Share of a digit's square that may lie in another's. A digit leaves the rim of its square empty:
# at this value strokes touch, but no digit hides another.
MAX_OVERLAP = 0.15
# Places drawn for each digit. The first that respects MAX_OVERLAP is taken, else (one canvas
# in twenty) the one that overlaps least, which was never by more than 0.38.
PLACES_TRIED = 64

# First words of the random streams: a train canvas and a test canvas never share one.
_TRAIN_STREAM, _TEST_STREAM = 0, 1


@dataclass(frozen=True)
class Scans:
    """N scanned digits.

    `pictures` (N, 8, 8) uint8, 0 is paper and 255 is ink; `digits` (N,) int64, what they show;
    `ids` (N,) int64, where `load_digits` has them, by which two parts can be told to share none.
    """

    pictures: npt.NDArray[np.uint8]
    digits: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]


def split_scans(seed: int) -> tuple[Scans, Scans]:
    """The scans for train and test canvases: disjoint, each digit with the same share in both."""
    bunch = load_digits()
    # The scans hold the values 0 to 16.
    pictures = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    digits = bunch.target.astype(np.int64)
    train_ids, test_ids = train_test_split(
        np.arange(len(digits)), test_size=TEST_FRACTION, stratify=digits, random_state=seed
    )
    return (
        Scans(pictures[train_ids], digits[train_ids], train_ids),
        Scans(pictures[test_ids], digits[test_ids], test_ids),
    )


def compose(
    scans: Scans, image_size: int, random: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """A canvas, (image_size, image_size) uint8, and which digits it shows, (10,) bool."""
    canvas = np.zeros((image_size, image_size), dtype=np.uint8)
    present = np.zeros(len(LABELS), dtype=np.bool_)
    taken: list[tuple[int, int, int]] = []  # squares already on the canvas: top, left, side
    for scan in random.integers(len(scans.digits), size=random.integers(1, MAX_DIGITS + 1)):
        side = int(random.integers(round(image_size * SMALLEST_DIGIT), round(image_size * LARGEST_DIGIT) + 1))
        top, left = _free_place(taken, side, image_size, random)
        taken.append((top, left, side))
        digit = Image.fromarray(scans.pictures[scan]).resize((side, side), Image.Resampling.BILINEAR)
        square = canvas[top : top + side, left : left + side]
        np.maximum(square, np.asarray(digit), out=square)  # ink wins over paper
        present[scans.digits[scan]] = True
    return canvas, present


def _free_place(
    taken: list[tuple[int, int, int]], side: int, image_size: int, random: np.random.Generator
) -> tuple[int, int]:
    """Top and left of a square of `side` pixels that keeps clear of those in `taken` if it can."""
    places = random.integers(image_size - side + 1, size=(PLACES_TRIED, 2))
    worst = np.zeros(PLACES_TRIED)  # of each place: the largest share that overlaps another
    for top, left, other in taken:
        height = np.minimum(places[:, 0] + side, top + other) - np.maximum(places[:, 0], top)
        width = np.minimum(places[:, 1] + side, left + other) - np.maximum(places[:, 1], left)
        share = height.clip(min=0) * width.clip(min=0) / min(side, other) ** 2
        worst = np.maximum(worst, share)
    respects = worst <= MAX_OVERLAP
    chosen = int(respects.argmax() if respects.any() else worst.argmin())
    return int(places[chosen, 0]), int(places[chosen, 1])


class DigitCanvases(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """`count` canvases of one part of the scans.

    An item is the picture, (1, image_size, image_size) uint8; its targets, (10,) float32, 0 or 1;
    and which of them are known, (10,) float32: all of them here, so ones.

    Train canvases are new in every epoch (`set_epoch`); test canvases are always the same.
    """

    def __init__(self, *, train: bool, count: int, image_size: int, seed: int) -> None:
        if image_size < SMALLEST_CANVAS:
            raise ValueError(f"a canvas needs a side of at least {SMALLEST_CANVAS} pixels, got {image_size}")
        train_scans, test_scans = split_scans(seed)
        self.labels = LABELS
        self.scans = train_scans if train else test_scans
        self._stream = _TRAIN_STREAM if train else _TEST_STREAM
        self._train = train
        self._count = count
        self._image_size = image_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the train canvases those of `epoch`; the test canvases stay."""
        self._epoch = epoch if self._train else 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        random = np.random.default_rng([self._stream, self._seed, self._epoch, index])
        canvas, present = compose(self.scans, self._image_size, random)
        labels = torch.from_numpy(present).float()
        return torch.from_numpy(canvas).unsqueeze(0), labels, torch.ones_like(labels)
