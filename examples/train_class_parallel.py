"""Train a head of many labels that are divided among processes, and go on after one of them died.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_class_parallel.py --checkpoint FOLDER

With many thousands of labels the head and its logits are the largest tensors of the training. Here each process has the
weights, gradients and optimizer state of its own labels only (`Shard(0)`), and computes their loss by chunks: all
logits exist nowhere, forward or backward. The backbone is small, and the same in every process. Each step sends the
gradient by the head's input and the loss. On GPUs if there is one for each process, else on the CPU.

A checkpoint is written every few steps, and at start the last whole one is loaded, by any number of processes. When a
process dies, the others stop with an error: at once where its connections break, else after `--timeout`. torchrun then
starts all of them again; the variable makes it do so with a new store, where the processes find no address of one that
died (see pytorch#135712). On several machines the folder is one that all of them see.

At the end the first process does the same training alone, and the two are compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fused_sce

SEED = 0
LEARNING_RATE = 1e-2
MOST_POSITIVES = 4  # of a sample
# Of the logits that exist at a time. The loss's default would hold all of this small example.
CHUNK_BYTES = 2**20
# Losses and weights, relative to the largest: other processes add up in another order.
TOLERANCE = 1e-4
OF_CHECKPOINT = ("labels", "features", "hidden", "batch")
"""The options that must stay the same when a training goes on."""


class Tagger(nn.Module):
    """A small backbone, and the head of all labels."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(options.features, options.hidden), nn.ReLU())
        criterion = fused_sce.LinearSigmoidCrossEntropyLoss(
            target_format="index_list", reduction="sum_classes", chunk_bytes=CHUNK_BYTES
        )
        self.head = fused_sce.MultiLabelHead(options.hidden, options.labels, fused_loss=criterion)

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """Features (B, F) and the indices of their labels (B, K), padded with -1, to the loss."""
        loss: Tensor = self.head(self.backbone(features), target)
        return loss


def make_model(options: argparse.Namespace, device: torch.device) -> tuple[Tagger, torch.optim.Optimizer]:
    """The model and its optimizer; in the processes of a group, of which each keeps the head of its own labels."""
    torch.manual_seed(SEED)  # the same weights in every process
    model = Tagger(options).to(device)
    if dist.is_initialized():
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for name, whole in list(model.head.named_parameters()):
            own = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)  # nothing is sent
            setattr(model.head, name, nn.Parameter(own))
    # Two groups: the optimizer may take all tensors of a group at once, which must be of one kind.
    parts = [{"params": part.parameters()} for part in (model.backbone, model.head)]
    return model, torch.optim.Adam(parts, lr=LEARNING_RATE)


