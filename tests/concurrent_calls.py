"""Calls the losses from many Python threads at once: on the same tensors, of every kind, the very first calls together.

    python tests/concurrent_calls.py

`make sanitize` runs it with the extension built for the thread sanitizer, tests/test_cpu.py as it is. Fails if a
thread's result differs in one bit from that of a single thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

import fused_sce
from fused_sce import _library

THREADS = 8
ROUNDS = 6


def calls() -> list[Callable[[], list[Tensor]]]:
    """One call of each kind, on tensors that all threads share; each returns its loss and gradient."""
    generator = torch.Generator().manual_seed(0)
    found: list[Callable[[], list[Tensor]]] = []

    def add(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> None:
        def forward_backward() -> list[Tensor]:
            leaf = logits.detach().requires_grad_()
            value = loss(leaf, target)
            value.sum().backward()  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            return [value.detach(), leaf.grad]

        found.append(forward_backward)

    # Odd sizes, more than one chunk of 4096 elements, and rows shorter and longer than a block of 512.
    for rows, columns in ((1, 1), (37, 5), (3, 700), (19, 1031)):
        logits = torch.randn(rows, columns, generator=generator) * 5
        hard = torch.rand(rows, columns, generator=generator) < 0.3
        factor = torch.rand(columns, generator=generator)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            add(fused_sce.BCEWithLogitsLoss(), logits.to(dtype), hard.to(dtype))
        add(fused_sce.BCEWithLogitsLoss(reduction="none"), logits, hard)
        add(fused_sce.BCEWithLogitsLoss(weight=factor, pos_weight=factor + 1), logits, hard.long())
        add(fused_sce.MultiLabelSoftMarginLoss(reduction="none"), logits, hard.byte())
        add(fused_sce.SigmoidCrossEntropyLoss(reduction="sum_classes"), logits.t(), hard.t().float())
    return found


def run_together() -> None:
    """Make all calls from THREADS threads, each in an order of its own, then from one, and compare."""
    work = calls()
    results: list[list[list[Tensor]]] = [[] for _ in range(THREADS)]
    errors: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def thread(number: int) -> None:
        try:
            start.wait()
            for turn in range(ROUNDS * len(work)):
                results[number].append(work[(number + turn) % len(work)]())
        except BaseException as error:  # reported by the main thread
            errors.append(error)

    threads = [threading.Thread(target=thread, args=(number,)) for number in range(THREADS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if errors:
        raise errors[0]
    expected = [call() for call in work]
    for number, of_thread in enumerate(results):
        for turn, got in enumerate(of_thread):
            for mine, alone in zip(got, expected[(number + turn) % len(work)], strict=True):
                if not torch.equal(mine, alone):
                    raise AssertionError(f"thread {number}, call {turn}: {mine} differs from {alone}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the threads are Python's; OpenMP's own are not visible to the sanitizer
    run_together()
    print(f"{THREADS} threads, {ROUNDS * len(calls())} calls each: all equal ({_library.__file__})")
