"""What test_distributed.py runs in several processes: python distributed_worker.py PROCESSES RESULTS

Every process makes every check of its world size, then the first writes what went wrong, "" for nothing, into RESULTS.
The processes are forks of one that has imported everything, which takes longer than most checks.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from memory import peak_bytes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fused_sce
from fused_sce import functional as F

Loss = Callable[..., Tensor]
Placements = Sequence[Placement]

LOSSES: dict[str, Loss] = {
    **{
        f"bce {reduction}": lambda x, t, r=reduction, **kw: F.sigmoid_cross_entropy(x, t, reduction=r, **kw)
        for reduction in ("mean", "sum", "none", "sum_classes")
    },
    **{
        f"soft margin {reduction}": lambda x, t, r=reduction, **kw: F.multilabel_soft_margin_loss(
            x, t, reduction=r, **kw
        )
        for reduction in ("mean", "sum", "none")
    },
}

CHECKS: dict[int, dict[str, Callable[[], None]]] = {2: {}, 4: {}}


def check(world_size: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(function: Callable[[], None]) -> Callable[[], None]:
        CHECKS[world_size][function.__name__] = function
        return function

    return add


# One of each: torch 2.15 cannot compile for a mesh after any op has run on another one that is equal to it.
@functools.cache
def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@functools.cache
def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "class"))


def put(tensor: Tensor, mesh: DeviceMesh, placements: Placements) -> DTensor:
    """A tensor that every process has, distributed without sending anything."""
    return distribute_tensor(tensor.clone(), mesh, placements, src_data_rank=None)


def sample(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = 5 * torch.randn(shape, dtype=torch.float64, generator=generator)
    t = torch.rand(shape, dtype=torch.float64, generator=generator)
    return x.to(dtype), t


def weightings(x: Tensor) -> dict[str, dict[str, Tensor]]:
    """Weights of every shape there is for logits (N, C)."""
    n, c = x.shape
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=x.dtype, generator=generator) + 0.5

    return {
        "none": {},
        "per class": {"weight": weight(c), "pos_weight": weight(c)},
        "per sample": {"weight": weight(n, 1), "pos_weight": weight(n, 1)},
        "per class, two dimensions": {"weight": weight(1, c)},
        "per element": {"weight": weight(n, c), "pos_weight": weight(c)},
        "one": {"weight": weight(), "pos_weight": weight(1, 1)},
    }


def assert_same(ours: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=rtol * expected.detach().abs().max().item())


def assert_sharded_loss_is_the_whole_one(
    loss: Loss,
    x: Tensor,
    t: Tensor,
    mesh: DeviceMesh,
    placements: Placements,
    *,
    target_placements: Placements | None = None,
    gradient_placements: Placements | None = None,
    rtol: float = 1e-12,
    **weights: Tensor,
) -> None:
    """Loss and gradient, for an upstream gradient that is not 1, against those of plain tensors."""
    whole = x.clone().requires_grad_()
    expected = loss(whole, t, **weights)
    (expected * 3).sum().backward()
    assert whole.grad is not None

    logits = put(x, mesh, placements).requires_grad_()
    target = put(t, mesh, target_placements or placements)
    replicated = [Replicate()] * mesh.ndim
    factors = {name: put(weight, mesh, replicated) for name, weight in weights.items()}
    value = loss(logits, target, **factors)
    assert isinstance(value, DTensor)
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    kept = value.ndim  # dimensions that are not summed over
    made = gradient_placements or placements
    assert value.placements == tuple(
        placement if not isinstance(placement, Shard) or placement.dim < kept else Partial() for placement in made
    )
    assert_same(value.full_tensor(), expected, rtol)
    with torch.no_grad():
        assert_same(loss(logits, target, **factors).full_tensor(), expected.detach(), rtol)

    (value * 3).sum().backward()
    gradient = logits.grad
    assert isinstance(gradient, DTensor)
    # Where the gradient is, the logits were: they have not been moved.
    assert gradient.placements == tuple(made)
    assert_same(gradient.full_tensor(), whole.grad, rtol)


def check_all_losses(mesh: DeviceMesh, placements: Placements, shape: tuple[int, int]) -> None:
    x, t = sample(*shape)
    for name, loss in LOSSES.items():
        for options in weightings(x).values():
            if name.startswith("soft margin"):
                options.pop("pos_weight", None)
            assert_sharded_loss_is_the_whole_one(loss, x, t, mesh, placements, **options)


@check(2)
def shard_by_batch() -> None:
    check_all_losses(line(), [Shard(0)], (4, 6))


@check(2)
def shard_by_class() -> None:
    check_all_losses(line(), [Shard(1)], (4, 6))


@check(2)
def uneven_shards_by_batch() -> None:
    check_all_losses(line(), [Shard(0)], (5, 7))


@check(2)
def uneven_shards_by_class() -> None:
    check_all_losses(line(), [Shard(1)], (5, 7))


@check(2)
def replicated() -> None:
    check_all_losses(line(), [Replicate()], (5, 7))


@check(2)
def other_numbers_of_dimensions() -> None:
    mesh = line()
    for shape in ((7,), (3, 5, 7)):
        x, t = sample(*shape)
        for dim in range(len(shape)):
            for name, loss in LOSSES.items():
                if name != "bce sum_classes" or len(shape) > 1:
                    assert_sharded_loss_is_the_whole_one(loss, x, t, mesh, [Shard(dim)])
            weight = torch.arange(1.0, 8.0, dtype=torch.float64)
            for name in ("bce mean", "soft margin none"):
                assert_sharded_loss_is_the_whole_one(LOSSES[name], x, t, mesh, [Shard(dim)], weight=weight)


@check(2)
def fewer_rows_than_processes() -> None:
    # A shard empty from the start is one that DTensor does not plan with: the one row is gathered, and right.
    x, t = sample(1, 7)
    for name in ("bce mean", "bce none", "soft margin none"):
        assert_sharded_loss_is_the_whole_one(LOSSES[name], x, t, line(), [Shard(0)], gradient_placements=[Replicate()])


@check(2)
def targets_of_every_dtype() -> None:
    mesh = line()
    x, t = sample(5, 7)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        hard = (t > 0.5).to(dtype)
        for name in ("bce mean", "bce none", "soft margin none"):
            for dim in (0, 1):
                assert_sharded_loss_is_the_whole_one(LOSSES[name], x, hard, mesh, [Shard(dim)], rtol=1e-6)


@check(2)
def logits_of_every_dtype() -> None:
    mesh = line()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, t = sample(5, 7, dtype=dtype)
        # Each rank's share of the sum is rounded to the loss's dtype.
        rtol = 4 * torch.finfo(dtype).eps
        for name in ("bce mean", "bce none", "soft margin none"):
            for dim in (0, 1):
                assert_sharded_loss_is_the_whole_one(LOSSES[name], x, t > 0.5, mesh, [Shard(dim)], rtol=rtol)


@check(2)
def autocast() -> None:
    x, t = sample(5, 7, dtype=torch.bfloat16)

    def loss(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.binary_cross_entropy_with_logits(x, t)

    assert loss(x, t > 0.5).dtype == torch.float32
    for dim in (0, 1):
        assert_sharded_loss_is_the_whole_one(loss, x, t > 0.5, line(), [Shard(dim)], rtol=1e-2)


@check(2)
def targets_go_to_the_logits() -> None:
    mesh = line()
    x, t = sample(5, 7, dtype=torch.float32)
    everywhere: list[Placement] = [Replicate(), Shard(0), Shard(1)]
    # Twice and an eighth of the logits' size.
    for target in (t, (t > 0.5)):
        for ours in everywhere:
            for others in everywhere:
                assert_sharded_loss_is_the_whole_one(
                    F.sigmoid_cross_entropy, x, target, mesh, [ours], target_placements=[others], rtol=1e-6
                )


@check(2)
def weights_placed_in_every_way() -> None:
    mesh = line()
    x, t = sample(5, 7)
    weight = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = F.sigmoid_cross_entropy(x, t, weight=weight, pos_weight=weight)
    for dim in (0, 1):
        for placement in (Replicate(), Shard(0)):
            logits, target = put(x, mesh, [Shard(dim)]), put(t, mesh, [Shard(dim)])
            factor = put(weight, mesh, [placement])
            loss = F.sigmoid_cross_entropy(logits, target, weight=factor, pos_weight=factor)
            assert loss.placements == (Partial(),)
            assert_same(loss.full_tensor(), expected)
    # DTensor remembers how it went about a call: not what either of two weights of one shape is.
    for name in ("weight", "pos_weight", "weight"):
        for loss in (LOSSES["bce mean"], LOSSES["bce none"]):
            assert_sharded_loss_is_the_whole_one(loss, x, t, mesh, [Shard(1)], **{name: weight})
    # A plain scalar is the same everywhere.
    loss = F.sigmoid_cross_entropy(logits, target, weight=torch.tensor(3.0))
    assert_same(loss.full_tensor(), F.sigmoid_cross_entropy(x, t, weight=torch.tensor(3.0)))


@check(2)
def only_what_counts() -> None:
    mesh = line()
    x, t = sample(5, 7)
    t[torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.4] = -1
    masks = {"per element": t < 0.7, "per class": torch.arange(7) != 2, "per sample": torch.arange(5).view(5, 1) != 0}
    for mask in (None, *masks.values()):
        for reduction in ("mean", "sum", "none", "sum_classes"):
            whole = x.clone().requires_grad_()
            expected = F.sigmoid_cross_entropy(whole, t, mask=mask, ignore_value=-1, reduction=reduction)
            (expected_gradient,) = torch.autograd.grad(expected.sum(), whole)
            for placement in (Shard(0), Shard(1), Replicate()):
                logits, target = put(x, mesh, [placement]).requires_grad_(), put(t, mesh, [placement])
                beside = None if mask is None else put(mask, mesh, [Replicate()])
                loss = F.sigmoid_cross_entropy(logits, target, mask=beside, ignore_value=-1, reduction=reduction)
                (gradient,) = torch.autograd.grad(loss.sum(), logits)
                assert_same(loss.full_tensor(), expected)
                assert_same(gradient.full_tensor(), expected_gradient)


@check(2)
def focal_and_asymmetric_losses() -> None:
    mesh = line()
    x, t = sample(5, 7)
    alpha, prior = torch.rand(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for reduction in ("mean", "sum", "none", "sum_classes"):
        for ignore_value in (None, float(t[0, 0])):
            options: dict[str, Any] = {"reduction": reduction, "ignore_value": ignore_value, "label_smoothing": 0.1}
            whole = x.clone().requires_grad_()
            focal = F.sigmoid_focal_loss(whole, t, alpha, 1.5, smoothing_prior=prior, **options)
            asymmetric = F.asymmetric_loss(whole, t, **options)
            expected = [torch.autograd.grad(each.sum(), whole)[0] for each in (focal, asymmetric)]
            for placement in (Shard(0), Shard(1), Replicate()):
                logits, target = put(x, mesh, [placement]).requires_grad_(), put(t, mesh, [placement])
                of_labels = [put(each, mesh, [Replicate()]) for each in (alpha, prior)]
                losses = (
                    F.sigmoid_focal_loss(logits, target, of_labels[0], 1.5, smoothing_prior=of_labels[1], **options),
                    F.asymmetric_loss(logits, target, **options),
                )
                for loss, right, gradient in zip(losses, (focal, asymmetric), expected, strict=True):
                    assert_same(loss.full_tensor(), right)
                    assert_same(torch.autograd.grad(loss.sum(), logits)[0].full_tensor(), gradient)
    index = torch.zeros(5, dtype=torch.long)
    for target in (index, put(index, mesh, [Shard(0)])):
        with pytest.raises(RuntimeError, match="other formats do not work with DTensors"):
            F.sigmoid_cross_entropy(put(x, mesh, [Shard(0)]), target, target_format="class_index")


@check(2)
def partial_logits_are_reduced_first() -> None:
    mesh = line()
    x, t = sample(4, 6)
    share = x * (0.25 if dist.get_rank() == 0 else 0.75)
    for name in ("bce mean", "bce none", "soft margin none"):
        whole = x.clone().requires_grad_()
        expected = LOSSES[name](whole, t)
        (expected * 3).sum().backward()
        logits = DTensor.from_local(share, mesh, [Partial()]).requires_grad_()
        value = LOSSES[name](logits, put(t, mesh, [Replicate()]))
        (value * 3).sum().backward()
        assert_same(value.full_tensor(), expected)
        assert_same(logits.grad.full_tensor(), whole.grad)


@check(2)
def gradients_of_targets_and_of_second_order() -> None:
    mesh = line()
    x, t = sample(5, 7)
    pos_weight = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1

    def gradients(loss: Loss, x: Tensor, t: Tensor, **weights: Tensor) -> list[Tensor]:
        x.requires_grad_()
        t.requires_grad_()
        value = loss(x, t, **weights)
        by_input, by_target = torch.autograd.grad((value * value).sum(), (x, t), create_graph=True)
        (second,) = torch.autograd.grad((by_input * by_input).sum(), x)
        return [by_input, by_target, second]

    for dim in (0, 1):
        for name, loss in LOSSES.items():
            weights = {} if name.startswith("soft margin") else {"pos_weight": pos_weight}
            expected = gradients(loss, x.clone(), t.clone(), **weights)
            ours = gradients(
                loss,
                put(x, mesh, [Shard(dim)]),
                put(t, mesh, [Shard(dim)]),
                **{name: put(weight, mesh, [Replicate()]) for name, weight in weights.items()},
            )
            for one, other in zip(ours, expected, strict=True):
                assert_same(one.full_tensor(), other)


@check(2)
def a_retained_graph_gives_the_same_gradient_again() -> None:
    mesh = line()
    x, t = sample(5, 7)
    logits = put(x, mesh, [Shard(1)]).requires_grad_()
    loss = F.binary_cross_entropy_with_logits(logits, put(t, mesh, [Shard(1)]))
    tripled, plain, again = (
        torch.autograd.grad(loss * factor, logits, retain_graph=True)[0].full_tensor() for factor in (3, 1, 3)
    )
    assert_same(tripled, 3 * plain)
    assert_same(again, tripled)


def assert_gradients_of_weights(mesh: DeviceMesh, placements: Placements) -> None:
    x, t = sample(5, 7)

    def gradients(loss: Loss, x: Tensor, t: Tensor, **weights: Tensor) -> list[Tensor]:
        leaves = [each.requires_grad_() for each in (x, t, *weights.values())]
        value = loss(x, t, **weights)
        return [value, *torch.autograd.grad((value * 3).sum(), leaves)]

    for name, loss in LOSSES.items():
        for weights in weightings(x).values():
            if name.startswith("soft margin"):
                weights.pop("pos_weight", None)
            expected = gradients(loss, x.clone(), t.clone(), **{key: each.clone() for key, each in weights.items()})
            replicated = [Replicate()] * mesh.ndim
            ours = gradients(
                loss,
                put(x, mesh, placements),
                put(t, mesh, placements),
                **{key: put(each, mesh, replicated) for key, each in weights.items()},
            )
            for one, other in zip(ours, expected, strict=True):
                assert_same(one.full_tensor(), other)
            assert ours[1].placements == tuple(placements)


@check(2)
def gradients_of_weights() -> None:
    for placement in (Shard(0), Shard(1), Replicate()):
        assert_gradients_of_weights(line(), [placement])


@check(2)
def gradients_of_weights_need_no_communication_where_all_is_sharded_by_class() -> None:
    mesh = line()
    x, t = sample(4, 6)
    logits, target = put(x, mesh, [Shard(1)]).requires_grad_(), put(t, mesh, [Shard(1)])
    weight, pos_weight = (put(torch.ones(6, dtype=x.dtype), mesh, [Shard(0)]).requires_grad_() for _ in range(2))
    with CommDebugMode() as communication:
        loss = F.sigmoid_cross_entropy(logits, target, weight=weight, pos_weight=pos_weight)
        gradients = torch.autograd.grad(loss, (logits, weight, pos_weight))
    assert communication.get_total_counts() == 0, communication.get_comm_counts()
    assert [each.placements for each in gradients] == [(Shard(1),), (Shard(0),), (Shard(0),)]


@check(2)
def transforms() -> None:
    mesh = line()
    x, t = sample(5, 7)
    for name, loss in LOSSES.items():
        weights = weightings(x)["per class"]
        if name.startswith("soft margin"):
            weights.pop("pos_weight")
        whole = x.clone().requires_grad_()
        expected = loss(whole, t, **weights).sum()
        (3 * expected).backward()
        for placement in (Shard(0), Shard(1), Replicate()):
            logits, target = put(x, mesh, [placement]), put(t, mesh, [placement])
            factors = {key: put(each, mesh, [Replicate()]) for key, each in weights.items()}

            def tripled(logits: Tensor, loss=loss, target=target, factors=factors) -> Tensor:  # type: ignore[no-untyped-def]
                total: Tensor = 3 * loss(logits, target, **factors).sum()
                return total

            gradient, value = torch.func.grad_and_value(tripled)(logits)
            assert_same(value.full_tensor(), 3 * expected)
            assert gradient.placements == (placement,)
            assert_same(gradient.full_tensor(), whole.grad)
    with pytest.raises(RuntimeError, match=r"input is a DTensor placed .*, but target is a plain tensor"):
        torch.func.grad(lambda logits: F.sigmoid_cross_entropy(logits, t))(put(x, mesh, [Shard(1)]))
    with pytest.raises(RuntimeError, match=r"target is a DTensor placed .*, but input is a plain tensor"):
        torch.func.grad(lambda logits: F.sigmoid_cross_entropy(logits, target))(x)
    # Traced with DTensor imported, whatever that makes the checks look at.
    gradient_of = torch.func.grad(F.sigmoid_cross_entropy)
    torch.testing.assert_close(torch.compile(gradient_of, backend="aot_eager", fullgraph=True)(x, t), gradient_of(x, t))


@check(2)
def ops_called_directly() -> None:
    mesh = line()
    x, t = sample(5, 7)
    ops = torch.ops.fused_sce
    logits, target = put(x, mesh, [Shard(1)]), put(t, mesh, [Shard(1)])
    for reduction in ("none", "rows", "sum"):
        for divisor in (1,) if reduction == "none" else (1, 3):  # another option: another decision to remember
            options = {"reduction": reduction, "divisor": divisor}
            ours = ops.sigmoid_cross_entropy(logits, target, dtype=torch.float64, **options)
            assert_same(ours.full_tensor(), ops.sigmoid_cross_entropy(x, t, **options))
    count = torch.tensor([4])
    ours = ops.sigmoid_cross_entropy(logits, target, None, None, put(count, mesh, [Replicate()]), reduction="sum")
    assert_same(ours.full_tensor(), ops.sigmoid_cross_entropy(x, t, None, None, count, reduction="sum"))
    # The gradient of a row's sum has size 1 where the logits are sharded.
    upstream = torch.arange(1.0, 6.0, dtype=torch.float64).unsqueeze(-1)
    assert_same(
        ops._sigmoid_cross_entropy_backward(put(upstream, mesh, [Replicate()]), logits, target).full_tensor(),
        ops._sigmoid_cross_entropy_backward(upstream, x, t),
    )


@check(2)
def compiled() -> None:
    mesh = line()
    x, t = sample(5, 7)
    whole = x.clone().requires_grad_()
    expected = F.sigmoid_cross_entropy(whole, t)
    (expected * 3).backward()
    logits = put(x, mesh, [Shard(1)]).requires_grad_()
    loss = torch.compile(F.sigmoid_cross_entropy, backend="aot_eager", fullgraph=True)
    value = loss(logits, put(t, mesh, [Shard(1)]))
    (value * 3).backward()
    assert value.placements == (Partial(),)
    assert_same(value.full_tensor(), expected)
    assert_same(logits.grad.full_tensor(), whole.grad)


@check(2)
def bad_input_is_explained() -> None:
    mesh = line()
    x, t = sample(5, 7)
    logits, target = put(x, mesh, [Shard(1)]), put(t, mesh, [Shard(1)])
    weight = torch.ones(7)
    other = put(t, init_device_mesh("cpu", (1, 2)), [Replicate(), Shard(1)])
    for loss in (F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss, F.sigmoid_cross_entropy):
        with pytest.raises(RuntimeError, match=r"target is a plain tensor.*distribute_tensor\(target, input.device_me"):
            loss(logits, t)
        # This rank's part, which looks like a wrong shape.
        with pytest.raises(RuntimeError, match=r"target is a plain tensor.*DTensor.from_local\(target, input.device_m"):
            loss(logits, target.to_local())
        with pytest.raises(RuntimeError, match=r"target is a DTensor.*but input is a plain.*target.full_tensor\(\)"):
            loss(x, target)
        with pytest.raises(RuntimeError, match=r" weight is a plain tensor.*distribute_tensor\(weight, input.device_m"):
            loss(logits, target, weight=weight)
        with pytest.raises(RuntimeError, match=r"different meshes.*distribute_tensor\(target.full_tensor\(\)"):
            loss(logits, other)
        with pytest.raises(ValueError, match="must be the same as input size"):
            loss(logits, put(t[:, :6], mesh, [Shard(1)]))
    with pytest.raises(RuntimeError, match="pos_weight is a plain tensor"):
        F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
    with pytest.raises(RuntimeError, match=r"pos_weight is a DTensor.*but input is a plain tensor"):
        F.binary_cross_entropy_with_logits(x, t, pos_weight=put(weight, mesh, [Replicate()]))
    # The advice works.
    expected = F.binary_cross_entropy_with_logits(x, t, weight=weight)
    replicated = distribute_tensor(weight, logits.device_mesh)
    distributed = distribute_tensor(t, logits.device_mesh, logits.placements)
    assert_same(F.binary_cross_entropy_with_logits(logits, distributed, replicated).full_tensor(), expected)
    with implicit_replication():
        assert_same(F.binary_cross_entropy_with_logits(logits, t, weight).full_tensor(), expected)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7)).double()


def train(model: nn.Module, batch: slice = slice(None)) -> list[Tensor]:
    """Three steps; the loss, averaged over the processes, of each."""
    criterion = fused_sce.BCEWithLogitsLoss(pos_weight=torch.arange(1.0, 8.0, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for step in range(3):
        features, _ = sample(8, 6 + step)
        _, t = sample(8, 7 + step)
        optimizer.zero_grad()
        loss = criterion(model(features[batch, :6]), t[batch, :7] > 0.5)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def assert_trains_as_in_one_process(wrap: Callable[[nn.Module], nn.Module]) -> None:
    expected = small_model()
    expected_losses = train(expected)
    start = copy.deepcopy(list(small_model().parameters()))

    model = wrap(small_model())
    rank, size = dist.get_rank(), dist.get_world_size()
    part = 8 // size
    losses = torch.stack(train(model, slice(rank * part, rank * part + part)))
    dist.all_reduce(losses)
    assert_same(losses / size, torch.stack(expected_losses))
    for ours, whole, before in zip(model.parameters(), expected.parameters(), start, strict=True):
        assert not torch.allclose(whole, before, rtol=1e-3, atol=0)
        assert_same(ours.full_tensor() if isinstance(ours, DTensor) else ours, whole)


@check(2)
def data_parallel_training() -> None:
    assert_trains_as_in_one_process(DistributedDataParallel)


@check(2)
def fully_sharded_training() -> None:
    mesh = line()

    def wrap(model: nn.Module) -> nn.Module:
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    assert_trains_as_in_one_process(wrap)


@check(2)
def a_class_parallel_head_never_gathers_its_logits() -> None:
    mesh = line()
    features, _ = sample(5, 6)
    _, t = sample(5, 7)
    pos_weight = torch.arange(1.0, 8.0, dtype=torch.float64)
    torch.manual_seed(0)
    whole = nn.Linear(6, 7).double()
    head = copy.deepcopy(whole)
    parallelize_module(head, mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
    logits = head(features)
    assert isinstance(logits, DTensor)
    assert logits.placements == (Shard(1),)

    for criterion in (
        fused_sce.BCEWithLogitsLoss(pos_weight=put(pos_weight, mesh, [Replicate()])),
        fused_sce.BCEWithLogitsLoss(reduction="sum"),
        fused_sce.BCEWithLogitsLoss(reduction="none"),
        fused_sce.MultiLabelSoftMarginLoss(weight=put(pos_weight, mesh, [Shard(0)])),
        fused_sce.MultiLabelSoftMarginLoss(reduction="none"),
        fused_sce.SigmoidCrossEntropyLoss(reduction="sum_classes"),
    ):
        for placement in (Replicate(), Shard(1)):
            target = put(t > 0.5, mesh, [placement])
            with CommDebugMode() as communication:
                loss = criterion(logits, target)
                (gradient,) = torch.autograd.grad(loss.sum() * 3, logits, retain_graph=True)
            assert communication.get_total_counts() == 0, communication.get_comm_counts()
            assert gradient.placements == (Shard(1),)
            assert gradient.to_local().shape == logits.to_local().shape != logits.shape
    # What is counted above is counted: reading the loss is one all-reduce, gathering the logits would be a gather.
    scalar = fused_sce.BCEWithLogitsLoss()(logits, target)
    for tensor, op in ((scalar, "all_reduce"), (logits, "all_gather_into_tensor")):
        with CommDebugMode() as communication:
            tensor.full_tensor()
        assert dict(communication.get_comm_counts()) == {getattr(torch.ops.c10d_functional, op): 1}

    fused_sce.BCEWithLogitsLoss()(head(features), target).backward()
    fused_sce.BCEWithLogitsLoss()(whole(features), t > 0.5).backward()
    for ours, expected in zip(head.parameters(), whole.parameters(), strict=True):
        assert_same(ours.grad.full_tensor(), expected.grad)


@check(4)
def shard_by_batch_and_class() -> None:
    check_all_losses(square(), [Shard(0), Shard(1)], (5, 7))


@check(4)
def gradients_of_weights_by_batch_and_class() -> None:
    assert_gradients_of_weights(square(), [Shard(0), Shard(1)])


@check(4)
def two_dimensional_meshes_in_every_way() -> None:
    mesh = square()
    x, t = sample(6, 7)
    for placements in (
        [Shard(1), Shard(0)],
        [Shard(0), Shard(0)],
        [Shard(1), Shard(1)],
        [Replicate(), Shard(1)],
        [Shard(0), Replicate()],
    ):
        for name in ("bce mean", "bce none", "soft margin none"):
            assert_sharded_loss_is_the_whole_one(
                LOSSES[name], x, t, mesh, placements, **weightings(x)["per sample"] if name.startswith("bce") else {}
            )


@check(4)
def targets_go_to_logits_sharded_twice() -> None:
    mesh = square()
    x, t = sample(6, 7, dtype=torch.float32)
    for placements in ([Shard(0), Shard(1)], [Shard(1), Shard(0)], [Replicate(), Shard(1)]):
        for others in ([Replicate(), Replicate()], [Shard(0), Shard(0)], [Shard(0), Replicate()]):
            for target in (t.float(), t > 0.5):
                assert_sharded_loss_is_the_whole_one(
                    F.sigmoid_cross_entropy, x, target, mesh, placements, target_placements=others, rtol=1e-6
                )


@check(4)
def a_process_without_rows() -> None:
    # Five rows in four parts: 2, 2, 1 and none.
    mesh = line()
    x, _ = sample(5, 7)
    assert put(x, mesh, [Shard(0)]).to_local().numel() == 7 * (2, 2, 1, 0)[dist.get_rank()]
    check_all_losses(mesh, [Shard(0)], (5, 7))


# The linear layer and its loss in one


def linear_problem(format_: str) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """Features (6, 5), weight (43, 5) and bias, a target and its options."""
    generator = torch.Generator().manual_seed(0)
    layer = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((6, 5), (43, 5), (43,))]
    order = torch.stack([torch.randperm(43, generator=generator) for _ in range(6)])
    dense = order < 4
    weights = (dense.double() / 2 + 0.25) * dense
    index = torch.where(torch.arange(4) < torch.arange(1, 7).unsqueeze(1), order[:, :4], -1)
    bits = torch.nn.functional.pad(dense, (0, 5)).unflatten(1, (6, 8)) * torch.tensor([1, 2, 4, 8, 16, 32, 64, 128])
    targets = {
        "dense": (dense, {}),
        "soft": (weights, {"ignore_value": 0.75}),
        "class_index": (order[:, 0].where(torch.arange(6) != 2, -100), {"ignore_value": -100}),
        "index_list": (index, {}),
        "packed": (bits.sum(-1).to(torch.uint8), {}),
        "csr": (weights.to_sparse_csr(), {}),
    }
    target, options = targets[format_]
    if format_ in ("class_index", "index_list", "packed"):
        options["target_format"] = format_
    return layer, target, options


def factors_of_linear_problem() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def factor(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator) + 0.5

    return [
        {},
        {"loss_weight": factor(6, 1), "pos_weight": factor(43), "mask": factor(6, 43) > 0.8},
        {"loss_weight": factor(6, 43), "alpha": factor(43) / 2, "smoothing_prior": factor(43) / 2},
    ]


def assert_linear_loss_is_the_whole_one(
    mesh: DeviceMesh, of_input: Placements | None, of_weight: Placements, formats: Sequence[str]
) -> None:
    """Loss and gradients of a layer with these placements, plain input and target for None."""

    def put_batch(tensor: Tensor | None) -> Any:
        if of_input is None or tensor is None or tensor.layout is not torch.strided:
            return tensor
        by_batch = [own if tensor.dim() > 1 or tensor.shape[0] == 6 else Replicate() for own in of_input]
        return put(tensor, mesh, by_batch)

    for format_ in formats:
        layer, target, options = linear_problem(format_)
        for factors in factors_of_linear_problem():
            for reduction in ("mean", "sum", "sum_classes"):
                kwargs = {**options, "reduction": reduction, "chunk_bytes": 8 * 8 * 6}
                whole = [part.clone().requires_grad_() for part in layer]
                expected = F.linear_sigmoid_cross_entropy(*whole[:2], target, whole[2], **factors, **kwargs)
                (expected * 3).backward()
                input = put_batch(layer[0].clone()).requires_grad_()
                weight, bias = (put(part, mesh, of_weight).requires_grad_() for part in layer[1:])
                placed = {name: put_batch(factor) for name, factor in factors.items()}
                loss = F.linear_sigmoid_cross_entropy(input, weight, put_batch(target), bias, **placed, **kwargs)
                assert isinstance(loss, DTensor) == (of_input is not None)
                (loss * 3).backward()
                assert_same(loss.full_tensor() if isinstance(loss, DTensor) else loss, expected)
                for ours, one in zip((input, weight, bias), whole, strict=True):
                    gradient = ours.grad
                    assert_same(gradient.full_tensor() if isinstance(gradient, DTensor) else gradient, one.grad, 1e-9)


FORMATS = ["dense", "soft", "class_index", "index_list", "packed", "csr"]


@check(2)
def linear_loss_divided_by_labels() -> None:
    assert_linear_loss_is_the_whole_one(line(), None, [Shard(0)], FORMATS)
    assert_linear_loss_is_the_whole_one(line(), [Replicate()], [Shard(0)], ["dense", "index_list"])


@check(2)
def linear_loss_divided_by_batch() -> None:
    assert_linear_loss_is_the_whole_one(line(), [Shard(0)], [Replicate()], ["soft", "class_index", "packed"])
    assert_linear_loss_is_the_whole_one(line(), [Shard(0)], [Shard(0)], ["soft", "class_index"])


@check(4)
def linear_loss_divided_by_labels_and_batch() -> None:
    assert_linear_loss_is_the_whole_one(square(), [Shard(0), Replicate()], [Replicate(), Shard(0)], FORMATS[:-1])
    assert_linear_loss_is_the_whole_one(square(), None, [Shard(0), Shard(0)], ["index_list", "packed", "csr"])


def assert_best_labels_are_the_whole_ones(mesh: DeviceMesh, of_input: Placements | None, of_weight: Placements) -> None:
    layer, _, _ = linear_problem("dense")
    for labels, rows in ((43, 6), (43, 5), (3, 6)):
        input, (weight, bias) = layer[0][:rows], (part[:labels] for part in layer[1:])
        bias = bias.clone()
        bias[0] = -torch.inf
        for k in (1, 3, labels):
            expected = F.linear_topk(input, weight, k, bias)
            placed = input if of_input is None else put(input, mesh, of_input)
            of_all = F.linear_topk(placed, put(weight, mesh, of_weight), k, put(bias, mesh, of_weight), chunk_bytes=400)
            for ours, one in zip(of_all, expected, strict=True):
                assert isinstance(ours, DTensor) == (of_input is not None)
                torch.testing.assert_close(ours.full_tensor() if isinstance(ours, DTensor) else ours, one)


@check(2)
def best_labels_of_all_ranks() -> None:
    for of_input in (None, [Replicate()], [Shard(0)]):
        assert_best_labels_are_the_whole_ones(line(), of_input, [Shard(0)])


@check(4)
def best_labels_by_labels_and_batch() -> None:
    assert_best_labels_are_the_whole_ones(square(), [Shard(0), Replicate()], [Replicate(), Shard(0)])
    assert_best_labels_are_the_whole_ones(square(), None, [Shard(0), Shard(0)])


@check(2)
def linear_loss_sends_a_gradient_and_a_scalar() -> None:
    layer, target, options = linear_problem("index_list")
    input = layer[0].clone().requires_grad_()
    weight, bias = (put(part, line(), [Shard(0)]).requires_grad_() for part in layer[1:])
    with CommDebugMode() as communication:
        F.linear_sigmoid_cross_entropy(input, weight, target, bias, **options).backward()
    assert dict(communication.get_comm_counts()) == {torch.ops.c10d_functional.all_reduce: 2}


@check(2)
def linear_loss_explains_bad_input() -> None:
    layer, target, options = linear_problem("index_list")
    input, weight, bias = layer
    by_label, by_feature = put(weight, line(), [Shard(0)]), put(weight, line(), [Shard(1)])
    of_rows = put(input, line(), [Shard(0)])
    wrong = target.clone()
    wrong[5, 0] = 43
    rows = weight[:20] if dist.get_rank() == 0 else weight[20:]  # a DTensor of 43 rows has 22 and 21
    uneven = DTensor.from_local(rows, line(), [Shard(0)], shape=weight.shape, stride=weight.stride())
    calls: list[tuple[Exception | type[Exception], str, tuple[Tensor, ...]]] = [
        (RuntimeError, "weight must be sharded by label, Shard.0., or replicated", (input, by_feature, target)),
        (RuntimeError, "bias must be a DTensor with weight's placements", (input, by_label, target, bias)),
        (RuntimeError, "weight must be a DTensor, as input or bias is", (of_rows, weight, target)),
        (ValueError, r"target\[5, 0\] is 43, but an index must be in \[0, 42\]", (input, by_label, wrong)),
        (ValueError, r"needs a target of shape \(6, 4\)", (input, by_label, target[:3])),
        (ValueError, "the same number of features D", (input[:, :4], by_label, target)),
        (ValueError, "the shards of weight do not cover its 43 labels", (input, uneven, target)),
    ]
    for error, message, arguments in calls:
        with pytest.raises(error, match=message):  # type: ignore[call-overload]
            F.linear_sigmoid_cross_entropy(*arguments, **options)


# SigLIP's loss over ranks


def pairs(dtype: torch.dtype, count: int = 9) -> tuple[list[Tensor], list[Tensor]]:
    """The features of the pictures and the texts of all ranks."""
    generator = torch.Generator().manual_seed(0)

    def features() -> Tensor:
        return nn.functional.normalize(torch.randn(count, 5, dtype=torch.float64, generator=generator)).to(dtype)

    ranks = dist.get_world_size()
    return [features() for _ in range(ranks)], [features() for _ in range(ranks)]


def check_contrastive_loss(dtype: torch.dtype, tolerance: float) -> None:
    """Loss and gradients of this rank against open_clip's formula on the features of all, in float64."""
    rank, images, texts = dist.get_rank(), *pairs(dtype)
    own = [images[rank].clone(), texts[rank].clone(), torch.tensor(3.0, dtype=dtype), torch.tensor([-4.0], dtype=dtype)]
    for part in own:
        part.requires_grad_()
    loss = F.sigmoid_contrastive_loss(*own, group=dist.group.WORLD, chunk_bytes=9 * 8 * 8)

    of_all = [[part.double().requires_grad_() for part in features] for features in (images, texts)]
    numbers = [[torch.tensor(value, dtype=torch.float64, requires_grad=True) for _ in images] for value in (3.0, -4.0)]
    losses = []
    for number, (image, scale, bias) in enumerate(zip(of_all[0], *numbers, strict=True)):
        signs = -torch.ones(9, 9 * len(images), dtype=torch.float64)
        signs[:, 9 * number : 9 * number + 9] += 2 * torch.eye(9, dtype=torch.float64)
        logits = scale * image @ torch.cat(of_all[1]).T + bias
        losses.append(-nn.functional.logsigmoid(signs * logits).sum() / 9)
    (2 * sum(losses)).backward()

    assert_same(loss.double(), losses[rank], tolerance)
    expected = [part[rank].grad for part in (*of_all, *numbers)]
    for _ in range(2):  # the second time from the features, all ranks together
        for part in own:
            part.grad = None
        (2 * loss).backward(retain_graph=True)
        assert_same(own[0].grad.double(), expected[0], tolerance)
        assert_same(own[1].grad.double(), expected[1], tolerance)
        for part, number in zip(own[2:], expected[2:], strict=True):  # sums in which much cancels
            terms = own[0].grad.double().abs().sum().item()
            torch.testing.assert_close(part.grad.double().reshape(()), number, rtol=0, atol=tolerance * terms)
    with torch.no_grad():
        assert_same(F.sigmoid_contrastive_loss(*own, group=dist.group.WORLD).double(), losses[rank], tolerance)


