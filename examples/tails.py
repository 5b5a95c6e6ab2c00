"""Does it matter? Trainings that stall or die with other libraries' losses, and trainings where nothing changes.

    python examples/tails.py [--output output/tails] [--seeds 3]

Each experiment trains the same model on the same batches with the same optimizer; only the loss differs.

* rare label: one logit per item, bfloat16 logits, `pos_weight` = negatives / positives. Outcome: how many pairs of the
  items that mostly have the label are ranked right.
* late labels: the digits 7, 8 and 9 are labelled only after a first training that drove their logits far down.
  Outcome: F1 of the three labels on test pictures.
* late labels, short: the same after a shorter first training.
* late negatives: late labels with the opposite labels (1 for "it is not a 7").
* NaN: losses whose gradient is NaN at large logits. Outcome: the step after which the model is NaN.
* no difference: digits with ten labels, as everybody trains them. Outcome: F1 on test pictures.

Writes `tails.png`, `tails.json` and the tables that it prints. Needs the extras `examples` and `ecosystem`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from timm.loss.asymmetric_loss import AsymmetricLossMultiLabel
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits, one_hot
from torchvision.ops import sigmoid_focal_loss

from fused_sce import functional as F

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Loss = Callable[[Tensor, Tensor], Tensor]

POINTS = 40  # of a curve
TRAIN = 1200  # pictures of the 1,797; the others are for the test
BATCH = 128
LATE = [7, 8, 9]
START = -10.0  # where the logits of detectors start: an object in 22,000 places
BFLOAT16_STALL, FLOAT32_STALL = 6.25, 16.64  # sigmoid(x) rounds to 1 from here on


@dataclass
class Run:
    """A training: a curve over its steps, and what came out."""

    steps: list[int] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    outcome: dict[str, float] = field(default_factory=dict)


Runs = dict[str, Run]  # by the name of the loss


def naive(x: Tensor, t: Tensor) -> Tensor:
    """The loss of models that end in a sigmoid."""
    return binary_cross_entropy(torch.sigmoid(x), t.to(x.dtype))


# 1. One logit per item: nothing is shared between items, so nobody else pushes a logit whose own gradient is lost.


def rare_label(seed: int, items: int = 20_000, steps: int = 600) -> Runs:
    """One item of 500 has the label in 50 % to 99 % of its observations, the others in 0.001 %."""
    generator = torch.Generator().manual_seed(seed)
    frequent = items // 500
    rate_logit = torch.full((items,), math.log(1e-5))
    rate_logit[:frequent] = 4.6 * torch.rand(frequent, generator=generator)
    rate = torch.sigmoid(rate_logit)  # the target: the share of positives among many observations
    pos_weight = (1 - rate).sum() / rate.sum()

    def in_order(logit: Tensor) -> float:
        a, b = torch.triu_indices(frequent, frequent, 1)
        return ((logit[a] - logit[b]) * (rate_logit[a] - rate_logit[b]) > 0).float().mean().item()

    def train(loss: Loss, dtype: torch.dtype) -> Run:
        logit = nn.Parameter(torch.zeros(items))
        optimizer = torch.optim.Adam([logit], lr=0.1, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
        run = Run()
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss(logit.to(dtype), rate).backward()
            optimizer.step()
            schedule.step()
            if step % max(steps // POINTS, 1) == 0:
                run.steps.append(step)
                run.curve.append(logit[:frequent].mean().item())
        run.outcome = {"pairs in order": in_order(logit.detach()), "mean logit": run.curve[-1]}
        return run

    torchs = partial(binary_cross_entropy_with_logits, pos_weight=pos_weight, reduction="sum")
    ours = partial(F.binary_cross_entropy_with_logits, pos_weight=pos_weight, reduction="sum")
    return {
        "torch, bfloat16": train(torchs, torch.bfloat16),
        "fused_sce, bfloat16": train(ours, torch.bfloat16),
        "torch, float32": train(torchs, torch.float32),
        "fused_sce, float32": train(ours, torch.float32),
    }


# The others train a small network on scikit-learn's scanned digits, one label per digit.


class Digits:
    """Pictures and labels of scikit-learn's digits, in an order of their own for each seed."""

    def __init__(self, seed: int) -> None:
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
        self.seed = seed
        self.pictures = torch.from_numpy(data.data).float()[order] / 16
        self.labels = one_hot(torch.from_numpy(data.target)[order], 10).float()

    def network(self, bias: float = 0.0) -> nn.Sequential:
        """64 inputs, 64 hidden units, 10 logits that start near `bias`."""
        torch.manual_seed(self.seed)
        output = nn.Linear(64, 10)
        nn.init.constant_(output.bias, bias)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), output)

    def train(
        self,
        network: nn.Sequential,
        loss: Loss,
        labels: Tensor,
        steps: int,
        score: Callable[[nn.Sequential], float],
        *,
        lr: float = 3e-3,
        dtype: torch.dtype = torch.float32,
    ) -> Run:
        """Adam on random batches; the network computes under autocast unless `dtype` is float32, the loss does not."""
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.Adam(network.parameters(), lr=lr)
        run = Run()
        for step in range(1, steps + 1):
            batch = torch.randint(TRAIN, (BATCH,), generator=generator)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = network(self.pictures[batch])
            optimizer.zero_grad()
            loss(logits, labels[batch]).backward()
            optimizer.step()
            *_, bias = network.parameters()
            dead = bool(bias.isnan().any())
            if dead or step % max(steps // POINTS, 1) == 0:
                run.steps.append(step)
                run.curve.append(score(network))
            if dead:
                run.outcome["NaN after step"] = step
                break
        return run

    @torch.no_grad()
    def f1(self, network: nn.Sequential, columns: list[int], sign: float = 1.0) -> float:
        """Of test pictures and some labels, at probability 1/2; micro average."""
        said = sign * network(self.pictures[TRAIN:])[:, columns] > 0
        true = self.labels[TRAIN:, columns] > 0
        return float(2 * (said & true).sum() / (said.sum() + true.sum()))


# 2. and 3. What a first training drove far down, or far up, has to come back.


def late(seed: int, sign: float, losses: dict[str, Loss], stages: int, stage: int, steps: int) -> Runs:
    """Train without some labels, then with them.

    Args:
        seed: of everything.
        sign: -1 for the opposite labels, so that logits have the opposite sign.
        losses: those of the last training, by name.
        stages: of the first training. Each has a new optimizer, as training that goes on from weights alone: Adam's
            first steps have the full length, however small the gradients are, and drive logits further.
        stage: steps of a stage.
        steps: of the last training.
    """
    digits = Digits(seed)
    labels, early = digits.labels, digits.labels.clone()
    early[:, LATE] = 0
    if sign < 0:
        labels, early = 1 - labels, 1 - early
    score = partial(digits.f1, columns=LATE, sign=sign)
    first = partial(F.sigmoid_cross_entropy, reduction="sum_classes")
    network = digits.network(sign * START)
    for _ in range(stages):
        digits.train(network, first, early, stage, score, lr=1e-2)
    with torch.no_grad():
        logits = network(digits.pictures[:TRAIN])[:, LATE][digits.labels[:TRAIN, LATE] > 0]
    nearest = sign * (sign * logits).max().item()
    runs = {}
    for name, loss in losses.items():
        tuned = copy.deepcopy(network)
        runs[name] = digits.train(tuned, loss, labels, steps, score, lr=1e-3)
        runs[name].outcome = {"nearest logit before": nearest, "F1": score(tuned)}
    return runs


def late_labels(seed: int, stages: int = 3, stage: int = 500, steps: int = 800) -> Runs:
    """Positives at very negative logits."""
    losses: dict[str, Loss] = {
        "timm AsymmetricLossMultiLabel": AsymmetricLossMultiLabel(),
        "fused_sce AsymmetricLoss": partial(F.asymmetric_loss, reduction="sum_classes"),
    }
    return late(seed, 1.0, losses, stages, stage, steps)


def late_negatives(seed: int, stages: int = 3, stage: int = 500, steps: int = 800) -> Runs:
    """Negatives at very positive logits."""
    losses: dict[str, Loss] = {
        "sigmoid + BCELoss": naive,
        "torch BCEWithLogitsLoss": binary_cross_entropy_with_logits,
        "fused_sce": F.binary_cross_entropy_with_logits,
    }
    return late(seed, -1.0, losses, stages, stage, steps)


# 4. A gradient that is NaN once makes every weight NaN.


def nan(seed: int, steps: int = 800, start: float = 0.0) -> Runs:
    """The focal loss of torchvision with a gamma below 1, and BCELoss in float16; logits start near `start`."""
    theirs = partial(sigmoid_focal_loss, gamma=0.5, reduction="mean")
    ours = partial(F.sigmoid_focal_loss, gamma=0.5, reduction="mean")
    digits = Digits(seed)
    score = partial(digits.f1, columns=list(range(10)))

    def train(loss: Loss, dtype: torch.dtype) -> Run:
        network = digits.network(start)
        run = digits.train(network, loss, digits.labels, steps, score, dtype=dtype)
        run.outcome["F1"] = score(network)
        return run

    return {
        "torchvision focal, float32": train(theirs, torch.float32),
        "fused_sce focal, float32": train(ours, torch.float32),
        "torchvision focal, bfloat16": train(theirs, torch.bfloat16),
        "fused_sce focal, bfloat16": train(ours, torch.bfloat16),
        "sigmoid + BCELoss, float16": train(naive, torch.float16),
        "fused_sce, float16": train(F.binary_cross_entropy_with_logits, torch.float16),
    }


# 5. What most people train.


def no_difference(seed: int, steps: int = 1200) -> Runs:
    """BCEWithLogitsLoss, torch's and ours, from logits near 0 and, as detectors start, near -10."""
    digits = Digits(seed)
    score = partial(digits.f1, columns=list(range(10)))
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        for bias in (0.0, START):
            for name, loss in (
                ("torch", binary_cross_entropy_with_logits),
                ("fused_sce", F.binary_cross_entropy_with_logits),
            ):
                network = digits.network(bias)
                with torch.no_grad():
                    first = loss(network(digits.pictures).to(dtype), torch.zeros_like(digits.labels)).item()
                run = digits.train(network, loss, digits.labels, steps, score, dtype=dtype)
                with torch.no_grad():
                    positives = network(digits.pictures[:TRAIN])[digits.labels[:TRAIN] > 0]
                stall = FLOAT32_STALL if dtype == torch.float32 else BFLOAT16_STALL
                run.outcome = {
                    "F1": score(network),
                    "positives beyond the stall": (positives >= stall).float().mean().item(),
                    "first loss of negatives": first,
                }
                runs[f"{name}, {str(dtype).removeprefix('torch.')}, from {bias:g}"] = run
    return runs


EXPERIMENTS: dict[str, Callable[[int], Runs]] = {
    "rare label": rare_label,
    "late labels": late_labels,
    "late negatives": late_negatives,
    "NaN": nan,
    "late labels, short": partial(late_labels, stages=1),
    "no difference": no_difference,
}


def draw(results: dict[str, list[Runs]], file: Path) -> None:
    """The curves of the first seed, one picture per experiment."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, (name, seeds) in zip(axes.flat, results.items(), strict=True):
        for loss, run in seeds[0].items():
            ours = loss.startswith("fused_sce")
            style = {"linestyle": "--", "linewidth": 1.5} if ours else {"linewidth": 3.5, "alpha": 0.6}
            (line,) = axis.plot(run.steps, run.curve, label=loss, **style)
            if "NaN after step" in run.outcome:
                axis.plot(run.steps[-1], run.curve[-1], "x", color=line.get_color(), markersize=12, markeredgewidth=3)
        axis.set(
            title=name,
            xlabel="step",
            ylabel="mean logit of items that mostly have the label" if name == "rare label" else "F1",
        )
        axis.legend(fontsize="small")
    figure.savefig(file, dpi=100)


def cell(value: float | None) -> str:
    """Only the step of a NaN may be missing."""
    return "never" if value is None else f"{value:.4g}"


def table(seeds: list[Runs]) -> str:
    """Outcomes as a Markdown table; the seeds' values are separated by slashes."""
    columns = list(dict.fromkeys(column for run in seeds[0].values() for column in run.outcome))
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for loss in seeds[0]:
        cells = [" / ".join(cell(runs[loss].outcome.get(column)) for runs in seeds) for column in columns]
        lines.append(f"| {loss} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(experiment: str, seed: int) -> Runs:
    """One experiment; these models are too small for more than one thread."""
    torch.set_num_threads(1)
    return EXPERIMENTS[experiment](seed)


def main(arguments: list[str] | None = None) -> int:
    """Run all experiments, two at a time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("output/tails"), help="folder for picture and JSON")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (3)")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    options.output.mkdir(parents=True, exist_ok=True)

    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = {name: [pool.submit(run, name, seed) for seed in range(options.seeds)] for name in EXPERIMENTS}
        results = {}
        for name, seeds in jobs.items():
            results[name] = [job.result() for job in seeds]
            print(f"{name}; seeds: {options.seeds}\n\n{table(results[name])}\n", flush=True)
    draw(results, options.output / "tails.png")
    versions = {module: version(module) for module in ("torch", "torchvision", "timm")}
    experiments = {
        name: [{loss: asdict(one) for loss, one in runs.items()} for runs in seeds] for name, seeds in results.items()
    }
    (options.output / "tails.json").write_text(json.dumps({"versions": versions, "experiments": experiments}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
