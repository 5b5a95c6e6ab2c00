"""Time a training step of the example with the fused loss, with torch's and with the naive one, in one interleaved run.

    python benchmarks/train_step.py --output output/benchmarks

The step is the one of `examples/train_multilabel_resnet.py` with its defaults: a ResNet-18, 64 canvases of 48x48
pixels, forward, loss, backward and AdamW. Once with its ten labels, and once with as many as OpenImages has, where the
head is a third of the parameters. Beside each step how much of it is the loss: loss and gradient alone, for logits of
that shape. Prints a table and writes `train_step.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import environment, in_turns

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import train_multilabel_resnet as example
from classifier import LOSSES, WEIGHT_DECAY, Classifier

LABELS = (10, 9605)  # the example's, and OpenImages' trainable ones
NAMES = ("fused", "naive", "torch")
POSITIVE = 0.05  # share of the targets that are 1


def candidates(label_count: int) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """The example's training step with each of its plain losses, and each loss with its gradient alone."""
    options = example.make_parser().parse_args([])
    example.complete_options(options)
    data = example.load_canvases(options)
    labels = [f"label {n}" for n in range(label_count)]
    pictures = torch.stack([data.parts["train"][n][0] for n in range(options.batch_size)])
    shape = (options.batch_size, label_count)
    targets = (torch.rand(shape) < POSITIVE).to(torch.int8)

    def step_of(name: str) -> Callable[[], object]:
        options.loss = name
        module = Classifier(example.configuration_of(options, data), labels)
        optimizer = torch.optim.AdamW(module.parameters(), lr=options.learning_rate, weight_decay=WEIGHT_DECAY)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            module.training_step((pictures, targets), 0).backward()
            optimizer.step()

        return step

    def loss_of(name: str) -> Callable[[], object]:
        logits = torch.randn(shape, requires_grad=True)

        def call() -> None:
            logits.grad = None
            LOSSES[name](logits, targets, pos_weight=None).backward()

        return call

    return {name: step_of(name) for name in NAMES}, {name: loss_of(name) for name in NAMES}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), help="folder for the JSON")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the steps with each number of labels")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    facts = environment("cpu")
    for name, value in facts.items():
        print(f"{name:14}{value}")

    print(f"\n{'labels':>6}  {'loss':8}{'ms per step':>12}{'20 % below':>12}{'80 % below':>12}", end="")
    print(f"{'/ fused':>9}{'loss, ms':>10}")
    rows = []
    for label_count in LABELS:
        steps, losses = candidates(label_count)
        step_times = in_turns(steps, options.seconds)
        loss_times = in_turns(losses, options.seconds / 10)
        for name in steps:
            median, fifths = statistics.median(step_times[name]), statistics.quantiles(step_times[name], n=5)
            # Of each round, so that what slows a whole round down is in neither.
            rounds = zip(step_times[name], step_times["fused"], strict=True)
            ratio = statistics.median(own / fused for own, fused in rounds)
            alone = statistics.median(loss_times[name])
            row = {
                "labels": label_count,
                "loss": name,
                "rounds": len(step_times[name]),
                "step_seconds": median,
                "step_seconds_20": fifths[0],
                "step_seconds_80": fifths[3],
                "ratio_to_fused": ratio,
                "loss_seconds": alone,
            }
            rows.append(row)
            print(
                f"{label_count:6}  {name:8}{median * 1e3:12.1f}{fifths[0] * 1e3:12.1f}{fifths[3] * 1e3:12.1f}", end=""
            )
            print(f"{ratio:9.3f}{alone * 1e3:10.2f}")
    (options.output / "train_step.json").write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
    print(f"\nwritten: {options.output}/train_step.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
