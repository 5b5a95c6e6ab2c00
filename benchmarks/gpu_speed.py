"""Check what fused_sce promises about speed on a GPU: each line a ratio of medians of one interleaved run.

    python benchmarks/gpu_speed.py --output output/benchmarks

Large work (2^27 elements) is timed by CUDA events, each call on the next of several sets of buffers, which together
are larger than the L2 cache, and queued behind a pause so that the host is never waited for: the time of the GPU alone.
"copy" is `Tensor.copy_` of as many bytes as the fused loss must read and write (logits, targets and gradient once), so
that the ratio to it is the share of the card's copy bandwidth. Small work is timed by the host's clock without waiting
for the GPU: what a training step that is short of host time gains.

Prints the table and writes `gpu_speed.json` (every median, kernel launches, peak memory, the environment) and
`gpu_speed.png`. With --strict the exit status is 1 if a line is not met.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from compare_losses import Loss, naive
from cpu_speed import Line, Result, check, show
from measure import MIN_ROUNDS, WARM_UP, environment
from torch import Tensor, nn

import fused_sce

sys.path.append(str(Path(__file__).parent.parent / "tools"))
from launches import launches_of

Candidates = dict[str, Callable[[], object]]

LABELS = 1024  # columns of the large shapes
HOST_CALLS = 10  # calls between two readings of the host's clock
BUFFER_SETS = 3
# Clock cycles of the pause before a timed call, about a millisecond: longer than the host needs to queue any candidate.
PAUSE = 2_000_000

LINES = (
    Line("large float32", "share of the copy bandwidth", "copy", "fused", 0.9),
    Line("large float32", "BCEWithLogitsLoss compiled", "compiled", "fused", 1.5),
    Line("large float32", "BCEWithLogitsLoss eager", "eager", "fused", 4),
    Line("large float32", "naive: sigmoid + BCELoss", "naive", "fused", 6),
    Line("large float32", "MultiLabelSoftMarginLoss against its twin", "soft margin", "fused soft margin", 10),
    Line("large bfloat16, uint8", "share of the copy bandwidth", "copy", "fused", 0.8),
    Line("64x80, host time", "BCEWithLogitsLoss eager", "eager", "fused", 2.5),
    Line("256x1000, host time", "BCEWithLogitsLoss eager", "eager", "fused", 2.5),
)
# Peak memory of forward and backward beyond the inputs, in gradients.
MEMORY_LINE = Line(
    "large float32", "peak memory beyond the inputs, in gradients", "peak", "gradient", 1.0001, at_least=False
)


def whole_call(loss: Loss, inputs: Iterator[tuple[Tensor, Tensor]]) -> Callable[[], object]:
    """Forward + backward of one loss on the next of several inputs."""

    def call() -> None:
        logits, target = next(inputs)
        logits.grad = None
        loss(logits, target).backward()

    return call


def input_sets(
    elements: int, dtype: torch.dtype, target_dtype: torch.dtype, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sets of random logits that want a gradient, and 0/1 targets, in turn without end."""
    columns = min(LABELS, elements)
    shape = (elements // columns, columns)
    sets = []
    for _ in range(BUFFER_SETS):
        logits = torch.empty(shape, dtype=dtype, device=device).normal_(std=3).requires_grad_()
        sets.append((logits, torch.empty(shape, dtype=torch.uint8, device=device).random_(0, 2).to(target_dtype)))
    return itertools.cycle(sets)


def copy(moved: int, device: str) -> Callable[[], object]:
    """A copy that reads and writes `moved` bytes in all."""
    sets = [[torch.zeros(moved // 2, dtype=torch.uint8, device=device) for _ in range(2)] for _ in range(BUFFER_SETS)]
    turn = itertools.cycle(sets)

    def call() -> None:
        source, target = next(turn)
        target.copy_(source)

    return call


def large_float32(elements: int, device: str) -> Candidates:
    """All losses on many float32 logits and targets."""
    inputs = input_sets(elements, torch.float32, torch.float32, device)
    return {
        "copy": copy(elements * 12, device),
        "fused": whole_call(fused_sce.BCEWithLogitsLoss(), inputs),
        "fused, per-class pos_weight": whole_call(
            fused_sce.BCEWithLogitsLoss(pos_weight=torch.rand(min(LABELS, elements), device=device)), inputs
        ),
        "fused soft margin": whole_call(fused_sce.MultiLabelSoftMarginLoss(), inputs),
        "eager": whole_call(nn.BCEWithLogitsLoss(), inputs),
        "compiled": whole_call(torch.compile(nn.BCEWithLogitsLoss(), dynamic=False), inputs),
        "soft margin": whole_call(nn.MultiLabelSoftMarginLoss(), inputs),
        "naive": whole_call(naive, inputs),
    }


def large_bfloat16(elements: int, device: str) -> Candidates:
    """The fused loss on bfloat16 logits with the targets as they come, and torch's with them converted beforehand."""
    labels = input_sets(elements, torch.bfloat16, torch.uint8, device)
    converted = input_sets(elements, torch.bfloat16, torch.bfloat16, device)
    return {
        "copy": copy(elements * 5, device),
        "fused": whole_call(fused_sce.BCEWithLogitsLoss(), labels),
        "fused, bfloat16 targets": whole_call(fused_sce.BCEWithLogitsLoss(), converted),
        "eager": whole_call(nn.BCEWithLogitsLoss(), converted),
    }


def small(rows: int, columns: int, device: str) -> Candidates:
    """The fused loss and torch's on a small shape."""
    logits = torch.randn(rows, columns, device=device, requires_grad=True)
    inputs = itertools.repeat((logits, torch.randint(0, 2, (rows, columns), device=device).float()))
    return {
        "fused": whole_call(fused_sce.BCEWithLogitsLoss(), inputs),
        "eager": whole_call(nn.BCEWithLogitsLoss(), inputs),
        "soft margin": whole_call(nn.MultiLabelSoftMarginLoss(), inputs),
        "fused soft margin": whole_call(fused_sce.MultiLabelSoftMarginLoss(), inputs),
    }


def gpu_seconds(call: Callable[[], object]) -> float:
    """The GPU's time for one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(PAUSE)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def host_seconds(call: Callable[[], object]) -> float:
    """The host's time for one call, on average over HOST_CALLS, not waiting for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    return (time.perf_counter() - start) / HOST_CALLS


def in_rounds(
    candidates: Candidates, timed: Callable[[Callable[[], object]], float], seconds: float
) -> dict[str, float]:
    """The median of each candidate's times, taken in rounds in an order shuffled anew."""
    for call in candidates.values():
        for _ in range(WARM_UP):
            timed(call)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    end = time.perf_counter() + seconds
    while len(times[order[0]]) < MIN_ROUNDS or time.perf_counter() < end:
        random.shuffle(order)
        for name in order:
            times[name].append(timed(candidates[name]))
    return {name: statistics.median(samples) for name, samples in times.items()}


def launches(device: str) -> dict[str, float]:
    """Kernels of forward + backward for each loss, the root gradient given."""
    logits = torch.randn(256, 1000, device=device, requires_grad=True)
    target = torch.randint(0, 2, (256, 1000), device=device).float()
    root = torch.ones((), device=device)
    losses: dict[str, Loss] = {
        "fused": fused_sce.BCEWithLogitsLoss(),
        "fused soft margin": fused_sce.MultiLabelSoftMarginLoss(),
        "eager": nn.BCEWithLogitsLoss(),
        "soft margin": nn.MultiLabelSoftMarginLoss(),
        "naive": naive,
    }

    def count(loss: Loss) -> float:
        return launches_of(lambda: torch.autograd.grad(loss(logits, target), logits, root))

    return {name: count(loss) for name, loss in losses.items()}


def peak_memory(elements: int) -> dict[str, float]:
    """Bytes that forward + backward of the fused loss allocate at their peak, and those of the gradient."""
    logits, target = next(input_sets(elements, torch.float32, torch.uint8, "cuda"))
    loss = fused_sce.BCEWithLogitsLoss()
    loss(logits, target).backward()
    logits.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(logits, target).backward()
    peak = torch.cuda.max_memory_allocated() - before
    return {"peak": float(peak), "gradient": float(logits.numel() * logits.element_size())}


def plot(medians: dict[str, dict[str, float]], facts: dict[str, str], path: Path) -> None:
    """Draw the medians as bars, a panel for each group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, panels = plt.subplots(
        1, len(medians), figsize=(4 * len(medians), 4.5), layout="constrained", squeeze=False
    )
    for panel, (group, times) in zip(panels[0], medians.items(), strict=True):
        bars = panel.barh(list(times), [value * 1e6 for value in times.values()], color="C0")
        panel.bar_label(bars, fmt="%.4g", fontsize=7, padding=2)
        panel.invert_yaxis()
        panel.margins(x=0.2)
        panel.set_title(group, fontsize=10)
        panel.set_xlabel("µs, forward + backward")
    picture.suptitle(f"{facts['device']}, torch {torch.__version__}, {facts['date']}", fontsize=10)
    picture.savefig(path, dpi=110)
    plt.close(picture)


def measure(device: str, elements: int, seconds: float) -> dict[str, dict[str, float]]:
    """The medians of every group, printed as they come."""
    timed = gpu_seconds if device == "cuda" else host_seconds
    groups: dict[str, tuple[Callable[[], Candidates], Callable[[Callable[[], object]], float]]] = {
        "large float32": (lambda: large_float32(elements, device), timed),
        "large bfloat16, uint8": (lambda: large_bfloat16(elements, device), timed),
        "64x80, host time": (lambda: small(64, 80, device), host_seconds),
        "256x1000, host time": (lambda: small(256, 1000, device), host_seconds),
    }
    medians = {}
    for group, (candidates, clock) in groups.items():
        medians[group] = in_rounds(candidates(), clock, seconds)
        if device == "cuda":
            torch.cuda.empty_cache()
        print(f"\n{group}")
        for name, median in medians[group].items():
            print(f"  {name:30}{median * 1e6:12,.1f} us")
    return medians


def main(arguments: list[str] | None = None) -> int:
    """Measure all groups and check all lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), help="folder for JSON and PNG")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each group")
    parser.add_argument(
        "--elements", type=int, default=2**27, help="of the large groups; other than 2^27: to try it out"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the program out")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a line is not met")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    if options.elements < 1:
        parser.error(f"--elements must be at least 1, got {options.elements}")
    options.output.mkdir(parents=True, exist_ok=True)

    facts = {**environment(options.device), "elements": str(options.elements)}
    for name, value in facts.items():
        print(f"{name:14}{value}")
    medians = measure(options.device, options.elements, options.seconds)
    results: list[Result] = check(LINES, medians)
    written: dict[str, object] = {"environment": facts, "median_seconds": medians}
    if options.device == "cuda":
        written["launches"] = launches(options.device)
        memory = peak_memory(options.elements)
        written["memory_bytes"] = memory
        results += check((MEMORY_LINE,), {MEMORY_LINE.group: memory})
        print(f"\nkernel launches, forward + backward: {written['launches']}")
    written["lines"] = [asdict(result) for result in results]
    show(results)
    (options.output / "gpu_speed.json").write_text(json.dumps(written, indent=1) + "\n")
    plot(medians, facts, options.output / "gpu_speed.png")
    print(f"\nwritten: {options.output}/gpu_speed.json, gpu_speed.png")
    return 1 if options.strict and not all(result.met for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
