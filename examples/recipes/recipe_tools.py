"""What the recipes share besides their data: options, a plain training loop, and inference."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

BATCH_SIZE = 32
# After 30 steps from random weights, a ResNet-18 is right on 94 % of the test digits at 3e-4 and on
# 66 % at 1e-3: the faster the weights move, the further batch normalisation's running averages,
# which inference uses, lag behind them.
LEARNING_RATE = 3e-4


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every recipe has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        # Threads that wait for one another on a core that they share with other programs can take
        # ten times as long as a single one.
        help="of the CPU (default %(default)s); 1 is best where the cores are busy",
    )
    return parser


def resnet_options(description: str | None, argv: Sequence[str] | None, *, steps: int) -> argparse.Namespace:
    """Parse the options of a ResNet recipe (`steps` is the default of --steps) and apply them."""
    parser = option_parser(description)
    parser.add_argument("--steps", type=int, default=steps, help="per training (default %(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="start from ImageNet weights (a download)")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    return options


def batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of indices below `count`, reshuffled whenever the data has been seen once.

    A short last batch is left out: batch normalisation cannot train on a single picture.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(BATCH_SIZE, count)
    waiting: list[Tensor] = []
    for _ in range(steps):
        if not waiting:
            order = torch.randperm(count, generator=generator)
            waiting = [order[i : i + size] for i in range(0, count - size + 1, size)]
        yield waiting.pop()


def fit(
    model: nn.Module,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    *,
    steps: int,
    seed: int,
    learning_rate: float = LEARNING_RATE,
) -> list[float]:
    """Train whatever in `model` is not frozen and return the loss of each step.

    `images` is (N, 3, height, width) float32 and `targets` (N, ...) in what form `loss_function`
    takes; both stay where they are, and batches of them move to the model's device.
    """
    # Made here, after any change of the head: an optimizer holds on to the parameters it was
    # given, and one that is older than the head would never train it.
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=learning_rate,
    )
    device = next(model.parameters()).device
    model.train()
    losses = []
    for batch in batches(len(images), steps, seed):
        loss = loss_function(model(images[batch].to(device)), targets[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # .item() here would make a GPU wait in every step
    values: list[float] = torch.stack(losses).tolist() if losses else []
    return values


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], images: Tensor, device: str) -> Tensor:
    """`function` of all images without gradients, some hundred at a time; the result on the CPU."""
    return torch.cat([function(chunk.to(device)).cpu() for chunk in images.split(256)])


def ends(losses: Sequence[float]) -> tuple[float, float]:
    """Mean loss over the first and the last tenth of a training: single steps are noisy."""
    width = max(1, len(losses) // 10)
    return sum(losses[:width]) / width, sum(losses[-width:]) / width