@check(2)
def contrastive_loss_of_every_dtype() -> None:
    for dtype, tolerance in (
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 2e-2),
        (torch.float16, 3e-3),
    ):
        check_contrastive_loss(dtype, tolerance)


@check(4)
def contrastive_loss_of_four_ranks() -> None:
    check_contrastive_loss(torch.float64, 1e-12)


@check(2)
def contrastive_loss_needs_the_same_of_each_rank() -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    for features, message in (
        (torch.randn(3 + rank, 5), r"same number of texts.*got \[3, 4\] texts.*: drop the last batch"),
        (torch.randn(3, 5 + rank), r"got \[3, 3\] texts, \[5, 6\] features"),
        (torch.randn(3, 5, dtype=(torch.float32, torch.float64)[rank]), r"\[4, 8\] bytes for a number"),
        (torch.randn(3, 5, requires_grad=rank == 0), r"and gradients \[1, 0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            F.sigmoid_contrastive_loss(features, features, 1.0, group=group)


def check_memory_of_contrastive_loss() -> None:
    """One chunk of logits, and a number of features that does not depend on that of the ranks."""
    count, chunk = 512, 512 * 64 * 4
    (image, *_), (text, *_) = pairs(torch.float32, count)
    image, text = image.repeat(1, 4).requires_grad_(), text.repeat(1, 4).requires_grad_()

    def step() -> None:
        F.sigmoid_contrastive_loss(image, text, 3.0, -4.0, group=dist.group.WORLD, chunk_bytes=chunk).backward()

    step()
    image.grad = text.grad = None
    assert peak_bytes(step) <= chunk + 11 * image.nbytes


@check(2)
def memory_of_contrastive_loss() -> None:
    check_memory_of_contrastive_loss()


@check(4)
def memory_of_contrastive_loss_does_not_grow() -> None:
    check_memory_of_contrastive_loss()


def failures() -> dict[str, str]:
    """What each check of this world size raised in any process."""
    found = {}
    for name, function in CHECKS[dist.get_world_size()].items():
        error = ""
        try:
            function()
        except Exception:
            error = f"process {dist.get_rank()}: {traceback.format_exc()}"
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        found[name] = "\n".join(filter(None, errors))
    return found


def run_checks(rank: int, processes: int, results: Path) -> None:
    torch.set_num_threads(1)
    # A process that waits for one that failed does not wait long.
    meeting = f"file://{results}.store"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes, timeout=timedelta(seconds=30))
    found = failures()
    if rank == 0:
        results.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # DTensor's caches keep the groups of sub-meshes, whose Gloo threads end some processes in std::terminate while the
    # interpreter is taken down (three runs of 35 with torch 2.15; pytorch#179291). So it is not.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    count, path = int(sys.argv[1]), Path(sys.argv[2])
    torch.multiprocessing.start_processes(run_checks, (count, path), nprocs=count, start_method="fork")
