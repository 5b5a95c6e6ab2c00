"""The CUDA kernels without a GPU: the machine code that nvcc has made. What each thread does is in test_sweep.py."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import count_instructions
import pytest

import fused_sce

# Kernels of one architecture, at most: 25 for sums (a sum with its gradient has 5 for float32 logits and 7 for each
# 16-bit type, a sum alone 3, strided ones 3), 5 for elements, 6 for rows, 1 to scale, and 6 for the formulas of focal.h
# (float and double, each for sums, elements and rows). Every loss of its own multiplies
# them, so csrc/cuda/choose.h says what each of them earns.
MOST_KERNELS = 43
ARCHS = ("75", "80", "90", "100", "120")


@pytest.fixture(scope="module")
def library() -> Path:
    """The CUDA kernels as they were built, for every generation of GPUs."""
    built = Path(fused_sce.__file__).parent / "libfused_sce_cuda.so"
    if not built.exists():
        pytest.skip("no CUDA kernels were built: `python -m fused_sce` and the build say why")
    try:
        count_instructions.cuobjdump()
    except FileNotFoundError as error:  # a wheel with CUDA kernels under a torch without CUDA
        pytest.skip(str(error))
    return built


def test_kernels_stay_in_registers(library: Path) -> None:
    command = [count_instructions.cuobjdump(), "-res-usage", library]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: Counter[str] = Counter()
    for code in report.split("Fatbin elf code:")[1:]:
        arch = re.findall(r"^arch = sm_(\d+)$", code, flags=re.MULTILINE)[0]  # PTX may follow, with its own
        memory = re.findall(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", code)
        assert len(memory) == code.count(" Function ")
        assert set(memory) <= {("0", "0")}, code  # what does not fit in registers goes onto the stack
        kernels[arch] += len(memory)
    assert set(kernels) == set(ARCHS), report
    assert len(set(kernels.values())) == 1, kernels
    assert 0 < max(kernels.values()) <= MOST_KERNELS, kernels


# Logits, target, weights; elements of the loop; the bound on instructions per element. 34 for bfloat16 with uint8 and
# 83 for float32 are what the memory of an H200 waits for, see count_instructions.py. Without weights 16 (8) elements
# are two groups: several loads in flight. With weights they are one group, with and without pos_weight, and 9 (12) more
# instructions, because a factor of 0 leaves out infinities and NaN; one element may be computed outside of the loop.
HOT_LOOPS = [
    ("BFloat16", "ByteTarget", "false", 16, 30),
    ("BFloat16", "BFloat16", "false", 16, 27),
    ("BFloat16", "float", "false", 16, 26),
    ("float", "float", "false", 8, 75),
    ("float", "ByteTarget", "false", 8, 79),
    ("BFloat16", "ByteTarget", "true", 15, 37),
    ("BFloat16", "BFloat16", "true", 15, 36),
    ("float", "float", "true", 7, 80),
]


def test_instructions_per_element(library: Path) -> None:
    loops = {loop.kernel: loop for loop in count_instructions.main_loops([library], "sm_90")}
    for logits, target, is_weighted, elements, most in HOT_LOOPS:
        sum_and_gradient = f"sum_kernel<ContiguousLoop<(Output)2, {logits}, {target}, {is_weighted}>"
        found = [loop for name, loop in loops.items() if name.startswith(sum_and_gradient)]
        assert len(found) == 1, (sum_and_gradient, list(loops))
        assert found[0].elements == elements, found[0]
        assert found[0].per_element < most, found[0]


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
