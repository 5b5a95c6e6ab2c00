"""The loss of DTensors, and training in several processes: all as in one process.

The processes are started once for each number of them; what they check is in distributed_worker.py.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import distributed_worker
import pytest

ROOT = Path(__file__).resolve().parents[1]
# Many times what it takes: for a machine that has other work.
TIMEOUT = 300


def run(*command: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:  # torchrun leaves its logs in TMPDIR
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT}/tools",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": folder,
        }
        return subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )


@functools.cache
def results(processes: int) -> dict[str, str]:
    """What went wrong in each check, "" for nothing; "worker" is what stopped all of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        try:
            done = run(distributed_worker.__file__, str(processes), str(path))
        except subprocess.TimeoutExpired as expired:
            return {"worker": str(expired)}
        if done.returncode != 0:
            return {"worker": done.stderr}
        found: dict[str, str] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(
    ("processes", "check"),
    [(processes, check) for processes, checks in distributed_worker.CHECKS.items() for check in checks],
)
def test_in_several_processes(processes: int, check: str) -> None:
    found = results(processes)
    assert "worker" not in found, found["worker"]
    assert not found[check], found[check]


USE_IN_ONE_PROCESS = """
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
logits, targets = (torch.distributed.tensor.distribute_tensor(torch.rand(5, 7), mesh) for _ in range(2))
op = torch.ops.fused_sce.sigmoid_cross_entropy
for reduction in ("none", "rows", "sum"):
    whole = op(logits.full_tensor(), targets.full_tensor(), reduction=reduction)
    torch.testing.assert_close(op(logits, targets, reduction=reduction).full_tensor(), whole)
print("works")
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import torch.distributed.tensor, fused_sce",
        # Alone it does not import DTensor, which would take a second; then that is imported amid another import.
        "import fused_sce, sys; assert 'torch.distributed.tensor' not in sys.modules\n"
        "from torch.distributed.fsdp import fully_shard",
    ],
)
def test_any_order_of_imports(imports: str) -> None:
    done = run("-c", f"import torch, torch.distributed as dist\n{imports}\n{USE_IN_ONE_PROCESS}")
    assert done.stdout == "works\n", done.stderr
