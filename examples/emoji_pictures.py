"""Two artists' pictures of the same emoji, with tags: small colour pictures of hundreds of labels.

    python examples/emoji_pictures.py FOLDER

fetches three packages with `npm pack` (140 MB) and writes pictures of 64x64 pixels into FOLDER/google and
FOLDER/twitter, and what they show into FOLDER/google.csv and FOLDER/twitter.csv, one picture a row:

    picture,tags,group
    google/1f44b-1f3fb.png,hand|ttyl|you,👋

The tags are those that at least ten pictures of each artist have. The pictures of a group show one emoji in
several skin tones: a fair split puts them all on one side. Or train on one artist's pictures, test on the other's.
Licences: Google's pictures (Noto Emoji) Apache 2.0, Twitter's (Twemoji) CC-BY 4.0, tags (Emojibase) MIT.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ARTISTS = ("google", "twitter")
VERSIONS = {"emoji-datasource-google": "16.0.0", "emoji-datasource-twitter": "16.0.0", "emojibase-data": "17.0.0"}


class FetchError(Exception):
    """The pictures cannot be had; the message says why, and what would help."""


def fetch(folder: Path, min_pictures: int = 10) -> None:
    """Make `folder`, with the tags that at least `min_pictures` pictures of each artist have, unless it is complete.

    Raises FetchError if it cannot be made; then it is as it was.
    """
    folder = folder.resolve()
    try:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            if not all((folder / f"{artist}.csv").is_file() for artist in ARTISTS):
                raise FetchError(f"{folder} holds something else, or not all: remove it, or name another")
            print(f"{folder} is complete already")
            return
        npm = shutil.which("npm")
        if npm is None:
            raise FetchError("npm fetches the pictures, and it is not installed: install Node.js, which brings it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, so that it can become the folder in one step.
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as temporary:
            packages, new = Path(temporary), Path(temporary) / "new"
            pack = [npm, "pack", "--loglevel=error", *(f"{name}@{version}" for name, version in VERSIONS.items())]
            print(" ".join(pack), flush=True)
            result = subprocess.run(pack, cwd=packages, capture_output=True, encoding="utf-8", errors="replace")
            if result.returncode != 0:
                words = " ".join(result.stderr.splitlines()[:4])  # a stack trace follows
                raise FetchError(f"npm cannot fetch the packages; is the network up, the disk full? It says: {words}")
            write_pictures(packages, new, min_pictures)
            new.replace(folder)
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError) as error:  # the disk, or a package
        raise FetchError(f"{folder} cannot be made: {type(error).__name__}: {error}") from error


def read_package(folder: Path, name: str, wanted: str) -> dict[str, bytes]:
    """The plain files of a package whose paths match `wanted`. None is unpacked where the tar file says."""
    with tarfile.open(folder / f"{name}-{VERSIONS[name]}.tgz") as tar:
        files = ((member.name, tar.extractfile(member)) for member in tar if member.isfile())
        return {path: file.read() for path, file in files if file is not None and re.fullmatch(wanted, path)}


def write_pictures(packages: Path, folder: Path, min_pictures: int) -> None:
    """Make `folder` from the tar files in `packages`."""
    (data,) = read_package(packages, "emojibase-data", r"package/en/data\.json").values()
    # The skin tones of an emoji are its group and have its tags.
    emoji = {tone["hexcode"]: base for base in json.loads(data) for tone in (base, *base.get("skins", ()))}
    rows: dict[str, list[tuple[str, list[str], str]]] = {artist: [] for artist in ARTISTS}  # path, tags, group
    contents: dict[str, bytes] = {}
    for artist in ARTISTS:
        place = f"package/img/{artist}/64/"
        files = read_package(packages, f"emoji-datasource-{artist}", rf"package/emoji\.json|{place}[0-9a-f-]+\.png")
        bases = json.loads(files["package/emoji.json"])
        for tone in (tone for base in bases for tone in (base, *base.get("skin_variations", {}).values())):
            if tone[f"has_img_{artist}"]:
                # Some of Emojibase's codes lack U+FE0F, which asks for a picture in place of text.
                entry = emoji.get(tone["unified"]) or emoji.get(tone["non_qualified"], {})
                path = f"{artist}/{tone['image']}"
                rows[artist].append((path, entry.get("tags", []), entry.get("emoji", tone["unified"])))
                contents[path] = files[place + tone["image"]]
    counts = [Counter(tag for _, tags, _ in rows[artist] for tag in tags) for artist in ARTISTS]
    kept = {tag for tag in counts[0] if min(count[tag] for count in counts) >= min_pictures}
    print(f"{len(kept)} tags, each on at least {min_pictures} pictures of each artist")
    for artist in ARTISTS:
        lines = [(path, "|".join(filter(kept.__contains__, tags)), group) for path, tags, group in rows[artist]]
        (folder / artist).mkdir(parents=True)
        for path, *_ in lines:
            (folder / path).write_bytes(contents[path])
        with open(folder / f"{artist}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("picture", "tags", "group"), *lines])
        print(f"{artist}: {len(lines)} pictures, {sum(not tags for _, tags, _ in lines)} of them with none of the tags")


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch into the folder that `arguments` name, the command line's if None; exit with status 2 if that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="gets the pictures and the CSV files")
    try:
        fetch(parser.parse_args(arguments).folder)
    except FetchError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
