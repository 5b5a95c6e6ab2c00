"""The CPU kernels compile for other processors and by another compiler, into vector code."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["-O3", "-g0", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall", "-Wextra"]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the cross compiler ziglang")


def assembly(source: str, target: str, folder: Path) -> str:
    """What clang, as ziglang brings it, makes of one source file."""
    output = folder / "kernels.s"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "ziglang",
            "c++",
            "-target",
            target,
            *FLAGS,
            "-S",
            "-o",
            output,
            ROOT / "csrc/cpu" / source,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert not re.search(r"csrc/.* warning: ", run.stderr), run.stderr
    return output.read_text(errors="replace")


@pytest.mark.parametrize(
    ("source", "target", "instruction"),
    [
        # four floats, eight, sixteen to a fused multiply-add
        ("baseline.cpp", "aarch64-linux-gnu", r"\bfml[as]\s+v\d+\.4s"),
        ("avx2.cpp", "x86_64-linux-gnu", r"\bvfn?madd\d+ps\s.*%ymm"),
        ("avx512.cpp", "x86_64-linux-gnu", r"\bvfn?madd\d+ps\s.*%zmm"),
        # SSE2 computes in double, two to a multiplication
        ("baseline.cpp", "x86_64-linux-gnu", r"\bmulpd\s.*%xmm"),
    ],
)
def test_clang_vectorises(source: str, target: str, instruction: str, tmp_path: Path) -> None:
    assert len(re.findall(instruction, assembly(source, target, tmp_path))) > 50


@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "x86_64-linux-gnu"])
def test_dispatch_compiles(target: str, tmp_path: Path) -> None:
    assert "runnable_kernels" in assembly("dispatch.cpp", target, tmp_path)


def test_avx_files_are_empty_elsewhere(tmp_path: Path) -> None:
    for source in ("avx2.cpp", "avx512.cpp"):
        assert "kKernels" not in assembly(source, "aarch64-linux-gnu", tmp_path)
