"""The CUDA kernels without a GPU: what each thread does, run on the CPU, and what nvcc makes of the rest."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import count_instructions
import pytest

from fused_sce import _library

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
    X86 and "avx2" not in _library.build_facts()["isas"].split(), reason="this processor has no fused multiply-add"
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


@dataclass
class Compiled:
    object_file: Path
    report: str


ARCHS = ("75", "80", "90", "100", "120")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The CUDA kernels compiled for every generation of GPUs, and what the assembler says of their registers."""
    compiler = nvcc()
    if compiler is None:
        pytest.skip("nvcc is not installed")
    target = tmp_path_factory.mktemp("cuda") / "kernels.o"
    run = subprocess.run(
        [
            compiler,
            *["-O3", "-std=c++17", "--fmad=false", "--threads=0", "-Xptxas=-v"],
            *[f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS],
            # Only a warning otherwise, and the kernel that makes such a call is compiled to nothing.
            "-Werror=cross-execution-space-call",
            *["-c", ROOT / "csrc/cuda/kernels.cu", "-o", target],
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return Compiled(target, run.stdout + run.stderr)


def test_kernels_compile_and_stay_in_registers(compiled: Compiled) -> None:
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.report)
    archs = set(re.findall(r"for 'sm_(\d+)'", compiled.report))
    assert archs == set(ARCHS), compiled.report
    assert len(frames) > 80 * len(ARCHS), compiled.report
    assert set(frames) == {("0", "0", "0")}, compiled.report
    assert "lmem" not in compiled.report, compiled.report


def test_instructions_per_element(compiled: Compiled) -> None:
    try:
        count_instructions.cuobjdump()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    loops = {loop.kernel: loop for loop in count_instructions.main_loops(compiled.object_file, "sm_90")}
    bytes_of_labels = [loop for name, loop in loops.items() if "<BFloat16, Label, false>, (Job)3" in name]
    assert len(bytes_of_labels) == 1, list(loops)
    assert bytes_of_labels[0].elements == 16  # two groups of eight: several loads in flight
    assert bytes_of_labels[0].per_element < 30
    floats = [loop for name, loop in loops.items() if "<float, float, false>, (Job)3" in name]
    assert len(floats) == 1, list(loops)
    assert floats[0].per_element < 80  # 83 is what the memory of an H200 waits for, see count_instructions.py


def test_main_loop_is_found_in_a_listing() -> None:
    listing = """
arch = sm_90
\t\tFunction : first
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0020*/                   MUFU.RCP R4, R4 ;
        /*0030*/                   MUFU.RCP R5, R5 ;
        /*0040*/              @!P0 BRA 0x60 ;
        /*0050*/                   FADD R4, R4, 1 ;
        /*0060*/                   MUFU.RCP R6, R6 ;
        /*0070*/                   MUFU.RCP R7, R7 ;
        /*0080*/               @P1 BRA 0x10 ;
        /*0090*/                   MUFU.RCP R7, R7 ;
        /*00a0*/               @P1 BRA 0x90 ;
        /*00b0*/                   EXIT ;
\t\tFunction : without_loop
        /*0000*/                   EXIT ;
"""
    loops = [count_instructions.main_loop(*kernel) for kernel in count_instructions.kernels(listing)]
    assert loops == [count_instructions.Loop("first", "sm_90", instructions=8, elements=4), None]
    assert loops[0] is not None
    assert loops[0].per_element == 2
