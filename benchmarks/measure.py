"""What the benchmarks share: timing in turns, and the facts that a figure depends on."""

from __future__ import annotations

import datetime
import platform
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fused_sce.__main__ import versions

MIN_ROUNDS = 7
WARM_UP = 3  # calls of each candidate before the first round: compiles, fills caches and the allocator


def in_turns(
    candidates: Mapping[str, Callable[[], object]],
    seconds: float,
    device: str = "cpu",
    threads: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Time every candidate once per round, in an order shuffled anew, for `seconds` and at least MIN_ROUNDS rounds.

    So a noisy neighbour or a change of clock hits all of them. `threads` sets the number of threads of some candidates,
    outside of what is timed. Returns the seconds of each call, by candidate; the n-th belong to one round.
    """

    def timed(name: str) -> float:
        if threads and name in threads:
            torch.set_num_threads(threads[name])
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        candidates[name]()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for name in candidates:
        for _ in range(WARM_UP):
            timed(name)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < MIN_ROUNDS or time.perf_counter() < end:
        random.shuffle(order)
        for name in order:
            times[name].append(timed(name))
        rounds += 1
    return times


def environment(device: str) -> dict[str, str]:
    """What the figures depend on, by name."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = models[0].split(":")[1].strip() if models else processor
    return {
        **versions(),
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
