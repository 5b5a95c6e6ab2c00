"""Pictures of any kind, as a person sees them: checked once before the training, and loaded during it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from run_checkpoint import write_atomically
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".pgm", ".ppm")
# The values that can be white in grey of more than 8 bits: of 8 bits, of the 12 that many scanners give, and of 16.
WHITES = (255, 4095, 65535)
WHITE = "grey value of white"  # which of them it is, in the configuration of a run
MAX_SHOWN = 10  # problems, or names: enough to see what is wrong throughout, without flooding the terminal
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a TIFF tag, and its value where 0 is white
CHUNK = 32  # pictures that a process checks at a time; for fewer it is not worth starting one


class PictureError(ValueError):
    """A picture cannot be used; the message says why, and what would do."""


def as_seen(image: Image.Image, white: int) -> Image.Image:
    """Turn `image`, of any mode, into 8-bit RGB: upright as its EXIF data say, and white where it is transparent.

    `white` is the value that is white in integer grey of more than 8 bits; in float grey it is 1.

    Raises:
        PictureError: if a grey value lies outside of 0 to white.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("F", "I")):  # float and integer grey of more than 8 bits
        top = 1 if upright.mode == "F" else white
        values = np.asarray(upright)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= top):  # so that NaN is refused, too
            scale = f"from {low:.6g} to {high:.6g}, but 0 is black and {top} is white"
            raise PictureError(f"its grey values go {scale}: scale them")
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts 8 bits alone
            values = top - values
        return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8)).convert("RGB")
    if upright.has_transparency_data:
        paper = Image.new("RGBA", upright.size, "white")
        paper.alpha_composite(upright.convert("RGBA"))
        return paper.convert("RGB")
    return upright.convert("RGB")


def check_pictures(
    pictures: Sequence[Path], *, workers: int, remembered: Path | None
) -> tuple[int, list[tuple[int, str]]]:
    """Decode every picture once: a broken one would otherwise end the training in some later hour.

    Args:
        pictures: the files.
        workers: the number of processes that decode; 0 is this process.
        remembered: a file, made if there is none, that remembers which pictures were found good: only new and changed
            ones are decoded the next time. One that cannot be read or written is as good as none.

    Returns:
        What is white in grey of more than 8 bits, for `as_seen`: the smallest of `WHITES` that no picture exceeds. And
        the problems: the index of a picture, and what is wrong with it.
    """
    good = _recall(remembered)
    names = [os.path.abspath(picture) for picture in pictures]
    states = [_state(name) for name in names]
    new = [index for index, name in enumerate(names) if name not in good or good[name][:2] != states[index]]
    unchecked = [names[index] for index in new]
    problems = []
    with ProcessPoolExecutor(workers or 1) as pool:  # starts no process before it has work
        in_processes = workers > 0 and len(new) >= CHUNK
        results = pool.map(_check, unchecked, chunksize=CHUNK) if in_processes else map(_check, unchecked)
        how = {"total": len(new), "unit": "picture", "leave": False, "disable": None if new else True}
        results = tqdm(results, desc="checking pictures", **how)
        try:
            for index, (highest, problem) in zip(new, results, strict=True):
                if problem:
                    problems.append((index, problem))
                    good.pop(names[index], None)
                else:
                    good[names[index]] = (*states[index], highest)
        finally:  # what an interrupted run has checked is not checked again
            if new and remembered is not None:
                _remember(remembered, good)
    highest_of_all = max((good[name][2] for name in names if name in good), default=0)
    return next(white for white in WHITES if highest_of_all <= white), problems


def white_of(pictures: Sequence[Path], places: Sequence[str]) -> int:
    """Check `pictures` on all cores, and return what is white; `places` are what messages call them.

    Raises:
        PictureError: if some are broken; the message has a line for each, of the first ones.
    """
    remembered = Path(torch.hub.get_dir()).parent / "fused_sce" / "checked_pictures.json"  # beside torch's downloads
    white, problems = check_pictures(pictures, workers=os.cpu_count() or 1, remembered=remembered)
    if problems:
        more = [f"and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        lines = [f"{places[index]}: {problem}" for index, problem in problems[:MAX_SHOWN]]
        raise PictureError("\n".join(lines + more))
    return white


def _check(name: str) -> tuple[int, str]:
    """The highest value of a picture, and ""; or 0, and what is wrong with it."""
    try:
        with Image.open(name) as image:
            as_seen(image, WHITES[-1])
            return int(np.asarray(image).max()), ""
    except UnidentifiedImageError:
        return 0, "is no picture of a kind that Pillow can read" if os.path.getsize(name) else "the file is empty"
    except Image.DecompressionBombError:
        return 0, "has more pixels than Pillow reads: make it smaller"
    except PictureError as error:
        return 0, str(error)
    except Exception as error:  # Pillow raises many kinds on broken files, SyntaxError among them
        return 0, f"cannot be read: {error}"


def _state(name: str) -> tuple[int, int]:
    """Size and time of change of a file."""
    try:
        status = os.stat(name)
        return status.st_size, status.st_mtime_ns
    except OSError:
        return -1, -1  # which is never remembered, as the picture cannot be read


def _recall(remembered: Path | None) -> dict[str, tuple[int, int, int]]:
    """Of every good picture: size, time of change, and highest grey value."""
    try:
        entries = {} if remembered is None else json.loads(remembered.read_bytes())
        return {name: (int(size), int(changed), int(highest)) for name, (size, changed, highest) in entries.items()}
    except Exception:  # whatever it holds instead: everything is checked again
        return {}


def _remember(remembered: Path, good: dict[str, tuple[int, int, int]]) -> None:
    with suppress(OSError):
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(remembered, json.dumps(good).encode())


class LabelledPictures(Dataset[tuple[Tensor, Tensor]]):
    """N pictures and their `targets` (N, L) int8; `white` is what `check_pictures` returned.

    An item is a picture, (3, image_size, image_size) uint8, and its targets, (L,) int8. A picture is stretched to a
    square, so that nothing that a label refers to is cut away. An item raises PictureError if the picture cannot be
    read or shown (`as_seen`).
    """

    def __init__(self, pictures: Sequence[Path], targets: Tensor, image_size: int, white: int) -> None:
        self.pictures, self.targets = tuple(pictures), targets
        self._size, self._white = (image_size, image_size), white

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        try:
            with Image.open(self.pictures[index]) as image:
                seen = as_seen(image, self._white)
        except Exception as error:  # see _check
            raise PictureError(f"{self.pictures[index]}: {error}") from error
        pixels = np.array(seen.resize(self._size, Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels).permute(2, 0, 1), self.targets[index]
