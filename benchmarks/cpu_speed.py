"""Check what fused_sce promises about speed on a CPU: each line a ratio of medians of one interleaved run.

    python benchmarks/cpu_speed.py --output output/benchmarks

Lines that share a shape are measured together, in rounds that call every candidate once in an order shuffled anew.
Prints the table and writes `cpu_speed.json` with every median and the environment. With --strict the exit status is 1
if a line is not met.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from compare_losses import Loss, forward_backward, naive
from measure import environment, in_turns
from torch import Tensor, nn

import fused_sce

Candidates = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Line:
    """One promise: the time of `numerator` over that of `denominator` is on the right side of `bar`."""

    group: str
    work: str
    numerator: str
    denominator: str
    bar: float
    at_least: bool = True


LINES = (
    Line("256x1000 float32", "BCEWithLogitsLoss eager", "eager", "fused", 6),
    Line("256x1000 float32", "BCEWithLogitsLoss compiled", "compiled", "fused", 5),
    Line("256x1000 float32", "naive: sigmoid + BCELoss", "naive", "fused", 25),
    Line("256x1000 float32", "MultiLabelSoftMarginLoss against its twin", "soft margin", "fused soft margin", 10),
    Line("256x1000 float32", "bool targets against float targets", "fused, bool", "fused", 1, at_least=False),
    Line("256x1000 float32", "uint8 targets against float targets", "fused, uint8", "fused", 1, at_least=False),
    Line("1024x9605 float32", "BCEWithLogitsLoss eager", "eager", "fused", 5),
    Line("1024x9605 float32", "bool targets against float targets", "fused, bool", "fused", 1, at_least=False),
    Line("1024x9605 float32", "uint8 targets against float targets", "fused, uint8", "fused", 1, at_least=False),
    Line("1024x9605 float32", "one thread against two", "fused", "fused, two threads", 1.7),
    Line("1024x9605 in place", "kernel alone against torch.add(out=)", "kernel", "add", 3, at_least=False),
    Line("64x80 float32", "BCEWithLogitsLoss eager, whole call", "eager", "fused", 1.4),
    Line("256x1000 bfloat16", "BCEWithLogitsLoss eager in bfloat16", "eager", "fused", 6),
)


@dataclass
class Result:
    """A line, and what was measured for it."""

    group: str
    work: str
    ratio: float
    bar: float
    at_least: bool
    met: bool


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random logits that want a gradient, and 0/1 targets of the same dtype."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator) * 3
    target = torch.randint(0, 2, shape, generator=generator)
    return logits.to(dtype).requires_grad_(), target.to(dtype)


def whole_call(loss: Loss, logits: Tensor, target: Tensor) -> Callable[[], object]:
    """Forward + backward of one loss, as a training step does it."""
    return lambda: forward_backward(loss, logits, target)


def losses_256_1000(dtype: torch.dtype) -> Candidates:
    """All losses on 256 x 1000."""
    logits, target = inputs((256, 1000), dtype)
    fused, fused_soft_margin = fused_sce.BCEWithLogitsLoss(), fused_sce.MultiLabelSoftMarginLoss()
    buffer = torch.zeros_like(logits)
    return {
        # In no line, to compare with: the least that any loss must do, reading both inputs and writing as much.
        "add": lambda: torch.add(logits.detach(), target, out=buffer),
        "fused": whole_call(fused, logits, target),
        "fused, bool": whole_call(fused, logits, target.bool()),
        "fused, uint8": whole_call(fused, logits, target.byte()),
        "fused soft margin": whole_call(fused_soft_margin, logits, target),
        "eager": whole_call(nn.BCEWithLogitsLoss(), logits, target),
        "compiled": whole_call(torch.compile(nn.BCEWithLogitsLoss(), dynamic=False), logits, target),
        "soft margin": whole_call(nn.MultiLabelSoftMarginLoss(), logits, target),
        "naive": whole_call(naive, logits, target),
    }


def two_losses(shape: tuple[int, int], dtype: torch.dtype) -> Candidates:
    """The fused loss and torch's."""
    logits, target = inputs(shape, dtype)
    return {
        "fused": whole_call(fused_sce.BCEWithLogitsLoss(), logits, target),
        "eager": whole_call(nn.BCEWithLogitsLoss(), logits, target),
    }


