"""Where a training run stands, on disk, whole at every moment.

A checkpoint is written to a file beside its place, forced to the disk and then moved there in one
step: whenever the process dies, the place holds the previous checkpoint or the new one, never half
of one.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

# Raised when a key is added, or comes to mean something else.
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to another run; the message says why."""


def save_checkpoint(file: Path, state: Mapping[str, Any]) -> None:
    """Replace `file` by `state`, a mapping of tensors, numbers, strings and collections of them."""
    beside = file.with_name(file.name + ".partial")
    with beside.open("wb") as stream:
        torch.save({"format": FORMAT, **state}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, file)


def load_checkpoint(file: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, its tensors on the CPU."""
    try:
        # Tensors and plain values only: a checkpoint from elsewhere can run no code.
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file}: is not a checkpoint of this program: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{file}: is not a checkpoint of this version of the program")
    return cast(dict[str, Any], state)


def check_configuration(file: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming every option in which the two configurations differ."""
    differences = [
        f"{name} {_shown(saved.get(name))}, not {_shown(wanted.get(name))}"
        for name in {**saved, **wanted}
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise CheckpointError(f"{file}: was written with {'; '.join(differences)}")


def _shown(value: object) -> str:
    return "unset" if value is None else str(value)
