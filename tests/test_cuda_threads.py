"""The CUDA kernels without a GPU: what each thread does, run on the CPU, and what nvcc makes of the rest."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fused_sce import _extension

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "g++"
X86 = platform.machine() in ("x86_64", "AMD64")

# As the CPU kernels are compiled, with fused multiply-add throughout: a GPU has it, and the bits must be the same.
FLAGS = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", *(["-mfma"] if X86 else [])]
SANITIZERS = ["-fsanitize=address,alignment", "-fno-sanitize-recover=all"]


def nvcc() -> str | None:
    """The compiler of the toolkit, found as setup.py finds it."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin/nvcc").exists():
            return str(Path(home) / "bin/nvcc")
    return None


def has_sanitizers(folder: Path) -> bool:
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    command = [COMPILER, *SANITIZERS, probe, "-o", folder / "probe"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def compile_object(source: Path, folder: Path, flags: list[str]) -> Path:
    target = folder / f"{source.stem}.o"
    run = subprocess.run(
        [COMPILER, *FLAGS, *flags, "-c", source, "-o", target], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"{source} does not compile:\n{run.stderr}"
    return target


@pytest.mark.skipif(
    X86 and "avx2" not in _extension._C.available_isas().split(), reason="this processor has no fused multiply-add"
)
def test_every_thread_of_a_grid_as_the_cpu(tmp_path: Path) -> None:
    sanitizers = SANITIZERS if has_sanitizers(tmp_path) else []
    jobs = [(ROOT / "tests/cpp/cuda_threads.cpp", ["-O1", "-Wall", "-Wextra", *sanitizers])]
    jobs += [(source, ["-O2"]) for source in sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compile_object(job[0], tmp_path, job[1]), jobs))
    program = tmp_path / "cuda_threads"
    subprocess.run([COMPILER, *sanitizers, *objects, "-o", program], check=True)

    run = subprocess.run(
        [program],
        env={**os.environ, "FUSED_SCE_ISA": "avx2" if X86 else "baseline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
def test_kernels_compile_and_stay_in_registers(tmp_path: Path) -> None:
    compiler = nvcc()
    assert compiler is not None
    run = subprocess.run(
        [
            compiler,
            *["-O3", "-std=c++17", "--fmad=false", "-gencode=arch=compute_90,code=sm_90", "-Xptxas=-v"],
            # Only a warning otherwise, and the kernel that makes such a call is compiled to nothing.
            "-Werror=cross-execution-space-call",
            *["-c", ROOT / "csrc/cuda/kernels.cu", "-o", tmp_path / "kernels.o"],
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    report = run.stdout + run.stderr
    assert run.returncode == 0, report
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) > 30, report
    assert set(frames) == {("0", "0", "0")}, report
