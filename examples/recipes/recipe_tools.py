"""What the recipes share besides their data: options, a plain training loop, and inference."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

BATCH_SIZE = 32
# After 30 steps from random weights, a ResNet-18 is right on 94 % of the test digits at 3e-4 and on 66 % at 1e-3: the
# faster the weights move, the further batch normalisation's running averages, which inference uses, lag behind them.
LEARNING_RATE = 3e-4

Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs and targets


def count(text: str) -> int:
    """An option that counts something: an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def parse_options(
    description: str | None, argv: Sequence[str] | None, *, steps: int | None = None, epochs: int | None = None
) -> argparse.Namespace:
    """Parse a recipe's options and set seed and threads; give the default of --steps (ResNets) or of --epochs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="of the CPU")
    length = "--epochs" if steps is None else "--steps"
    parser.add_argument(length, type=count, default=epochs or steps, help="per training (default %(default)s)")
    if steps is not None:  # `weights` as torchvision's models take it
        parser.add_argument("--pretrained", dest="weights", action="store_const", const="DEFAULT", help="downloaded")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    return options


def fit(
    model: nn.Module, loss: Loss, images: Tensor, targets: Tensor, *, steps: int, learning_rate: float = LEARNING_RATE
) -> list[float]:
    """Train what is not frozen on images (N, 3, height, width) and targets (N, ...); return the loss of each step."""
    # Made here, after any change of the head: an optimizer holds on to the parameters it was given.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    device = next(model.parameters()).device
    data = TensorDataset(images, targets)
    size = min(BATCH_SIZE, len(data))
    # Every picture once before any of them twice, and no short batch.
    sampler = RandomSampler(data, num_samples=steps * size)
    losses = []
    model.train()
    for batch, target in DataLoader(data, size, sampler=sampler):
        value = loss(model(batch.to(device)), target.to(device))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """What `model` returns for all images, in evaluation mode and without gradients; on the CPU."""
    outputs: Tensor = model.eval()(images.to(next(model.parameters()).device))
    return outputs.cpu()


def backbone(model: nn.Module) -> nn.Sequential:
    """All layers of a torchvision ResNet but the last, with their weights: images -> features (N, F)."""
    return nn.Sequential(*list(model.children())[:-1], nn.Flatten())


def progress(losses: Sequence[float]) -> str:
    """Mean loss over the first and the last tenth of a training, as text: single steps are noisy."""
    tenth = max(1, len(losses) // 10)
    return f"loss {sum(losses[:tenth]) / tenth:.3f} -> {sum(losses[-tenth:]) / tenth:.3f}"
