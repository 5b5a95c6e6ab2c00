"""The CUDA kernels as nvcc compiles them, without a GPU: their PTX in the interpreter of this folder.

    python tests/ptx/run.py    # `make gpu-code`

builds them for several architectures, with the grid as it is and with a small one, and runs random cases of each; most
of the instructions must be executed. Then the kernels get defects, one after the other, of which each must be seen.
machine.h says what the interpreter checks, check.cpp what the results are compared with.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "g++"
IS_X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]  # as in setup.py
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Werror=cross-execution-space-call", "-Xcompiler=-ffp-contract=off"]
LACKS_FMA = 77  # exit status of check.cpp
FEWEST_COVERED = 80.0  # percent of the instructions of each kind of kernel

# A change of the sources: file below csrc, what stands there, what shall.
Change = tuple[str, str, str]
# With a grid of two blocks small problems reach the loops of large ones.
SMALL_GRID: Change = ("cuda/launch.h", "kMaxBlocks = 4096", "kMaxBlocks = 2")

# The oldest and the newest architecture that is built for, and one between.
BUILDS: dict[str, tuple[str, list[Change]]] = {
    "sm_75 with a small grid": ("75", [SMALL_GRID]),
    "sm_90 with a small grid": ("90", [SMALL_GRID]),
    "sm_120 with a small grid": ("120", [SMALL_GRID]),
    "sm_90": ("90", []),
}


def toolkit() -> Path | None:
    """The CUDA toolkit; None if there is no nvcc."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]
    return next((Path(place) for place in places if place and (Path(place) / "bin/nvcc").exists()), None)


