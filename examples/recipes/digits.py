"""The data of every recipe: 1,797 scans of handwritten digits, 8x8 grey pixels each, that scikit-learn ships."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

ATTRIBUTES = ("even", "prime", "above four", "closed loop")
# A ResNet divides the side by 32: the smallest picture whose last feature map is not empty, and the cheapest.
IMAGE_SIZE = 32
# ImageNet's statistics, which torchvision's pretrained weights expect; harmless to other weights.
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@dataclass(frozen=True)
class Scans:
    """`grey` (N, 8, 8) float32, 0 = paper, 1 = ink; `digits` (N,) int64, 0 to 9."""

    grey: Tensor
    digits: Tensor

    def only(self, digits: Sequence[int]) -> Scans:
        """The scans of these digits."""
        keep = torch.isin(self.digits, torch.tensor(digits))
        return Scans(self.grey[keep], self.digits[keep])


def load_scans(seed: int = 0) -> tuple[Scans, Scans]:
    """Train scans (1,347) and test scans (450), with the same share of each digit in both."""
    bunch = load_digits()
    grey = torch.from_numpy(bunch.images / 16).float()  # the scans hold the values 0 to 16
    digits = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(range(len(digits)), test_size=0.25, stratify=bunch.target, random_state=seed)
    return Scans(grey[train], digits[train]), Scans(grey[test], digits[test])


def images(grey: Tensor) -> Tensor:
    """Grey pictures (N, height, width) as a ResNet reads them: (N, 3, IMAGE_SIZE, IMAGE_SIZE) float32."""
    enlarged = F.interpolate(grey.unsqueeze(1), size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    return (enlarged - _MEAN) / _STD


def attributes(digits: Tensor) -> Tensor:
    """Which of `ATTRIBUTES` hold, any number of them: (N,) int64 -> (N, 4) bool. The 1 has none."""
    prime = torch.isin(digits, digits.new_tensor([2, 3, 5, 7]))
    loop = torch.isin(digits, digits.new_tensor([0, 6, 8, 9]))
    return torch.stack([digits % 2 == 0, prime, digits > 4, loop], dim=1)


def shown(digits: Tensor, classes: Sequence[int]) -> Tensor:
    """Which of `classes` a picture shows: its digits (N, k) int64 -> (N, len(classes)) bool."""
    return (digits.unsqueeze(-1) == torch.tensor(classes)).any(dim=1)


def pairs(scans: Scans, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` grey pictures (count, 16, 16) of two random scans side by side, and their digits (count, 2) int64."""
    chosen = torch.randint(len(scans.digits), (count, 2), generator=torch.Generator().manual_seed(seed))
    left, right = scans.grey[chosen].unbind(dim=1)
    return F.pad(torch.cat([left, right], dim=2), (0, 0, 4, 4)), scans.digits[chosen]
