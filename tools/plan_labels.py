"""Plan a layer of very many labels: the memory, the traffic and the work of one rank, without running it.

    python tools/plan_labels.py --labels 1000000 --ranks 1 8 --rows 4096 --features 1024 --dtype bfloat16 --master

prints a table in Markdown, one line for each number of labels and ranks. `--measure GB` also trains what needs at most
so much memory, for two steps on the CPU, and writes the peak of its allocations beside the plan. Of several ranks it
runs the first; what goes to the others goes nowhere. All logits in memory it measures for one rank only.

`plan` assumes:

* Class-parallel: the labels are divided evenly among the ranks, and the figures are those of the rank with most of
  them. Each rank has the features and the target of all rows of the batch.
* The backbone, its gradients and its activations are not counted, nor what a library takes for itself: buffers of
  communication, workspaces of matrix products, fragments of an allocator.
* The layer has a bias. Weight, bias, their gradients, features and logits have one dtype; there is no autocast, no
  `logit_scale`, no factor and no mask. The target is an `index_list` of int64.
* The optimizer takes no memory for its step (Adam: `fused=True`; SGD: no momentum, `foreach=False`). Adam keeps two
  moments in float32. torch's own Adam keeps them in the dtype of the weight: half of that for 16-bit weights. A master
  weight is another float32 copy.
* Gradients are freed between the steps (`zero_grad`), and the features get a gradient.
* The gradient by 16-bit features is added up in float32. Each chunk's part of it is there in both types for a moment,
  which was measured on a CPU.
* Traffic: each operand of a kernel or a product passes through memory once, as if caches kept everything within one
  and nothing from one to the next.
* Work: the matrix products alone, two operations for each multiplication.
* float16 makes its gradients in backward, and so the logits a second time.
* A ring adds up the gradient by the features, in their dtype, and the loss, of 4 bytes at most: each rank sends
  2 (R - 1) / R of these. The sum of the gradient takes memory of its own. Features that the ranks have to gather
  first are not counted.

For comparison the same step with all logits in memory: with a loss that takes no more than their gradient
(`SigmoidCrossEntropyLoss` and its `index_list`), and with `torch.nn.BCEWithLogitsLoss`, whose target is dense, in
float32. At its peak this one holds 12 bytes for each logit beside the 4 of the target, for logits of any of these
dtypes (torch 2.14 on a CPU, measured).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from memory import peak_bytes
from torch import Tensor, nn

import fused_sce

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = {"sgd": 0, "adam": 2}
INDEX = 8  # bytes of a label's index
SUM = 4  # bytes of the loss that ranks exchange, at most
TORCH_LOSS = 12  # bytes for each logit at the peak of torch's loss, target not included
PREFIXES = ("", "k", "M", "G", "T", "P")
KINDS = ("by chunks", "dense", "torch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is planned.

    Raises:
        ValueError: An option is out of its range.
    """

    labels: int
    ranks: int = 1
    rows: int = 1024
    features: int = 256
    positives: int = 16
    """Labels of a row in the target: its list's length."""
    dtype: str = "float32"
    optimizer: str = "adam"
    master: bool = False
    """Whether the optimizer has a float32 copy of 16-bit weights."""
    chunk_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        for name in ("labels", "ranks", "rows", "features", "positives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("dtype", ITEM_SIZES), ("optimizer", MOMENTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.master and self.item == 4:
            raise ValueError(f"master must be False for {self.dtype}: the weights are their own master")
        least = self.rows * self.item
        if self.chunk_bytes < least:
            raise ValueError(
                f"chunk_bytes must hold the logits of one label, {least} bytes for {self.rows} rows of {self.dtype}, "
                f"got {self.chunk_bytes}"
            )

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return ITEM_SIZES[self.dtype]

    @property
    def own(self) -> int:
        """Labels of a rank."""
        return math.ceil(self.labels / self.ranks)

    @property
    def chunk(self) -> int:
        """Labels of a chunk."""
        labels = self.chunk_bytes // (self.rows * self.item)
        return min(labels - labels % 8 or labels, self.own)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one rank takes, in bytes but for `operations`."""

    weight: int
    gradient: int
    """By weight and bias."""
    state: int
    """Of the optimizer."""
    chunk: int
    """Of logits."""
    batch: int
    """Features, their gradient, target, and what is made of these on the way, while there is a chunk."""
    exchange: int
    """Features, their gradient, its sum over the ranks and target, after the chunks; 0 for one rank."""
    dense: int
    """Peak of a step with all logits and their gradient in memory."""
    torch: int
    """Peak of a step with torch's loss."""
    loss_traffic: int
    """By the loss kernel, in a step."""
    product_traffic: int
    """By the matrix products and the sum that makes the gradient by bias."""
    optimizer_traffic: int
    operations: int
    """Of floating point, in a step."""
    sent: int
    """To other ranks, in a step."""

    @property
    def layer(self) -> int:
        """Memory that grows with the labels: weight, gradient and state."""
        return self.weight + self.gradient + self.state

    @property
    def total(self) -> int:
        """Peak of a step by chunks."""
        return self.layer + max(self.chunk + self.batch, self.exchange)

    @property
    def traffic(self) -> int:
        """Bytes through memory in a step."""
        return self.loss_traffic + self.product_traffic + self.optimizer_traffic

    def peak(self, kind: str) -> int:
        """Peak of one of KINDS."""
        return {"by chunks": self.total, "dense": self.dense, "torch": self.torch}[kind]


def plan(setting: Setting) -> Plan:
    """The memory, traffic and work of one rank. What it assumes stands at the top of this file."""
    item, rows, own = setting.item, setting.rows, setting.own
    is_16_bit, is_float16 = item == 2, setting.dtype == "float16"
    parameters = own * (setting.features + 1)
    weight = parameters * item
    state = parameters * 4 * (MOMENTS[setting.optimizer] + setting.master)

    features, target = rows * setting.features, rows * setting.positives * INDEX
    logits = rows * own
    chunks = math.ceil(own / setting.chunk)
    # Beside the last chunk's list: bools as indices are checked; or the list before and a sum on the way to a new one.
    of_indices = target + (target * 2 + target // INDEX if chunks > 1 else target + 3 * target // INDEX)
    of_sum = target + (features * (2 + 4) if is_16_bit else 0)  # a chunk's list and its part of the gradient
    own_list = target if setting.ranks > 1 else 0  # which labels are this rank's
    batch = features * (item + 4) + target + own_list + max(of_indices, of_sum)

    exchanged = features * item if setting.ranks > 1 else 0  # the sum of the ranks' gradients, beside the rank's own
    exchange = 3 * exchanged + target if exchanged else 0

    held = weight + state + features * item
    gradients = weight + features * item
    dense = held + target + max(2 * logits * item, gradients + max(logits * item, exchanged))
    of_torch = held + logits * 4 + max(logits * TORCH_LOSS, gradients + max(logits * item, exchanged))

    # Each chunk of logits goes with the features and their gradient once more.
    of_weight = own * setting.features * item
    of_logits = of_weight + own * item + chunks * features * item + logits * item
    added_up = chunks * features * (2 * item + 8 if is_16_bit else 8)
    of_input = logits * item + of_weight + added_up
    by_weight = logits * item + chunks * features * item + of_weight
    by_bias = logits * item + own * item
    product_traffic = of_logits * (1 + is_float16) + of_input + by_weight + by_bias
    of_weights = 8 + item if setting.master else 2 * item  # the master read and written, or the weight; the weight
    optimizer_traffic = parameters * (item + of_weights + 8 * MOMENTS[setting.optimizer])
    return Plan(
        weight=weight,
        gradient=weight,
        state=state,
        chunk=rows * setting.chunk * item,
        batch=batch,
        exchange=exchange,
        dense=dense,
        torch=of_torch,
        loss_traffic=logits * item * (2 + is_float16),
        product_traffic=product_traffic,
        optimizer_traffic=optimizer_traffic,
        operations=2 * logits * setting.features * (3 + is_float16),
        sent=2 * (setting.ranks - 1) * (features * item + SUM) // setting.ranks,
    )


# Measurement


def train(setting: Setting, kind: str) -> None:
    """Make the layer of one rank and train it for two steps: the second one finds the optimizer's state."""
    dtype = getattr(torch, setting.dtype)
    features = torch.randn(setting.rows, setting.features, dtype=dtype, requires_grad=True)
    target = torch.arange(setting.rows * setting.positives).view(setting.rows, -1) % setting.own
    by_chunks = fused_sce.LinearSigmoidCrossEntropyLoss(target_format="index_list", chunk_bytes=setting.chunk_bytes)
    head = fused_sce.MultiLabelHead(setting.features, setting.own, init="zeros", fused_loss=by_chunks, dtype=dtype)
    loss: nn.Module = fused_sce.SigmoidCrossEntropyLoss(target_format="index_list")
    if kind == "torch":
        loss = nn.BCEWithLogitsLoss()
        target = torch.zeros(setting.rows, setting.own).scatter_(1, target, 1.0)
    with first_of(setting.ranks) as mesh:
        if mesh is not None:
            shard(head, mesh)
        optimizer: torch.optim.Optimizer
        if setting.optimizer == "sgd":
            optimizer = torch.optim.SGD(head.parameters(), foreach=False)  # DTensors have no fused SGD
        else:
            optimizer = torch.optim.Adam(head.parameters(), fused=True)
        for _ in range(2):
            optimizer.zero_grad()
            features.grad = None
            value: Tensor = head(features, target) if kind == "by chunks" else loss(head(features), target)
            value.backward()
            optimizer.step()


@contextlib.contextmanager
def first_of(ranks: int) -> Iterator[DeviceMesh | None]:
    """A mesh whose first rank is this process, and whose others are not there; None for one rank."""
    if ranks == 1:
        yield None
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        torch.distributed.destroy_process_group()


def shard(head: nn.Module, mesh: DeviceMesh) -> None:
    """Make the parameters of a head this rank's own labels among those of all ranks."""
    from torch.distributed.tensor import DTensor, Shard

    for name, own in list(head.named_parameters()):
        setattr(head, name, nn.Parameter(DTensor.from_local(own.detach(), mesh, [Shard(0)])))


def measure(setting: Setting, kind: str) -> int:
    """The most bytes that are allocated at once in `train`.

    Raises:
        ValueError: A master weight, or Adam for 16-bit weights: torch's moments are not float32; or several ranks
            that have all their logits in memory.
    """
    if setting.master or (setting.optimizer == "adam" and setting.item == 2):
        raise ValueError(
            "a measurement takes no master weight, and sgd for 16-bit weights, got "
            f"master={setting.master}, {setting.optimizer} and {setting.dtype}"
        )
    if setting.ranks > 1 and kind != "by chunks":
        raise ValueError(f"a measurement of several ranks takes the loss by chunks, got {kind}")
    return peak_bytes(lambda: train(setting, kind))


# The table


def amount(number: float, unit: str) -> str:
    """A number with three digits and a decimal prefix."""
    power = 0
    while number >= 999.5 and power < len(PREFIXES) - 1:
        number, power = number / 1000, power + 1
    digits = 0 if power == 0 or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {PREFIXES[power]}{unit}".strip()


def table(settings: list[Setting], measure_below: float = 0.0) -> str:
    """The plans in Markdown. What `measure_below` bytes allow is measured, and stands in bold beside the plan."""
    heads = ["Labels", "Ranks", "Layer", "Chunk", "Peak", "Dense: peak", "torch: peak", "Traffic", "Operations", "Sent"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---:"] * len(heads)) + " |"]
    for setting in settings:
        planned = plan(setting)
        peaks = []
        for kind in KINDS:
            peak = amount(planned.peak(kind), "B")
            if planned.peak(kind) <= measure_below and (setting.ranks == 1 or kind == "by chunks"):
                peak += f" **{amount(measure(setting, kind), 'B')}**"
            peaks.append(peak)
        cells = [f"{setting.labels:,}", f"{setting.ranks:,}", amount(planned.layer, "B"), amount(planned.chunk, "B")]
        cells += [*peaks, amount(planned.traffic, "B"), amount(planned.operations, ""), amount(planned.sent, "B")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--labels", type=int, nargs="+", default=[10**5, 10**6, 10**7, 10**8], help="of all ranks")
    add("--ranks", type=int, nargs="+", default=[1, 8, 64, 1024])
    add("--rows", type=int, default=Setting.rows, help="of the batch (%(default)s)")
    add("--features", type=int, default=Setting.features, help="of a row (%(default)s)")
    add("--positives", type=int, default=Setting.positives, help="labels of a row, at most (%(default)s)")
    add("--dtype", choices=ITEM_SIZES, default=Setting.dtype)
    add("--optimizer", choices=MOMENTS, default=Setting.optimizer)
    add("--master", action="store_true", help="a float32 copy of 16-bit weights in the optimizer")
    add("--chunk-bytes", type=int, default=Setting.chunk_bytes, help="of the logits of a chunk (%(default)s)")
    add("--measure", type=float, default=0.0, metavar="GB", help="train what needs at most this, on one rank, and see")
    options = vars(parser.parse_args())
    numbers, ranks, gigabytes = options.pop("labels"), options.pop("ranks"), options.pop("measure")
    try:
        settings = [Setting(labels=labels, ranks=rank, **options) for labels in numbers for rank in ranks]
        print(table(settings, gigabytes * 1e9), end="")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
