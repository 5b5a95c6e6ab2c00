"""Count the kernels that a call launches on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

CALLS = 4  # a kernel that does not belong to every call makes the average a fraction


def launches_of(call: Callable[[], object]) -> float:
    """Kernels launched per call, the average of CALLS calls. The driver's copies and fills are not counted."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    events = recorded.events() or []
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    names = [event.name for event in kernels if not event.name.startswith(("Memcpy", "Memset"))]
    return len(names) / CALLS
