"""Loads the compiled ops, after checking that they were compiled for the torch that is running."""

from __future__ import annotations

from types import ModuleType

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir"


def minor_version(version: str) -> str:
    """The part of a torch version within which its C++ interface is stable: "2.15.0+cu132" -> "2.15"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def check_built_for(
    built: str,
    built_cuda: str | None,
    with_cuda: bool,
    running: str,
    running_cuda: str | None,
) -> None:
    """Check that an extension compiled against one torch can be loaded into another.

    Args:
        built: version of the torch compiled against, "2.15.0+cu132".
        built_cuda: its CUDA version, "13.2"; None for a build of torch without CUDA.
        with_cuda: whether the extension has CUDA kernels.
        running: version of the torch imported here.
        running_cuda: its CUDA version.

    Raises:
        ImportError: They do not fit; the message says how to rebuild.
    """
    how = f"Rebuild it against the torch you have, from its source folder:\n    {REBUILD} ."
    if minor_version(built) != minor_version(running):
        raise ImportError(
            f"fused_sce was built for torch {built}, but torch {running} is running: the C++ interface changes with "
            f"each minor version. {how}"
        )
    built_major = built_cuda.split(".")[0] if built_cuda else None
    running_major = running_cuda.split(".")[0] if running_cuda else None
    if with_cuda and built_major != running_major:
        raise ImportError(
            f"fused_sce was built with CUDA kernels for torch {built} (CUDA {built_cuda}), but torch {running} has "
            f"{f'CUDA {running_cuda}' if running_cuda else 'no CUDA'}. {how}"
        )


def load() -> ModuleType:
    """Check the build and load it, which registers `torch.ops.fused_sce`.

    Raises:
        ImportError: The extension was not built, or for another torch.
    """
    try:
        from fused_sce import _built_for
    except ImportError as error:
        raise ImportError(
            "fused_sce's extension is not built: this is a source folder that was not installed. Run\n"
            "    pip install --no-build-isolation -e ."
        ) from error
    check_built_for(
        _built_for.TORCH_VERSION,
        _built_for.TORCH_CUDA_VERSION,
        _built_for.WITH_CUDA,
        str(torch.__version__),
        torch.version.cuda,
    )
    from fused_sce import _C

    return _C


_C = load()
