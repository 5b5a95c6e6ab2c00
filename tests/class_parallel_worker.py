"""What test_class_parallel_example.py runs in several processes.

    torchrun ... class_parallel_worker.py OPTIONS: the example, in which the second process dies once, in a save
    python class_parallel_worker.py FOLDER: groups of processes without torchrun; results come into the folder

The second's processes are forks of one that has imported everything, which takes longer than what they do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import train_class_parallel as example
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.elastic.utils.distributed import get_free_port

OPTIONS = ["--labels", "301", "--features", "16", "--hidden", "8", "--batch", "32", "--every", "5"]
# Seconds that a process waits for one that died, or was stopped and keeps its connections.
TIMEOUTS = {"SIGKILL": 60, "SIGSTOP": 3}
PATIENCE = 60


def die_in_save(of_step: int) -> None:
    """Make this process die in the save of a step, when its part of the checkpoint is written."""
    write = dcp.FileSystemWriter.write_data

    def write_and_die(self: dcp.FileSystemWriter, *args: Any) -> Any:
        written = write(self, *args)
        written.wait()
        if Path(self.path).name.startswith(f"step-{of_step:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    dcp.FileSystemWriter.write_data = write_and_die  # type: ignore[method-assign]


def end_in_step(number: int, by: signal.Signals) -> None:
    """Make this process get a signal at the start of a step."""
    batches = example.batches

    def some(*args: Any) -> Iterator[Any]:
        for batch in batches(*args):
            if batch[0] == number:
                os.kill(os.getpid(), by)
            yield batch

    example.batches = some


def keep_loaded(file: Path) -> None:
    """Make the first process write what was loaded from a checkpoint, put together, into a file."""
    load = example.load

    def load_and_keep(folder: Path, model: Any, optimizer: Any, options: argparse.Namespace) -> int:
        step = load(folder, model, optimizer, options)
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        of_model, of_optimizer = get_state_dict(model, optimizer, options=whole)
        if dist.get_rank() == 0:
            torch.save({"model": of_model, "optimizer": of_optimizer, "step": step}, file)
        return step

    example.load = load_and_keep


def start(
    count: int, output: Path, options: list[str], prepare: Callable[[int], None] = lambda rank: None
) -> list[Any]:
    """Start the example in a group of processes, whose output comes into a file."""
    port = get_free_port()

    def run(rank: int) -> None:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in (ranks | meeting).items()})
        torch.set_num_threads(1)
        prepare(rank)
        with output.open("a") as stream, contextlib.redirect_stdout(stream):
            sys.exit(example.main([*OPTIONS, *options]))

    processes = [torch.multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[Any]) -> None:
    for process in processes:
        process.join(PATIENCE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    if any(codes):
        sys.exit(f"exit statuses {codes}")


def after_end_of_other(by: signal.Signals, folder: Path) -> dict[str, Any]:
    """How the first process ends after the second got a signal: its exit status, None for not, and the seconds."""

    def prepare(rank: int) -> None:
        if rank == 1:
            end_in_step(3, by)

    options = ["--steps", "100000", "--timeout", str(TIMEOUTS[by.name])]
    first, second = start(2, folder / f"{by.name}.txt", options, prepare)
    begin = time.monotonic()
    first.join(PATIENCE)
    result = {"status": first.exitcode, "seconds": time.monotonic() - begin}
    for process in (first, second):
        process.kill()
    return result


def run_all(folder: Path) -> None:
    undisturbed, resumed = folder / "undisturbed", folder / "resumed"
    finish(start(2, folder / "undisturbed.txt", ["--steps", "12", "--checkpoint", str(undisturbed)]))
    shutil.copytree(undisturbed, resumed)
    options = ["--steps", "16", "--checkpoint", str(resumed)]
    finish(start(3, folder / "resumed.txt", options, lambda rank: keep_loaded(folder / "loaded.pt")))
    ends = {by.name: after_end_of_other(by, folder) for by in map(signal.Signals.__getitem__, TIMEOUTS)}
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    if "RANK" not in os.environ:
        run_all(Path(sys.argv[1]))
    else:
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            die_in_save(10)
        sys.exit(example.main([*OPTIONS, *sys.argv[1:]]))
