"""What the CPU backend asks of the machine: pages, and nothing shared between calls."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_sce import _library

ROOT = Path(__file__).parent.parent
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(), reason="this system hands out no large pages"
)
def test_a_large_gradient_costs_few_page_faults() -> None:
    logits = torch.randn(1024, 9605)  # 37.5 MiB: malloc maps anew whatever is beyond 32 MiB
    target = torch.zeros(logits.shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ops.fused_sce._sigmoid_cross_entropy_forward(logits, target, reduction="sum")
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    # Small pages remain at both ends, up to 2 MiB each: 1,024 and a few. Small pages throughout would be 9,605.
    assert faults < 1500


COUNT_THREADS = """
import os, torch
from fused_sce import functional as F
torch.set_num_threads(1)  # torch starts threads with the first work for them: none while the inputs are made
x, t = torch.randn(1000, 1000), torch.zeros(1000, 1000)
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
F.binary_cross_entropy_with_logits(x, t)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of threads")
def test_a_large_loss_is_computed_by_all_threads() -> None:
    run = subprocess.run([sys.executable, "-c", COUNT_THREADS], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "2", run.stdout + run.stderr


@pytest.mark.parametrize("isa", _library.build_facts()["isas"].split())
def test_many_python_threads_agree_with_one(isa: str) -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "tests/concurrent_calls.py"],
        env={**os.environ, "FUSED_SCE_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "all equal" in run.stdout
