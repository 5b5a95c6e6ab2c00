"""The kernels without torch, compiled by themselves: the CPU's over float32 bit patterns, CUDA's thread by thread."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fused_sce import _library

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "g++"
CPU_SOURCES = [path for path in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if path.name != "op.cpp"]  # needs torch
FLAGS = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall", "-Wextra"]
X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The programs of tests/cpp by name, both with the CPU kernels as they are shipped."""
    folder = tmp_path_factory.mktemp("programs")
    # A GPU has fused multiply-add, and the bits must be the same.
    own_flags = {"sweep": ["-O3"], "cuda_threads": ["-O1", *(["-mfma"] if X86 else [])]}
    jobs = {ROOT / f"tests/cpp/{name}.cpp": flags for name, flags in own_flags.items()}
    jobs |= {source: ["-O3"] for source in CPU_SOURCES}

    def compile_object(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [COMPILER, *FLAGS, *jobs[source], "-c", source, "-o", target]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, f"{source} does not compile:\n{run.stderr}"
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = dict(zip(jobs, pool.map(compile_object, jobs), strict=True))
    kernels = [objects[source] for source in CPU_SOURCES]
    for name in own_flags:
        own = objects[ROOT / f"tests/cpp/{name}.cpp"]
        subprocess.run([COMPILER, own, *kernels, "-o", folder / name, "-lpthread"], check=True)
    return {name: folder / name for name in own_flags}


def test_every_16_bit_and_every_101st_32_bit_logit(programs: dict[str, Path]) -> None:
    run = subprocess.run([programs["sweep"], "101"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    for isa in _library.build_facts()["isas"].split():
        assert run.stdout.count(f"{isa:8} 0 lost: holds") == 3  # bfloat16, float16, float32


def test_every_thread_of_a_grid_as_the_cpu(programs: dict[str, Path]) -> None:
    # Without sanitizers: `make sanitize` runs the same program under them.
    environment = {**os.environ, "FUSED_SCE_ISA": "avx2" if X86 else "baseline"}
    run = subprocess.run([programs["cuda_threads"]], env=environment, capture_output=True, text=True, check=False)
    if run.returncode == 77:
        pytest.skip(f"this processor has no fused multiply-add: {run.stdout}")
    assert run.returncode == 0, run.stdout + run.stderr
