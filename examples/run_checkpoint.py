"""Files that are whole at every moment; a training run's checkpoint: Lightning's, and all that `predict` needs."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

OF_THE_MODEL = ("configuration", "labels", "thresholds", "history", "state_dict")
OF_THE_RUN = (*OF_THE_MODEL, "environment", "loops", "optimizer_states", "lr_schedulers")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names its file and says why."""


def write_atomically(file: Path, content: bytes) -> None:
    """Replace `file`: whenever the process dies, it holds the previous content or the new one, never half of one.

    Raises:
        OSError: It cannot be written; the previous content is kept.
    """
    beside = file.with_name(file.name + ".partial")
    try:
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


class WholeCheckpoints(TorchCheckpointIO):
    """Reads and writes the files; Lightning's own way there is through another folder, and not forced to the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], *_: Any, **__: Any) -> None:
        """Replace `path`."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(Path(path), content.getvalue())

    def load_checkpoint(self, path: str | os.PathLike[str], *_: Any, **__: Any) -> dict[str, Any]:
        """The checkpoint, its tensors on the CPU."""
        return read_checkpoint(Path(path), OF_THE_RUN)


def read_checkpoint(file: Path, needed: Iterable[str]) -> dict[str, Any]:
    """The checkpoint in `file`, its tensors on the CPU; raise CheckpointError if it lacks something `needed`."""
    try:
        # Tensors and plain values only: a checkpoint from elsewhere can run no code.
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except Exception as error:  # of many kinds, on files of other programs
        raise CheckpointError(f"{file}: is not a checkpoint of this program") from error
    lacking = [key for key in needed if not isinstance(content, dict) or key not in content]
    if lacking:
        raise CheckpointError(f"{file}: is not a checkpoint of this program: it has no {', '.join(lacking)}")
    return dict(content)


def check_configuration(file: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming every option in which the two configurations differ."""

    def shown(value: object) -> str:
        return "unset" if value is None else str(value)

    differences = [
        f"{name} {shown(saved.get(name))}, not {shown(wanted.get(name))}"
        for name in {**saved, **wanted}
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise CheckpointError(f"{file}: was written with {'; '.join(differences)}")
