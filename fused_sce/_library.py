"""Loads the compiled core, which registers `torch.ops.fused_sce`."""

from __future__ import annotations

from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


def _load() -> bool:
    """Load the libraries; whether the CUDA kernels are among them.

    Raises:
        ImportError: The core was not built, or torch is too old.
    """
    core = _FOLDER / "libfused_sce.so"
    if not core.exists():
        raise ImportError(
            f"fused_sce's core is not built: {core} does not exist. This is the source folder, which Python finds "
            "before an installed fused_sce. Change to another folder, or build the core here:\n"
            "    pip install --no-build-isolation -e ."
        )
    try:
        torch.ops.load_library(core)
        # Its symbols are those of a torch with CUDA, and all must be there when it is loaded.
        cuda = _FOLDER / "libfused_sce_cuda.so"
        if torch.version.cuda is None or not cuda.exists():
            return False
        torch.ops.load_library(cuda)
    except OSError as error:
        raise ImportError(
            f"fused_sce's core cannot be loaded into torch {torch.__version__}; it needs torch 2.11 or newer: {error}"
        ) from error
    return True


has_cuda_kernels = _load()


def why_no_cuda_kernels() -> str:
    """What keeps the CUDA kernels away where `has_cuda_kernels` is false."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    return "fused_sce was built for the CPU only"


def build_facts() -> dict[str, str]:
    """What was built: "compiler", "isa" (the CPU instruction set in use), "isas" (those that can run), "cuda".

    Raises:
        ValueError: The environment variable FUSED_SCE_ISA names an instruction set that cannot run.
    """
    lines: str = torch.ops.fused_sce._cpu_build()
    facts = dict(line.split(": ", 1) for line in lines.splitlines())
    facts["cuda"] = torch.ops.fused_sce._cuda_build() if has_cuda_kernels else ""
    return facts
