"""The kernels without torch: compiled by themselves, swept over float32 bit patterns."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fused_sce import _extension

ROOT = Path(__file__).parent.parent
CPU_SOURCES = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
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


@pytest.mark.parametrize("isa", _extension._C.available_isas().split())
def test_every_101st_float32_within_two_ulp(sweep: Path, isa: str) -> None:
    run = subprocess.run(
        [sweep, "101"],
        env={**os.environ, "FUSED_SCE_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
