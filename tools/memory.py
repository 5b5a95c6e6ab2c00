"""What a call allocates on the CPU, by the profiler's events."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch


def allocations(call: Callable[[], object]) -> list[int]:
    """How many bytes the CPU's memory grows and, below 0, shrinks by at each allocation of `call`, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = []
    assert profile.profiler is not None
    events = list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [change for _, change in sorted(changes, key=lambda each: each[0])]


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that `call` has allocated at once on the CPU."""
    return max(itertools.accumulate(allocations(call)), default=0)
