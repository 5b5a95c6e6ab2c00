"""What the patched_*.py examples share: data, and the same training twice, with torch's loss and with the fused one.

The examples train other people's code as it is; all that fused_sce adds is `with fused_sce.patch_torch():` around it.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import digit_canvases
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fused_sce

LABELS = len(digit_canvases.LABELS)
BATCH = 16
SIZE = 32  # pixels: the least that a ResNet, which divides by 32, leaves something of
# Trained in float64: in float32 batch normalisation and the optimizer amplify the different rounding of the losses
# until after some ten steps nothing is alike.
TOLERANCE = 1e-6
LOSS_OPS = ("aten::binary_cross_entropy_with_logits", "aten::log_sigmoid", "fused_sce::")

Train = Callable[[int], list[float]]


@dataclass
class Training:
    """The loss of each step, and the loss operations that the profiler saw, by name and number of calls."""

    losses: list[float]
    calls: dict[str, int]


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Pictures of one to four digits (count, 3, SIZE, SIZE) in [0, 1], and which are there (count, LABELS), 0 or 1."""
    data = digit_canvases.DigitCanvases(train=True, count=count, image_size=SIZE, seed=0)
    items = [data[index] for index in range(count)]
    dtype = torch.get_default_dtype()
    grey = torch.stack([item[0] for item in items]).to(dtype) / 255
    return grey.expand(-1, 3, -1, -1).contiguous(), torch.stack([item[1] for item in items]).to(dtype)


def record(train: Train, steps: int, patched: bool) -> Training:
    """Train for `steps` steps from the same seed."""
    torch.manual_seed(0)
    patch = fused_sce.patch_torch() if patched else contextlib.nullcontext()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with patch, profile(activities=[ProfilerActivity.CPU]) as seen:
            losses = train(steps)
    finally:
        torch.set_default_dtype(default)
    return Training(losses, {event.key: event.count for event in seen.key_averages() if event.key.startswith(LOSS_OPS)})


def run(train: Train, title: str | None, argv: Sequence[str] | None = None) -> tuple[Training, Training]:
    """Train twice, print both, return torch's and the fused training; exit if losses differ by more than TOLERANCE."""
    parser = argparse.ArgumentParser(description=title, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args(argv).steps
    if steps < 1:
        parser.error(f"--steps must be at least 1, got {steps}")
    plain, fused = record(train, steps, patched=False), record(train, steps, patched=True)
    print(f"{'step':>6}{'torch':>12}{'fused_sce':>12}")
    pairs = list(zip(plain.losses, fused.losses, strict=True))
    for step, (one, other) in enumerate(pairs):
        print(f"{step:6}{one:12.6f}{other:12.6f}")
    print(f"torch's training called {plain.calls}\npatched training called {fused.calls}")
    worst = max(abs(one - other) for one, other in pairs)
    if worst > TOLERANCE:
        raise SystemExit(f"losses differ by {worst:.2g}, more than {TOLERANCE:g}")
    return plain, fused
