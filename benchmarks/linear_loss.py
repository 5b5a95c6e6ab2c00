"""Time and memory of a linear layer with its loss: by chunks of labels, with all logits, and with torch's loss.

    python benchmarks/linear_loss.py --output output/benchmarks

Forward and backward of 1024 rows of 256 features and 131,072 labels, float32, five positives in each row, in one
interleaved run; and the peak of what each allocates. Prints a table and writes `linear_loss.json`.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import environment, in_turns
from torch.nn import functional as F

import fused_sce
from fused_sce._linear import CHUNK_BYTES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from memory import peak_bytes

ROWS, FEATURES, LABELS, POSITIVES = 1024, 256, 131_072, 5
CHUNKS = (2**22, 2**24, CHUNK_BYTES, 2**28)


def candidates() -> dict[str, Callable[[], object]]:
    """A step of each, by name."""
    torch.manual_seed(0)
    x, w = (torch.randn(count, FEATURES, requires_grad=True) for count in (ROWS, LABELS))
    index = torch.stack([torch.randperm(LABELS)[:POSITIVES] for _ in range(ROWS)])
    dense = torch.zeros(ROWS, LABELS, dtype=torch.bool).scatter_(1, index, True)
    losses: dict[str, Callable[[], torch.Tensor]] = {
        f"chunks of {size // 2**20} MiB": functools.partial(
            fused_sce.functional.linear_sigmoid_cross_entropy,
            *(x, w, index),
            target_format="index_list",
            chunk_bytes=size,
        )
        for size in CHUNKS
    }
    losses["all logits"] = lambda: fused_sce.functional.sigmoid_cross_entropy(
        F.linear(x, w), index, target_format="index_list"
    )
    losses["torch"] = lambda: F.binary_cross_entropy_with_logits(F.linear(x, w), dense.float())

    def step_of(loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), (x, w))

    return {name: step_of(loss) for name, loss in losses.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), help="folder for the JSON")
    parser.add_argument("--seconds", type=float, default=240.0)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    facts = environment("cpu")
    for name, value in facts.items():
        print(f"{name:14}{value}")
    steps = candidates()
    times = in_turns(steps, options.seconds)
    default = f"chunks of {CHUNK_BYTES // 2**20} MiB"
    rows = []
    print(f"\n{'':20}{'s per step':>12}{'/ ours':>9}{'peak, MB':>10}")
    for name, step in steps.items():
        # Of each round, so that what slows a whole round down is in neither.
        ratio = statistics.median(own / ours for own, ours in zip(times[name], times[default], strict=True))
        median, peak, rounds = statistics.median(times[name]), peak_bytes(step), len(times[name])
        rows.append({"name": name, "rounds": rounds, "seconds": median, "ratio_to_ours": ratio, "peak_bytes": peak})
        print(f"{name:20}{median:12.2f}{ratio:9.2f}{peak / 1e6:10.0f}", flush=True)
    (options.output / "linear_loss.json").write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
    print(f"\nwritten: {options.output}/linear_loss.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
