"""What the CPU backend asks of the machine: pages, and nothing shared between calls."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_sce import _extension

ROOT = Path(__file__).parent.parent
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(), reason="this system hands out no large pages"
)
def test_a_large_gradient_costs_few_page_faults() -> None:
    logits = torch.randn(1024, 9605)  # 37.5 MiB: malloc maps anew whatever is beyond 32 MiB
    target = torch.zeros(logits.shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ops.fused_sce._sigmoid_cross_entropy_sum_with_gradient(logits, target, None, None, 1, None)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    # Small pages remain at both ends, up to 2 MiB each: 1,024 and a few. Small pages throughout would be 9,605.
    assert faults < 1500


@pytest.mark.parametrize("isa", _extension._C.available_isas().split())
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
