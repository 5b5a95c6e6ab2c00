"""The compiled core: what it was built for, build options, the self-check."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_sce
from fused_sce import _library

ROOT = Path(__file__).parent.parent
LIBRARIES = sorted(Path(_library.__file__).parent.glob("libfused_sce*.so"))


def test_libraries_need_only_what_every_torch_has() -> None:
    # No Python, no CUDA runtime of torch's, no C++ symbol of torch: the C functions of the stable ABI.
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("needs binutils")
    assert LIBRARIES
    for library in LIBRARIES:
        dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
        torchs = {name for name in needed if "torch" in name or "c10" in name or "cuda" in name or "python" in name}
        assert torchs <= {"libtorch_cpu.so", "libtorch_cuda.so"}, (library, needed)
        assert "libtorch_cuda.so" not in needed or "cuda" in library.name
        symbols = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True, check=True).stdout
        for symbol in symbols.split():
            assert not re.match(r"_ZNK?(2at|3c10|5torch)|Py", symbol), (library, symbol)


def test_core_includes_stable_headers_only() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu"):
            torchs = re.findall(r"#include [<\"]((?:torch|ATen|c10|Python|pybind11)[^>\"]*)", path.read_text())
            in_op_layer = path.parent.name == "ops" or path.name == "op.cpp"
            for header in torchs:
                assert in_op_layer, f"{path} includes {header}"
                assert header.startswith(("torch/csrc/stable/", "torch/headeronly/")), f"{path} includes {header}"


def error_of_import(folder: Path) -> str:
    """What `import fused_sce` prints where the package lies in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", "import fused_sce"]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    return run.stderr


def test_a_core_that_is_missing_or_broken_says_so(tmp_path: Path) -> None:
    package = tmp_path / "fused_sce"
    package.mkdir()
    for path in Path(fused_sce.__file__).parent.glob("*.py"):
        shutil.copy(path, package)
    error = error_of_import(tmp_path)
    assert "fused_sce's core is not built" in error
    assert "pip install --no-build-isolation" in error
    (package / "libfused_sce.so").write_text("no library")
    assert f"cannot be loaded into torch {torch.__version__}; it needs torch 2.11 or newer" in error_of_import(tmp_path)


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


def test_a_loss_does_not_import_the_onnx_exporter() -> None:
    code = (
        "import sys, torch, fused_sce; before = 'torch.onnx' in sys.modules\n"
        "fused_sce.BCEWithLogitsLoss()(torch.randn(2, 3, requires_grad=True), torch.rand(2, 3)).backward()\n"
        "assert before or 'torch.onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
