"""Time the fused losses against torch's, forward and forward + backward, in one interleaved run.

    python benchmarks/compare_losses.py --output output/benchmarks

Each round calls every loss once, in an order shuffled anew; the figure is the median over rounds. Gradients are dropped
before each call, as `optimizer.zero_grad()` does. Prints a table and writes `compare_losses.json` (every figure
and the environment) and `compare_losses.png`.

Columns: time per call, ns per element (logit), the ratio to the fused loss, and bytes per second counting only what any
implementation must move: logits and targets read once, and with backward the gradient written once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
from measure import environment, in_turns
from torch import Tensor, nn

import fused_sce

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

Loss = Callable[[Tensor, Tensor], Tensor]

# A ResNet head for MS-COCO's 80 labels, 256 pictures of 1000 labels, and OpenImages' 9605 trainable labels.
SHAPES = ((64, 80), (256, 1000), (1024, 9605))
FUSED = "fused_sce.BCEWithLogitsLoss"


@dataclass
class Figure:
    """The time of one loss on one shape."""

    loss: str
    shape: tuple[int, int]
    backward: bool
    rounds: int
    seconds: float  # median
    seconds_20: float  # 20 % of the rounds took less
    seconds_80: float  # 80 % of the rounds took less
    ns_per_element: float
    ratio_to_fused: float
    gigabytes_per_second: float


def naive(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """What tutorials write: a sigmoid layer, then BCELoss."""
    return nn.functional.binary_cross_entropy(torch.sigmoid(logits), target, reduction=reduction)


def losses() -> dict[str, Loss]:
    """The losses compared, by name."""
    return {
        FUSED: fused_sce.BCEWithLogitsLoss(),
        "fused_sce.MultiLabelSoftMarginLoss": fused_sce.MultiLabelSoftMarginLoss(),
        "BCEWithLogitsLoss": nn.BCEWithLogitsLoss(),
        "BCEWithLogitsLoss compiled": torch.compile(nn.BCEWithLogitsLoss(), dynamic=False),
        "MultiLabelSoftMarginLoss": nn.MultiLabelSoftMarginLoss(),
        "naive: sigmoid + BCELoss": naive,
    }


def forward(loss: Loss, logits: Tensor, target: Tensor) -> None:
    """One call without a graph."""
    with torch.no_grad():
        loss(logits, target)


def forward_backward(loss: Loss, logits: Tensor, target: Tensor) -> None:
    """One call with its gradient, made anew."""
    logits.grad = None
    loss(logits, target).backward()


def compare(shape: tuple[int, int], backward: bool, dtype: torch.dtype, device: str, seconds: float) -> list[Figure]:
    """Time every loss on one shape for about `seconds` in all, at least MIN_ROUNDS rounds."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=torch.float32, device=device) * 3
    logits = logits.to(dtype).requires_grad_()
    target = torch.randint(0, 2, shape, generator=generator, device=device).to(dtype)
    run = forward_backward if backward else forward

    def call(loss: Loss) -> Callable[[], None]:
        return lambda: run(loss, logits, target)

    times = in_turns({name: call(loss) for name, loss in losses().items()}, seconds, device)

    elements = shape[0] * shape[1]
    bytes_moved = elements * dtype.itemsize * (3 if backward else 2)
    fused = statistics.median(times[FUSED])
    figures = []
    for name, samples in times.items():
        fifths = statistics.quantiles(samples, n=5)
        median = statistics.median(samples)
        figures.append(
            Figure(
                loss=name,
                shape=shape,
                backward=backward,
                rounds=len(samples),
                seconds=median,
                seconds_20=fifths[0],
                seconds_80=fifths[3],
                ns_per_element=median / elements * 1e9,
                ratio_to_fused=median / fused,
                gigabytes_per_second=bytes_moved / median / 1e9,
            )
        )
    return figures


def show(figures: list[Figure]) -> None:
    """Print one shape's table."""
    rows, columns = figures[0].shape
    what = "forward + backward" if figures[0].backward else "forward"
    print(f"\n{rows} x {columns}, {what}, {figures[0].rounds} rounds")
    print(f"{'':36}{'time':>12}{'ns/element':>12}{'ratio':>8}{'GB/s':>8}")
    for figure in figures:
        time_text = f"{figure.seconds * 1e6:,.0f} us"
        print(
            f"{figure.loss:36}{time_text:>12}{figure.ns_per_element:12.2f}"
            f"{figure.ratio_to_fused:8.2f}{figure.gigabytes_per_second:8.2f}"
        )


def plot(figures: list[Figure], facts: dict[str, str], path: Path) -> None:
    """Draw the times per element as bars: a panel for each direction, a group for each shape."""
    names = list(dict.fromkeys(figure.loss for figure in figures))
    shapes = list(dict.fromkeys(figure.shape for figure in figures))
    picture, panels = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for panel, backward in zip(panels, (False, True), strict=True):
        for place, name in enumerate(names):
            heights = [
                figure.ns_per_element for figure in figures if figure.loss == name and figure.backward == backward
            ]
            left = [group + (place - len(names) / 2 + 0.5) * 0.14 for group in range(len(shapes))]
            bars = panel.bar(left, heights, 0.13, label=name, color=f"C{place}")
            panel.bar_label(bars, fmt="%.3g", fontsize=6, padding=1)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
        panel.set_xticks(range(len(shapes)), [f"{n} x {c}" for n, c in shapes])
        panel.set_title("forward + backward" if backward else "forward")
        panel.grid(axis="y", which="major", alpha=0.3)
        panel.set_axisbelow(True)
    panels[0].set_ylabel("ns per element (log scale)")
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    where = facts["device"] if facts["device"] != "cpu" else facts["processor"]
    picture.suptitle(f"{facts['dtype']}, {where}, {facts['threads']} thread(s), torch {torch.__version__}", fontsize=10)
    picture.savefig(path, dpi=130)
    plt.close(picture)


def parse_shape(text: str) -> tuple[int, int]:
    """Rows and columns of a shape written 256x1000."""
    try:
        rows, columns = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape is written 256x1000, got {text!r}") from None
    if rows < 1 or columns < 1:
        raise argparse.ArgumentTypeError(f"both sizes must be at least 1, got {text!r}")
    return rows, columns


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), help="folder for JSON and PNG")
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=list(SHAPES), metavar="NxC")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each shape and direction")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    options.output.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    facts = {**environment(options.device), "dtype": options.dtype, "threads": str(options.threads)}
    for name, value in facts.items():
        print(f"{name:14}{value}")
    figures: list[Figure] = []
    for shape in options.shapes:
        for backward in (False, True):
            new = compare(shape, backward, dtype, options.device, options.seconds)
            show(new)
            figures += new

    results = {"environment": facts, "figures": [asdict(figure) for figure in figures]}
    (options.output / "compare_losses.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(figures, facts, options.output / "compare_losses.png")
    print(f"\nwritten: {options.output}/compare_losses.json, compare_losses.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
