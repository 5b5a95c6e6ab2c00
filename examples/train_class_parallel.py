"""Train a multi-label head whose labels are divided among processes, with fused_sce's loss.

    torchrun --nproc-per-node 2 examples/train_class_parallel.py

With many thousands of labels the logits are the largest tensor of the training. Here each process has the weights, the
logits and the gradients of its own labels only (`ColwiseParallel`), and computes their loss: the logits are never
gathered, forward or backward. On GPUs if there is one for each process, else on the CPU.

At the end the first process does the same training alone, and the two are compared.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fused_sce

SEED = 0
# Of the descent on one label. The mean divides each label's gradient by their number, which the rate makes up for.
LEARNING_RATE = 1.0
# Loss and weights, relative to their size: processes of other shapes multiply matrices in another order.
TOLERANCE = 1e-4


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], prog="train_class_parallel.py")
    for name, default, what in (
        ("labels", 5000, "outputs of the head"),
        ("features", 128, "inputs of the head"),
        ("batch", 256, "samples of a step"),
        ("steps", 20, "steps"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what}; default: {default}")
    return parser


def batches(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (B, F), float32, and targets (B, L), bool, of each step, the same in every process.

    One label in six is set, where a hidden linear model says so.
    """
    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(options.features, options.labels, generator=generator) / options.features**0.5
    for _ in range(options.steps):
        features = torch.randn(options.batch, options.features, generator=generator)
        yield features.to(device), (features @ hidden > 1).to(device)


def make_head(options: argparse.Namespace, device: torch.device) -> nn.Linear:
    """The head, with the same weights in every process."""
    torch.manual_seed(SEED)
    return nn.Linear(options.features, options.labels).to(device)


def train(
    head: nn.Module,
    options: argparse.Namespace,
    device: torch.device,
    place: Callable[[Tensor], Tensor] = lambda targets: targets,
) -> Iterator[float]:
    """Train a head, whole or sharded, and yield the loss of each step; `place` gives targets the logits' placement."""
    criterion = fused_sce.BCEWithLogitsLoss()
    optimizer = torch.optim.SGD(head.parameters(), lr=LEARNING_RATE * options.labels)
    for features, targets in batches(options, device):
        optimizer.zero_grad()
        loss = criterion(head(features), place(targets))
        loss.backward()
        optimizer.step()
        # Of a sharded loss each process has its labels' share; item() would return that.
        yield (loss.full_tensor() if isinstance(loss, DTensor) else loss).item()


def run(options: argparse.Namespace, device: torch.device) -> bool:
    """Train the sharded head, then compare in the first process; True if that found no difference."""
    first, processes = dist.get_rank() == 0, dist.get_world_size()
    mesh = init_device_mesh(device.type, (processes,))
    head = make_head(options, device)
    # use_local_output=False: the logits stay a DTensor, by which the loss knows that it sees a part of the labels.
    parallelize_module(head, mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
    assert isinstance(head.weight, DTensor)
    if first:
        own = head.weight.to_local().shape[0]
        print(f"{options.labels} labels on {processes} processes ({device.type}), {own} on the first", flush=True)

    losses = []
    # Every process has all targets (src_data_rank=None: nothing is sent) and keeps those of its labels.
    shard = functools.partial(distribute_tensor, device_mesh=mesh, placements=[Shard(-1)], src_data_rank=None)
    for step, loss in enumerate(train(head, options, device, shard), start=1):
        losses.append(loss)
        if first:
            print(f"step {step:3d}  loss {loss:.6f}", flush=True)

    weight = head.weight.full_tensor().detach()  # all processes take part
    if not first:
        return True
    alone = make_head(options, device)
    expected = torch.tensor(list(train(alone, options, device)))
    by_loss = ((torch.tensor(losses) - expected).abs().max() / expected.abs().max()).item()
    by_weight = ((weight - alone.weight).abs().max() / alone.weight.abs().max()).item()
    same = max(by_loss, by_weight) <= TOLERANCE
    print(
        f"the same training in one process: {'the same' if same else 'NOT THE SAME'} result, largest relative "
        f"difference of a loss {by_loss:.1e}, of a weight {by_weight:.1e}"
    )
    return same


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments, by default `sys.argv`'s; the exit status is 1 if one process gave another result."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if value < 1:
            parser.error(f"argument --{name}: must be a whole number of at least 1, got '{value}'")
    if "LOCAL_RANK" not in os.environ:
        parser.error(
            "it runs in several processes, which torchrun starts: "
            "torchrun --nproc-per-node 2 examples/train_class_parallel.py"
        )
    processes = int(os.environ["WORLD_SIZE"])
    if options.labels < processes:
        parser.error(f"--labels {options.labels} leaves some of the {processes} processes without a label")

    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        same = run(options, device)
        # No process leaves while another still works: Gloo's threads outlive a collective by a moment, which can end a
        # process that is taken down at once (see pytorch#179291).
        dist.barrier()
        return 0 if same else 1
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
