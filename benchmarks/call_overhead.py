"""Time what a call costs beside its arithmetic, on a head so small that little of that is left; count compilations.

    python benchmarks/call_overhead.py --output output/benchmarks

One row of eight logits, forward and forward + backward, on the CPU: every way to call the loss, in one interleaved run.
Then, for `torch.compile` with its defaults, how many graphs a training loop over seven batch sizes makes. Prints both
tables and writes `call_overhead.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare_losses import Loss, forward, forward_backward, naive
from measure import environment, in_turns
from torch import Tensor, nn

import fused_sce

SHAPE = (1, 8)
CALLS = 50  # between two readings of the clock, which alone is a tenth of a call
BATCHES = (64, 32, 64, 17, 100, 128, 5)  # the second size makes torch.compile take the batch for dynamic


def patched(logits: Tensor, target: Tensor) -> Tensor:
    """The function of torch that patch_torch replaces."""
    return nn.functional.binary_cross_entropy_with_logits(logits, target)


def losses() -> dict[str, Loss]:
    """Every way to call the loss, and torch's."""
    return {
        "fused_sce.BCEWithLogitsLoss": fused_sce.BCEWithLogitsLoss(),
        "fused_sce.functional": fused_sce.functional.binary_cross_entropy_with_logits,
        "fused_sce.SigmoidCrossEntropyLoss": fused_sce.SigmoidCrossEntropyLoss(),
        "torch.nn.functional, patched": patched,
        "fused_sce, weight and pos_weight": fused_sce.BCEWithLogitsLoss(torch.rand(8), pos_weight=torch.rand(8)),
        "fused_sce.MultiLabelSoftMarginLoss": fused_sce.MultiLabelSoftMarginLoss(),
        "torch BCEWithLogitsLoss": nn.BCEWithLogitsLoss(),
        "torch, weight and pos_weight": nn.BCEWithLogitsLoss(torch.rand(8), pos_weight=torch.rand(8)),
        "torch MultiLabelSoftMarginLoss": nn.MultiLabelSoftMarginLoss(),
        "naive: sigmoid + BCELoss": naive,
    }


def call_times(seconds: float) -> dict[str, dict[str, float]]:
    """Median seconds of a call: of each loss, forward and forward + backward."""
    logits = torch.randn(SHAPE, requires_grad=True)
    target = torch.randint(0, 2, SHAPE).float()

    def repeated(run: Callable[[Loss, Tensor, Tensor], None], name: str, loss: Loss) -> Callable[[], None]:
        def call() -> None:
            if "patched" in name:
                with fused_sce.patch_torch():
                    for _ in range(CALLS):
                        run(loss, logits, target)
            else:
                for _ in range(CALLS):
                    run(loss, logits, target)

        return call

    found: dict[str, dict[str, float]] = {name: {} for name in losses()}
    for direction, run in (("forward", forward), ("forward + backward", forward_backward)):
        times = in_turns({name: repeated(run, name, loss) for name, loss in losses().items()}, seconds)
        for name, samples in times.items():
            found[name][direction] = statistics.median(samples) / CALLS
    return found


def compilations() -> dict[str, int]:
    """Graphs that `torch.compile` with its defaults makes of each loss for a training loop over BATCHES."""
    counts = {}
    compiled = {
        "fused_sce.BCEWithLogitsLoss": fused_sce.BCEWithLogitsLoss(),
        "fused_sce.MultiLabelSoftMarginLoss": fused_sce.MultiLabelSoftMarginLoss(),
        "torch BCEWithLogitsLoss": nn.BCEWithLogitsLoss(),
        "torch MultiLabelSoftMarginLoss": nn.MultiLabelSoftMarginLoss(),
    }
    for name, loss in compiled.items():
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Any], graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        fast = torch.compile(loss, fullgraph=True, backend=backend)
        for rows in BATCHES:
            forward_backward(fast, torch.randn(rows, 80, requires_grad=True), torch.rand(rows, 80))
        counts[name] = len(graphs)
    torch._dynamo.reset()
    return counts


def main(arguments: list[str] | None = None) -> int:
    """Measure, count, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), help="folder for the JSON")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each direction")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    facts = environment("cpu")
    for name, value in facts.items():
        print(f"{name:14}{value}")

    times = call_times(options.seconds)
    print(f"\n{'us per call, ' + 'x'.join(map(str, SHAPE)):36}{'forward':>10}{'forward + backward':>20}")
    for name, row in times.items():
        print(f"{name:36}{row['forward'] * 1e6:10.1f}{row['forward + backward'] * 1e6:20.1f}")
    graphs = compilations()
    print(f"\n{f'graphs for {len(BATCHES)} batches, {len(set(BATCHES))} sizes':36}{'compiled':>10}")
    for name, count in graphs.items():
        print(f"{name:36}{count:10}")

    written = {"environment": facts, "shape": SHAPE, "median_seconds": times, "batches": BATCHES, "graphs": graphs}
    (options.output / "call_overhead.json").write_text(json.dumps(written, indent=1) + "\n")
    print(f"\nwritten: {options.output}/call_overhead.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
