"""The kernels without torch: compiled by themselves, swept over float32 bit patterns."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fused_sce import _library

ROOT = Path(__file__).parent.parent
CPU_SOURCES = [path for path in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if path.name != "op.cpp"]  # needs torch
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("sweep") / "sweep"
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    source = ROOT / "tests/cpp/sweep.cpp"
    subprocess.run(
        [compiler, *FLAGS, "-Wall", "-Wextra", source, *CPU_SOURCES, "-o", program, "-lpthread"],
        check=True,
    )
    return program


def test_every_16_bit_and_every_101st_32_bit_logit(sweep: Path) -> None:
    run = subprocess.run([sweep, "101"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    for isa in _library.build_facts()["isas"].split():
        assert run.stdout.count(f"{isa:8} 0 lost: holds") == 3  # bfloat16, float16, float32