def compile_by(command: Sequence[str | Path]) -> None:
    """Run a compiler; RuntimeError with what it says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def build(folder: Path, arch: str, changes: Sequence[Change] = ()) -> Path:
    """The program of check.cpp in `folder`, with kernels.ptx for an architecture beside it."""
    home = toolkit()
    if home is None:
        raise RuntimeError("there is no nvcc on the path, in CUDA_HOME or in /usr/local/cuda")
    sources = folder / "sources"
    shutil.copytree(ROOT / "csrc", sources / "csrc")
    shutil.copytree(ROOT / "tests/ptx", sources / "tests/ptx")
    for name, old, new in changes:
        file = sources / "csrc" / name
        text = file.read_text()
        if text.count(old) != 1:
            raise RuntimeError(f"{name} has not one {old!r}")
        file.write_text(text.replace(old, new))

    tests = sources / "tests/ptx"
    reference = "avx2" if IS_X86 else "baseline"
    nvcc: list[str | Path] = [home / "bin/nvcc", *NVCC_FLAGS, "-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    compiler = [COMPILER, *FLAGS, *(["-mfma"] if IS_X86 else [])]
    commands: list[list[str | Path]] = [
        [*nvcc, "--keep", "--keep-dir", folder, "-c", tests / "kernels.cu", "-o", folder / "kernels.o"],
        [*compiler, "-O2", f"-I{home / 'include'}", "-c", tests / "check.cpp", "-o", folder / "check.o"],
        [*compiler, "-O1", "-c", sources / f"csrc/cpu/{reference}.cpp", "-o", folder / "reference.o"],
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(compile_by, commands))
    compile_by([COMPILER, folder / "kernels.o", folder / "check.o", folder / "reference.o", "-o", folder / "check"])
    return folder / "check"


def check(program: Path, first: int, cases: int, ptx: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run cases on the kernels beside the program, or on other ones."""
    command: list[str | Path] = [program, ptx or program.parent / "kernels.ptx", str(first), str(cases)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def missed(output: str) -> str:
    """The kinds of kernels of which one was not launched, or fewer instructions executed than there should be."""
    found = re.findall(r"^(\w+_kernel) +(\d+) of +(\d+) kernels, +([\d.]+) %", output, flags=re.MULTILINE)
    too_few = [kind for kind, launched, of, percent in found if launched != of or float(percent) < FEWEST_COVERED]
    return ", ".join(too_few)


def in_each_kernel(change: Callable[[str], str]) -> Callable[[str], str]:
    """A change that is made in every kernel of a PTX file."""

    def changed(ptx: str) -> str:
        head, *kernels = re.split(r"(?m)^(?=\.entry )", ptx)
        return head + "".join(map(change, kernels))

    return changed


def sub(pattern: str, replacement: str, count: int = 0) -> Callable[[str], str]:
    """A change by a regular expression."""
    return lambda text: re.sub(pattern, replacement, text, count=count)


def without_barrier_after(pattern: str) -> Callable[[str], str]:
    """Without the next barrier after each match."""
    return sub(rf"({pattern}(?:(?!bar\.sync)[\s\S])*)\tbar\.sync \t0;\n", r"\1")


MUTANTS = {
    "no fence before the count": in_each_kernel(sub(r"\tmembar\.gl;\n", "", count=1)),
    "no fence after the count": sub(r"(atom\.global(?:(?!bar\.sync)[\s\S])*?)\tmembar\.gl;\n", r"\1"),
    "no barrier after the count": without_barrier_after(r"atom\.global"),
    "no barrier after the block's scale": without_barrier_after(r"st\.shared\.f\d\d \t\[\w*scale_of_block"),
    "no barrier before the warps' sums are added": sub(r"\tbar\.sync \t0;\n(?=(?:(?!bar\.sync)[\s\S])*?atom\.)", ""),
    "a counter that does not wrap": sub(r"atom\.global\.inc\.u32", "atom.global.add.u32"),
    "alignment is not asked": sub(r"(and\.b64\s+%rd\d+, %rd\d+, )15;", r"\g<1>0;"),
    "one element too many at a ragged end": sub(r"setp\.lt\.s32(\s+%p\d+, %r\d+, )4;", r"setp.lt.s32\g<1>3;"),
    "a constant of a polynomial": sub(r"0f3E2AAA", "0f3E2AAB"),
    "a constant of the 16-bit formula": sub(r"0fBF38AA3B", "0fBF38AE3B"),
    "sums are subtracted": sub(r"add\.rn\.f64(\s+%fd\d+, %fd\d+, %fd\d+;\s+ld\.shared)", r"sub.rn.f64\g<1>"),
    "shuffle by 3 for 2": sub(
        r"(mov\.u32 \t%r\d+), 2;(\s+// begin inline asm\s+\{  \.reg \.u32 lo)", r"\g<1>, 3;\g<2>"
    ),
    "a shuffle's mask without a lane": sub(r"mov\.u32( \t%r\d+), -1;", r"mov.u32\g<1>, 2147483647;"),
    "a signed byte read as unsigned": sub(r"ld\.global\.s8", "ld.global.u8"),
    "bytes in another order": sub(r", 29761;", ", 29762;"),
    "a wrong target is not seen": sub(r"@%p\d+ bra \t(\S+);\s+(?=mov\.u64 \t%rd\d+, \$str;)", r"bra.uni \g<1>;\n"),
}

# Defects that are written in the sources.
SOURCE_MUTANTS: dict[str, Change] = {
    "logits are read again after the gradient is in their place": (
        "cuda/choose.h",
        "problem.gradient.data == problem.logits.data",
        "false",
    ),
    "the last label of a list is not looked at": (
        "cuda/target.h",
        "k < problem.list_length",
        "k + 1 < problem.list_length",
    ),
}


def main() -> int:
    """Run everything; 0 if all kernels are right and all mutants are seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=12000, help="random cases of each build")
    parser.add_argument("--seed", type=int, default=random.randrange(10**12), help="number of the first case")
    options = parser.parse_args()
    print(f"cases from {options.seed} on", flush=True)
    begin = time.monotonic()
    failures = 0
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        folder = Path(temporary)

        def build_and_check(title: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
            program = build(folder / title, *BUILDS[title])
            first = options.seed + list(BUILDS).index(title) * options.cases  # other cases for each
            return program, check(program, first, options.cases)

        programs = {}
        for title, (program, done) in zip(BUILDS, pool.map(build_and_check, BUILDS), strict=True):
            programs[title] = program
            # Without the small grid these problems do not reach every loop.
            too_few = missed(done.stdout) if done.returncode == 0 and SMALL_GRID in BUILDS[title][1] else ""
            failures += done.returncode != 0 or too_few != ""
            print(f"{title}, {time.monotonic() - begin:.0f} s\n{done.stdout}{done.stderr}", end="", flush=True)
            if too_few:
                print(f"FAILED: executed less than {FEWEST_COVERED:.0f} % of {too_few}")
        small = programs["sm_75 with a small grid"]  # the mutants are written for the PTX of sm_75
        original = (small.parent / "kernels.ptx").read_text()

        def run_mutant(name: str) -> subprocess.CompletedProcess[str]:
            if name in SOURCE_MUTANTS:
                changed = build(folder / name.replace(" ", "_"), "75", [SMALL_GRID, SOURCE_MUTANTS[name]])
                return check(changed, options.seed, options.cases)
            text = MUTANTS[name](original)
            if text == original:
                raise RuntimeError(f"the mutant is no other: {name}")
            mutant = folder / f"{name}.ptx"
            mutant.write_text(text)
            return check(small, options.seed, options.cases, mutant)

        names = [*MUTANTS, *SOURCE_MUTANTS]
        for name, done in zip(names, pool.map(run_mutant, names), strict=True):
            failures += done.returncode != 1
            verdict = "seen" if done.returncode == 1 else "NOT SEEN"
            print(f"{verdict}: {name}\n    {(done.stdout + done.stderr)[:200].strip()}", flush=True)
    print(f"{failures} failures, {time.monotonic() - begin:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
