"""The CUDA kernels without a GPU: the machine code that nvcc has made. What each thread does is in test_sweep.py."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import count_instructions
import pytest
from count_instructions import LOAD, SPECIAL, STORE, Loop

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


@pytest.fixture(scope="module")
def hot_loops(library: Path) -> dict[tuple[str, ...], Loop]:
    """The main loops of contiguous sums with their gradient, by logits, target and weights."""
    found = {}
    for loop in count_instructions.main_loops([library], "sm_90"):
        if match := re.match(r"sum_kernel<ContiguousLoop<\(Output\)2, (\w+), (\w+), (\w+)>", loop.kernel):
            found[match.groups()] = loop
    return found


# Logits, target, weights; elements of the loop; the bound on instructions per element. 34 for bfloat16 with uint8 and
# 83 for float32 are what the memory of an H200 waits for, see count_instructions.py. A turn makes a group. With weights
# the loop has it twice, with and without pos_weight, and more instructions, because a factor of 0 leaves out
# infinities and NaN; one element may be computed outside of the loop.
HOT_LOOPS = [
    ("BFloat16", "ByteTarget", "false", 8, 30),
    ("BFloat16", "BFloat16", "false", 8, 27),
    ("BFloat16", "float", "false", 8, 26),
    ("float", "float", "false", 4, 61),
    ("float", "ByteTarget", "false", 4, 66),
    ("BFloat16", "ByteTarget", "true", 15, 37),
    ("BFloat16", "BFloat16", "true", 15, 36),
    ("float", "float", "true", 7, 68),
]


def test_instructions_per_element(hot_loops: dict[tuple[str, ...], Loop]) -> None:
    for logits, target, is_weighted, elements, most in HOT_LOOPS:
        loop = hot_loops[logits, target, is_weighted]
        assert loop.elements == elements, loop
        assert loop.per_element <= most, loop


def test_a_group_is_loaded_first_and_stored_at_once(hot_loops: dict[tuple[str, ...], Loop]) -> None:
    assert len(hot_loops) == 5 + 7 + 7  # see MOST_KERNELS
    for (logits, target, _), loop in hot_loops.items():
        is_16_bit, is_any = logits != "float", target == "AnyTarget"
        assert loop.bits(STORE) == {128: 1}, loop
        assert loop.stack == 0, loop
        assert loop.registers <= (80 if is_16_bit and is_any else 64), loop  # for 3 or 4 blocks of 256 threads
        if is_any:
            continue  # which loads it executes is decided at run time
        of_target = (8 if is_16_bit else 4) * {"float": 32, "ByteTarget": 8}.get(target, 16)
        assert loop.bits(LOAD) == Counter({128: 1}) + Counter([min(of_target, 128)] * -(-of_target // 128)), loop
        assert max(loop.places(LOAD)) < min(loop.places(SPECIAL)), loop  # no load is kept back by arithmetic


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
        /*0080*/                   STG.E desc[UR6][R2.64], R7 ;
        /*0090*/               @P1 BRA 0x10 ;
        /*00a0*/                   MUFU.RCP R7, R7 ;
        /*00b0*/               @P1 BRA 0xa0 ;
        /*00c0*/                   EXIT ;
\t\tFunction : without_loop
        /*0000*/                   EXIT ;
"""
    loop, nothing = (count_instructions.main_loop(*kernel) for kernel in count_instructions.kernels(listing))
    assert nothing is None
    assert loop is not None
    assert (loop.kernel, loop.arch, loop.elements, loop.per_element) == ("first", "sm_90", 4, 2.25)
    assert loop.bits(LOAD) == {128: 1}
    assert loop.bits(STORE) == {32: 1}
    assert loop.places(SPECIAL) == [1, 2, 5, 6]