def large(shape: tuple[int, int]) -> Candidates:
    """The fused loss with each type of target and on two threads, and torch's."""
    logits, target = inputs(shape, torch.float32)
    fused = fused_sce.BCEWithLogitsLoss()
    return {
        **two_losses(shape, torch.float32),
        "fused, bool": whole_call(fused, logits, target.bool()),
        "fused, uint8": whole_call(fused, logits, target.byte()),
        "fused, two threads": whole_call(fused, logits, target),
    }


def kernel_alone(shape: tuple[int, int]) -> Candidates:
    """Loss and gradient, and the sum of two tensors, into memory that is there already."""
    logits, target = inputs(shape, torch.float32)
    logits = logits.detach()
    gradient = torch.zeros(shape)
    op = torch.ops.fused_sce._sigmoid_cross_entropy_forward_out.default
    divisor = logits.numel()
    return {
        "kernel": lambda: op(logits, target, reduction="sum", divisor=divisor, gradient=gradient),
        "add": lambda: torch.add(logits, target, out=gradient),
    }


GROUPS: dict[str, Callable[[], Candidates]] = {
    "256x1000 float32": lambda: losses_256_1000(torch.float32),
    "1024x9605 float32": lambda: large((1024, 9605)),
    "1024x9605 in place": lambda: kernel_alone((1024, 9605)),
    "64x80 float32": lambda: two_losses((64, 80), torch.float32),
    "256x1000 bfloat16": lambda: two_losses((256, 1000), torch.bfloat16),
}


def check(lines: tuple[Line, ...], medians: dict[str, dict[str, float]]) -> list[Result]:
    """Each line against the medians of its group."""
    results = []
    for line in lines:
        times = medians[line.group]
        ratio = times[line.numerator] / times[line.denominator]
        met = ratio >= line.bar if line.at_least else ratio <= line.bar
        results.append(Result(line.group, line.work, ratio, line.bar, line.at_least, met))
    return results


def show(results: list[Result]) -> None:
    """Print the table."""
    print(f"\n{'':22}{'forward + backward, time of':46}{'ratio':>8}{'bar':>14}")
    for result in results:
        bar = f"{'at least' if result.at_least else 'at most'} {result.bar:g}"
        print(f"{result.group:22}{result.work:46}{result.ratio:8.2f}{bar:>14}{'' if result.met else '   NOT MET'}")


def main(arguments: list[str] | None = None) -> int:
    """Measure all groups and check all lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), help="folder for the JSON")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each group")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a line is not met")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)
    facts = environment("cpu")
    for name, value in facts.items():
        print(f"{name:14}{value}")
    medians: dict[str, dict[str, float]] = {}
    for group in options.groups:
        candidates = GROUPS[group]()
        threads = {name: 2 if name.endswith("two threads") else 1 for name in candidates}
        times = in_turns(candidates, options.seconds, threads=threads)
        medians[group] = {name: statistics.median(samples) for name, samples in times.items()}
        print(f"\n{group}, {len(next(iter(times.values())))} rounds")
        for name, median in medians[group].items():
            print(f"  {name:22}{median * 1e6:12,.0f} us")
    torch.set_num_threads(1)

    results = check(tuple(line for line in LINES if line.group in medians), medians)
    show(results)
    facts["threads"] = "1 unless a line says two"
    written = {"environment": facts, "lines": [asdict(result) for result in results], "median_seconds": medians}
    (options.output / "cpu_speed.json").write_text(json.dumps(written, indent=1) + "\n")
    print(f"\nwritten: {options.output}/cpu_speed.json")
    return 1 if options.strict and not all(result.met for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
