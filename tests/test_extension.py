"""The build and its checks: another torch, another CUDA, build options, the self-check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_sce
from fused_sce import _built_for, _extension

ROOT = Path(__file__).parent.parent


def test_built_for_this_torch() -> None:
    assert torch.__version__ == _built_for.TORCH_VERSION
    _extension.check_built_for("2.15.0+cu132", "13.2", True, "2.15.3+cu130", "13.0")
    _extension.check_built_for("2.15.0+cu132", "13.2", False, "2.15.0+cpu", None)


@pytest.mark.parametrize(
    ("running", "running_cuda", "message"),
    [
        ("2.16.0+cu132", "13.2", "built for torch 2.15.0.cu132, but torch 2.16.0.cu132 is running"),
        ("2.1.5", "13.2", "but torch 2.1.5 is running"),
        ("2.15.0+cpu", None, "but torch 2.15.0.cpu has no CUDA"),
        ("2.15.0+cu126", "12.6", "has CUDA 12.6"),
    ],
)
def test_another_torch_is_refused_with_the_remedy(running: str, running_cuda: str | None, message: str) -> None:
    with pytest.raises(ImportError, match=message) as caught:
        _extension.check_built_for("2.15.0+cu132", "13.2", True, running, running_cuda)
    assert "pip install --no-build-isolation" in str(caught.value)


def test_import_under_another_torch(tmp_path: Path) -> None:
    # the whole import, with a torch that says it is another version
    code = "import torch; torch.__version__ = '2.99.0'\nimport fused_sce\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "but torch 2.99.0 is running" in run.stderr
    assert "undefined symbol" not in run.stderr


def run_setup(**environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py up to the point where it would build."""
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_cuda_switch() -> None:
    off = run_setup(FUSED_SCE_CUDA="0")
    assert off.returncode == 0, off.stderr
    assert "building for the CPU only (FUSED_SCE_CUDA=0)" in off.stdout
    wrong = run_setup(FUSED_SCE_CUDA="yes")
    assert wrong.returncode != 0
    assert "FUSED_SCE_CUDA must be 0, 1 or unset, got 'yes'" in wrong.stderr


def test_forced_cuda_fails_with_the_reason(tmp_path: Path) -> None:
    # a toolkit of a CUDA version that no torch is built with
    toolkit = tmp_path / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "include").mkdir()
    (toolkit / "include/cuda_runtime.h").touch()
    nvcc = toolkit / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.148'\n")
    nvcc.chmod(0o755)
    forced = run_setup(FUSED_SCE_CUDA="1", CUDA_HOME=str(toolkit))
    assert forced.returncode != 0
    assert "FUSED_SCE_CUDA=1, but " in forced.stderr
    assert "nvcc is 9.2" in forced.stderr or "a build without CUDA" in forced.stderr
    left_to_setup = run_setup(FUSED_SCE_CUDA="", CUDA_HOME=str(toolkit))
    assert left_to_setup.returncode == 0, left_to_setup.stderr
    assert "building for the CPU only: " in left_to_setup.stdout


def test_self_check_command() -> None:
    run = subprocess.run([sys.executable, "-m", "fused_sce"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for fact in (fused_sce.__version__, torch.__version__, "CPU kernels", "CUDA kernels", "passed"):
        assert fact in run.stdout


def test_self_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_sce import __main__ as command

    torchs = torch.nn.functional.binary_cross_entropy_with_logits
    monkeypatch.setattr(fused_sce.functional, "sigmoid_cross_entropy", torchs)
    failures = command.self_check("cpu")
    assert any("gradient of logit 40, target 1 is" in failure for failure in failures)


def test_no_word_of_torch_below_the_op_layer() -> None:
    for path in [*(ROOT / "csrc/cpu").iterdir(), *(ROOT / "csrc/cuda").iterdir(), *(ROOT / "csrc/formulas").iterdir()]:
        for line in path.read_text().splitlines():
            assert not line.startswith(("#include <torch", "#include <ATen", "#include <c10")), path
