"""The loss of each rank's rows against the labels of all ranks, which go round the ring of the ranks.

A rank holds the labels of one rank at a time, and the next ones while they arrive: its memory does not grow with the
number of ranks. The gradient by the labels follows them, and is at home after one round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sce import _linear
from fused_sce._torch_private import assert_async


def by_ring(
    group: dist.ProcessGroup,
    upstream: Tensor | None,
    wanted: Sequence[bool],
    dtype: torch.dtype,
    chunk: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *of_loss: Any,
) -> tuple[Tensor, ...]:
    """What the op of `_linear` computes, for the weights of all ranks of a group; the positives are in a rank's own.

    Raises:
        ValueError: The ranks' weights have different shapes or dtypes, or they want different gradients.
    """
    ranks = dist.get_world_size(group)
    _check_ranks(weight, wanted, group)
    here, of_others = weight.detach().contiguous(), _without_positives(input, of_loss)
    by_here = torch.zeros_like(here, dtype=_wide(here.dtype)) if wanted[1] else None
    sums: list[Tensor] = []
    for step in range(ranks):
        # The next ones arrive while these are computed.
        arriving, requests = _pass_on(here, group) if step + 1 < ranks else (here, [])
        made = _linear.op(upstream, wanted, dtype, chunk, input, here, bias, *(of_others if step else of_loss))
        loss, by_input, by_weight, by_bias = made
        parts = [part.to(_wide(part.dtype)) for part in (loss, by_input, by_bias)]
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if step else parts
        if by_here is not None:
            by_here, more = _pass_on(by_here + by_weight, group)
            requests += more
        for request in requests:
            request.wait()
        here = arriving
    last = by_weight if by_here is None else by_here
    loss_of_all, by_input_of_all, by_bias_of_all = sums
    totals = loss_of_all, by_input_of_all, last, by_bias_of_all
    return tuple(total.to(one.dtype) for total, one in zip(totals, made, strict=True))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.promote_types(dtype, torch.float32)


def _pass_on(tensor: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Begin to send a tensor to the next rank and to receive that of the one before, which comes back first."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if ranks == 1:
        return tensor, []
    arriving = torch.empty_like(tensor)
    after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
    operations = [dist.P2POp(dist.isend, tensor, after, group), dist.P2POp(dist.irecv, arriving, before, group)]
    return arriving, dist.batch_isend_irecv(operations)


def _check_ranks(weight: Tensor, wanted: Sequence[bool], group: dist.ProcessGroup) -> None:
    """Check that the ranks send one another what the others expect."""
    facts = *weight.shape, weight.element_size(), int(wanted[1])
    own = torch.cat([weight.new_full((1,), fact, dtype=torch.int64) for fact in facts])  # a GPU is not waited for
    of_all = own.new_empty(dist.get_world_size(group), len(facts))
    dist.all_gather(list(of_all.unbind()), own, group)
    are_same = (of_all == own).all()
    if of_all.is_cuda:
        assert_async(are_same, "the ranks' texts must have one shape and dtype, and all or none a gradient")
    elif not bool(are_same):
        numbers, features, sizes, require = of_all.T.tolist()
        raise ValueError(
            "every rank must have the same number of texts and features, of one dtype, and all or none must require a "
            f"gradient, got {numbers} texts, {features} features, {sizes} bytes for a number, and gradients {require}: "
            "drop the last batch, which may be smaller (drop_last=True)"
        )


def _without_positives(input: Tensor, of_loss: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of the loss, none of whose rows has a positive."""
    (_, *others), options = _linear.split(of_loss)
    options["target_format"] = "index_list"
    return input.new_full((len(input), 1), -1, dtype=torch.int64), *others, *options.values()