def batches(options: argparse.Namespace, device: torch.device, done: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The steps after `done`, with features (B, F) and label indices (B, K), the same in every process.

    Each sample has one to K labels, and its features are the sum of their directions, and noise.
    """
    generator = torch.Generator().manual_seed(SEED)
    directions = torch.randn(options.labels, options.features, generator=generator)
    number = torch.arange(MOST_POSITIVES)
    span = options.labels // MOST_POSITIVES  # a label of each span: none comes twice
    for step in range(done + 1, options.steps + 1):
        generator.manual_seed(SEED + step)  # so that a training can go on from any step
        target = number * span + torch.randint(span, (options.batch, MOST_POSITIVES), generator=generator)
        count = torch.randint(1, MOST_POSITIVES + 1, (options.batch, 1), generator=generator)
        target = target.masked_fill(number >= count, -1)
        noise = torch.randn(options.batch, options.features, generator=generator)
        features = noise / 4 + (directions[target] * (target >= 0).unsqueeze(-1)).sum(1)
        yield step, features.to(device), target.to(device)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: argparse.Namespace, device: torch.device, done: int = 0
) -> Iterator[tuple[int, float]]:
    """Make the steps after `done`, and yield each with its loss."""
    for step, features, target in batches(options, device, done):
        optimizer.zero_grad()
        loss = model(features, target)
        loss.backward()
        optimizer.step()
        yield step, loss.item()


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, options: argparse.Namespace, step: int
) -> None:
    """Write a checkpoint, each process its part, and remove the one before."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    kept = {name: getattr(options, name) for name in OF_CHECKPOINT}
    whole = folder / f"step-{step:08d}"
    partial = whole.with_name(whole.name + ".partial")
    state = {"model": of_model, "optimizer": of_optimizer, "options": kept, "step": step}
    save_state(state, checkpoint_id=partial)  # in the first process it returns when all have written
    if dist.get_rank() == 0:
        partial.rename(whole)  # at once: a folder of this name is whole
        remove_all_but(whole, folder)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, options: argparse.Namespace) -> int:
    """Load the last whole checkpoint, if there is one, and return its step, else 0.

    Raises:
        SystemExit: It does not go with the options; the message says which.
    """
    last: list[Any] = [None]
    if dist.get_rank() == 0:
        whole = [path for path in folder.glob("step-*") if path.suffix != ".partial"]
        last[0] = max(whole, default=None)
        remove_all_but(last[0], folder)  # what was half written when a process died
    dist.broadcast_object_list(last)
    path = last[0]
    if path is None:
        return 0
    about: dict[str, Any] = {"options": dict.fromkeys(OF_CHECKPOINT, 0), "step": 0}
    load_state(about, checkpoint_id=path)
    saved, step = about["options"], int(about["step"])
    wanted = {name: getattr(options, name) for name in OF_CHECKPOINT}
    differences = [
        f"--{name} {saved[name]}, not {wanted[name]}" for name in OF_CHECKPOINT if saved[name] != wanted[name]
    ]
    if differences:
        raise SystemExit(f"{path} was written with {'; '.join(differences)}")
    if step > options.steps:
        raise SystemExit(f"{path} is beyond --steps {options.steps}")
    # Of the shapes of this number of processes; the loaded values take their place.
    of_model, of_optimizer = get_state_dict(model, optimizer)
    load_state({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
    return step


def remove_all_but(kept: Path | None, folder: Path) -> None:
    """Remove the other checkpoints, whole or not."""
    for path in folder.glob("step-*"):
        if path != kept:
            shutil.rmtree(path)


def train_divided(options: argparse.Namespace, device: torch.device) -> tuple[list[tuple[int, float]], Tensor]:
    """Train in all processes; the steps that were made here with their losses, and the head's whole weight."""
    first, processes = dist.get_rank() == 0, dist.get_world_size()
    model, optimizer = make_model(options, device)
    assert isinstance(model.head.weight, DTensor)
    done = load(options.checkpoint, model, optimizer, options) if options.checkpoint else 0
    if first:
        own = model.head.weight.to_local().shape[0]
        print(f"{options.labels} labels on {processes} processes ({device.type}), {own} on the first", flush=True)
        if done:
            print(f"goes on after step {done} of {options.checkpoint}", flush=True)

    losses = []
    for step, loss in train(model, optimizer, options, device, done):
        losses.append((step, loss))
        if first:
            print(f"step {step:3d}  loss {loss:.9g}", flush=True)  # the digits that tell any two float32 apart
        if options.checkpoint and (step % options.every == 0 or step == options.steps):
            save(options.checkpoint, model, optimizer, options, step)
    return losses, model.head.weight.full_tensor().detach()  # all processes take part


def compare(options: argparse.Namespace, device: torch.device, losses: list[tuple[int, float]], weight: Tensor) -> bool:
    """Train in this process alone; True if that made no difference."""
    model, optimizer = make_model(options, device)
    expected = dict(train(model, optimizer, options, device))
    by_loss = max((abs(loss / expected[step] - 1) for step, loss in losses), default=0.0)
    by_weight = ((weight - model.head.weight).abs().max() / model.head.weight.abs().max()).item()
    same = max(by_loss, by_weight) <= TOLERANCE
    print(
        f"the same training in one process: {'the same' if same else 'NOT THE SAME'} result, largest relative "
        f"difference of a loss {by_loss:.1e}, of a weight {by_weight:.1e}"
    )
    return same


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], prog="train_class_parallel.py")
    for name, default, what in (
        ("labels", 5000, "outputs of the head"),
        ("features", 128, "inputs of the backbone"),
        ("hidden", 64, "inputs of the head"),
        ("batch", 256, "samples of a step"),
        ("steps", 20, "steps"),
        ("every", 5, "steps from one checkpoint to the next"),
        ("timeout", 60, "seconds that a process waits for another"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what}; default: {default}")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="where checkpoints are, and come to be")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments, by default `sys.argv`'s; the exit status is 1 if one process gave another result."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, int) and value < 1:
            parser.error(f"argument --{name}: must be a whole number of at least 1, got '{value}'")
    if "LOCAL_RANK" not in os.environ:
        parser.error(
            "it runs in several processes, which torchrun starts: "
            "torchrun --nproc-per-node 2 examples/train_class_parallel.py"
        )
    is_restarted = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if is_restarted and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        parser.error(
            "with --max-restarts torchrun needs the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: "
            "processes would look for those of before the restart"
        )
    if options.labels < MOST_POSITIVES:
        parser.error(f"--labels {options.labels} is less than the {MOST_POSITIVES} labels of a sample")
    if options.checkpoint:
        try:
            options.checkpoint.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"argument --checkpoint: {options.checkpoint}: {error.strerror}")

    timeout = timedelta(seconds=options.timeout)
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=timeout)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=timeout)
    first = dist.get_rank() == 0
    losses, weight = train_divided(options, device)
    # No process leaves while another still works: Gloo's threads outlive a collective by a moment, which can end a
    # process that is taken down at once (see pytorch#179291).
    dist.barrier()
    dist.destroy_process_group()  # before the first trains alone, longer than the others would wait
    return 0 if not first or compare(options, device, losses, weight) else 1


if __name__ == "__main__":
    sys.exit(main())
