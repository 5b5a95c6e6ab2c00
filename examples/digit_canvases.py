"""Canvases of scanned handwritten digits: multi-label pictures, real ones, with no download.

A canvas shows one to four of the 1,797 scans that scikit-learn ships (`load_digits`, 8x8 grey pixels), each enlarged
and put at a random place; its labels say which of the ten digits are there. The scans are split into a train and a test
part first, so that no test canvas shows a scan that training has seen. A canvas is a function of (seed, part, epoch,
index) alone: training sees new canvases in every epoch and can still be resumed exactly.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

LABELS = tuple(str(digit) for digit in range(10))
TEST_FRACTION = 0.25  # of the scans of each digit: 450 in all
MAX_DIGITS = 4
# Sides of an enlarged digit as fractions of the canvas's: four cover 44 to 69 % of it, and fit, but touch at times.
SMALLEST_DIGIT, LARGEST_DIGIT = 1 / 3, 5 / 12
SMALLEST_CANVAS = 24  # below, a digit would be drawn smaller than its scan
MAX_OVERLAP = 0.15  # share of a digit's square that may lie in another's: strokes touch, but no digit hides another
# Places drawn for each digit. The first that respects MAX_OVERLAP is taken, else (one canvas
# in twenty) the one that overlaps least, which was never by more than 0.38.
PLACES_TRIED = 64


class DigitCanvases(Dataset[tuple[Tensor, Tensor]]):
    """`count` canvases of one part of the scans, whose indices in `load_digits` are `scans`.

    An item is the picture, (1, image_size, image_size) uint8, 0 paper and 255 ink, and its targets, (10,) int8, 0 or 1.
    Train canvases are new in every epoch (`set_epoch`); test canvases are always the same.

    Raises:
        ValueError: `image_size` is below SMALLEST_CANVAS.
    """

    def __init__(self, *, train: bool, count: int, image_size: int, seed: int) -> None:
        if image_size < SMALLEST_CANVAS:
            raise ValueError(f"a canvas needs a side of at least {SMALLEST_CANVAS} pixels, got {image_size}")
        digits = load_digits()
        parts = train_test_split(
            np.arange(len(digits.target)), test_size=TEST_FRACTION, stratify=digits.target, random_state=seed
        )
        self.scans: npt.NDArray[np.int64] = parts[0 if train else 1]
        self.pictures = np.round(digits.images[self.scans] * (255 / 16)).astype(np.uint8)  # scans hold 0 to 16
        self.digits = digits.target[self.scans]
        self._train, self._count, self._image_size, self._seed = train, count, image_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the train canvases those of `epoch`; the test canvases stay."""
        self._epoch = epoch if self._train else 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng([0 if self._train else 1, self._seed, self._epoch, index])
        size = self._image_size
        canvas = np.zeros((size, size), dtype=np.uint8)
        targets = torch.zeros(len(LABELS), dtype=torch.int8)
        taken: list[tuple[int, int, int]] = []  # squares already on the canvas: top, left, side
        for scan in random.integers(len(self.scans), size=random.integers(1, MAX_DIGITS + 1)):
            side = int(random.integers(round(size * SMALLEST_DIGIT), round(size * LARGEST_DIGIT) + 1))
            top, left = _free_place(taken, side, size, random)
            taken.append((top, left, side))
            digit = Image.fromarray(self.pictures[scan]).resize((side, side), Image.Resampling.BILINEAR)
            square = canvas[top : top + side, left : left + side]
            np.maximum(square, np.asarray(digit), out=square)  # ink wins over paper
            targets[self.digits[scan]] = 1
        return torch.from_numpy(canvas).unsqueeze(0), targets


def _free_place(
    taken: list[tuple[int, int, int]], side: int, image_size: int, random: np.random.Generator
) -> tuple[int, int]:
    """Top and left of a square of `side` pixels that keeps clear of those in `taken` if it can."""
    places = random.integers(image_size - side + 1, size=(PLACES_TRIED, 2))
    worst = np.zeros(PLACES_TRIED)  # of each place: the largest share that overlaps another
    for top, left, other in taken:
        height = np.minimum(places[:, 0] + side, top + other) - np.maximum(places[:, 0], top)
        width = np.minimum(places[:, 1] + side, left + other) - np.maximum(places[:, 1], left)
        worst = np.maximum(worst, height.clip(min=0) * width.clip(min=0) / min(side, other) ** 2)
    respects = worst <= MAX_OVERLAP
    top, left = places[respects.argmax() if respects.any() else worst.argmin()].tolist()
    return top, left
