"""The loss of DTensors, and training in several processes: all as in one process.

The processes are started once for each number of them; what they check is in distributed_worker.py.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import distributed_worker
import pytest
import train_class_parallel as example

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


def torchrun(processes: int, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # --standalone: a free port
    options = ["--standalone", "--nproc-per-node", str(processes)]
    return run("-m", "torch.distributed.run", *options, str(program), *arguments)


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


def test_class_parallel_example() -> None:
    options = ["--labels", "301", "--features", "16", "--batch", "32", "--steps", "8"]
    done = torchrun(2, Path(example.__file__), *options)
    assert done.returncode == 0, done.stderr
    assert "301 labels on 2 processes (cpu), 151 on the first" in done.stdout
    losses = [float(loss) for loss in re.findall(r"^step +\d+  loss ([\d.]+)$", done.stdout, flags=re.MULTILINE)]
    assert len(losses) == 8
    assert losses[-1] < 0.6 * losses[0]
    assert "the same training in one process: the same result" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "torchrun --nproc-per-node 2"),
        (["--steps", "0"], "argument --steps: must be a whole number of at least 1, got '0'"),
        (["--labels", "many"], "argument --labels: invalid int value: 'many'"),
    ],
)
def test_class_parallel_example_explains_errors(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as exit_:
        example.main(options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_class_parallel_example_needs_a_label_for_each_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        example.main(["--labels", "3"])
    assert "--labels 3 leaves some of the 4 processes without a label" in capsys.readouterr().err
