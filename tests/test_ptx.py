"""The CUDA kernels as nvcc compiles them, in the interpreter of tests/ptx. `make gpu-code` runs more of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ptx import run


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One build, whose small grid lets small problems reach every loop."""
    if run.toolkit() is None:
        pytest.skip("there is no nvcc")
    return run.build(tmp_path_factory.mktemp("ptx"), "90", [run.SMALL_GRID])


def checked(program: Path, cases: int, ptx: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = run.check(program, first=0, cases=cases, ptx=ptx)
    if done.returncode == run.LACKS_FMA:
        pytest.skip("this processor has no fused multiply-add, whose bits the kernels have")
    return done


def test_random_cases(program: Path) -> None:
    done = checked(program, cases=1200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_error_is_told(program: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.ptx"
    wrong.write_text(run.MUTANTS["a constant of a polynomial"]((program.parent / "kernels.ptx").read_text()))
    assert checked(program, cases=100, ptx=wrong).returncode == 1
