"""The emoji pictures: what the packages hold ends in the CSV files, and nothing half done is left."""

from __future__ import annotations

import csv
import errno
import io
import json
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path

import emoji_pictures
import pytest

# One per picture, so that a picture under the name of another is found.
PNG = b"\x89PNG of "
HAND, LIGHT_HAND, HEART, KEY, UNKNOWN = "1F44B", "1F44B-1F3FB", "2764-FE0F", "1F511", "1F9FF"
EMOJIBASE = [
    {"hexcode": HAND, "emoji": "👋", "tags": ["hand", "good bye"], "skins": [{"hexcode": LIGHT_HAND}]},
    {"hexcode": "2764", "emoji": "❤️", "tags": ["love", "good bye"]},  # without U+FE0F
    {"hexcode": KEY, "emoji": "🔑", "tags": ["lock"]},
    {"hexcode": "1F1E6", "emoji": "🇦"},  # neither tags nor a picture
]
Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"", **fields: object) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def datasource(artist: str, *, without: str = "") -> list[Member]:
    """The files of an artist's package, whose picture of the code point `without` is not there."""

    def entry(code: str, unqualified: str | None = None) -> dict[str, object]:
        image = f"{code.lower()}.png"
        return {"unified": code, "non_qualified": unqualified, "image": image, f"has_img_{artist}": code != without}

    codes = [entry(HAND) | {"skin_variations": {"1F3FB": entry(LIGHT_HAND)}}, entry(HEART, "2764"), entry(KEY)]
    pictures = [code.lower() for code in (HAND, LIGHT_HAND, HEART, KEY, UNKNOWN) if code != without]
    return [
        member("package/emoji.json", json.dumps([*codes, entry(UNKNOWN)]).encode()),
        *(member(f"package/img/{artist}/64/{name}.png", PNG + f"{artist} {name}".encode()) for name in pictures),
        member(f"package/img/{artist}/sheets/64.png", b"not needed"),
    ]


def packages(*extra: Member) -> dict[str, list[Member]]:
    """The three packages; those in `extra` are in the first, too."""
    return {
        "emoji-datasource-google": [*datasource("google"), *extra],
        "emoji-datasource-twitter": datasource("twitter", without=KEY),
        "emojibase-data": [member("package/en/data.json", json.dumps(EMOJIBASE).encode())],
    }


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the only one on the path, that holds an `npm` that copies what `publish` has put beside it."""
    folder = tmp_path / "npm"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    script = folder / "npm"
    script.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {shlex.quote(str(folder / "calls"))}\n'
        f"exec /bin/cp {shlex.quote(str(folder))}/*.tgz .\n"
    )
    script.chmod(0o755)
    publish(folder, packages())
    return folder


def publish(folder: Path, contents: dict[str, list[Member]]) -> None:
    for name, members in contents.items():
        with tarfile.open(folder / f"{name}-{emoji_pictures.VERSIONS[name]}.tgz", "w:gz") as tar:
            for info, content in members:
                tar.addfile(info, io.BytesIO(content))


def rows(file: Path) -> list[list[str]]:
    with open(file, encoding="utf-8", newline="") as lines:
        return list(csv.reader(lines))


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the program says when it ends with status 2."""
    with pytest.raises(SystemExit) as caught:
        emoji_pictures.main([str(folder)])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_files(npm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "emoji"
    emoji_pictures.fetch(folder, min_pictures=2)
    tags = {"1f44b": ("hand|good bye", "👋"), "1f44b-1f3fb": ("hand|good bye", "👋"), "2764-fe0f": ("good bye", "❤️")}
    # A picture with rare tags only, and one that Emojibase does not know, show none of the labels.
    names = {"google": [*tags, "1f511", "1f9ff"], "twitter": [*tags, "1f9ff"]}  # twitter has no picture of the key
    tags |= {"1f511": ("", "🔑"), "1f9ff": ("", "1F9FF")}
    for artist in emoji_pictures.ARTISTS:
        header, *found = rows(folder / f"{artist}.csv")
        assert header == ["picture", "tags", "group"]
        assert sorted(found) == sorted([f"{artist}/{name}.png", *tags[name]] for name in names[artist])
        for name in names[artist]:
            assert (folder / artist / f"{name}.png").read_bytes() == PNG + f"{artist} {name}".encode()
    expected = {f"{artist}/{name}.png" for artist in emoji_pictures.ARTISTS for name in names[artist]}
    assert tree(folder) == expected | {"google", "google.csv", "twitter", "twitter.csv"}
    assert tree(folder.parent) == {"emoji"} | {f"emoji/{path}" for path in tree(folder)}
    printed = capsys.readouterr().out
    assert "2 tags, each on at least 2 pictures" in printed
    assert "google: 5 pictures, 2 of them with none" in printed
    assert "twitter: 4 pictures, 1 of them with none" in printed
    calls = (npm / "calls").read_text()
    assert all(f"{name}@{version}" in calls.split() for name, version in emoji_pictures.VERSIONS.items())


def test_a_tag_must_be_frequent_with_each_artist(npm: Path, tmp_path: Path) -> None:
    emoji_pictures.fetch(tmp_path / "emoji", min_pictures=1)
    tags = {tag for row in rows(tmp_path / "emoji/google.csv")[1:] for tag in row[1].split("|") if tag}
    assert tags == {"hand", "good bye", "love"}  # no lock: twitter has no picture of the key


def test_ten_pictures_unless_said_otherwise(npm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "emoji").mkdir()  # an empty folder may be there
    emoji_pictures.main([str(tmp_path / "emoji")])
    assert "at least 10 pictures" in capsys.readouterr().out
    assert {row[1] for row in rows(tmp_path / "emoji/google.csv")[1:]} == {""}


def test_a_second_run_fetches_nothing(npm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "emoji"
    emoji_pictures.fetch(folder, min_pictures=2)
    (npm / "npm").unlink()
    emoji_pictures.fetch(folder, min_pictures=2)
    assert "complete already" in capsys.readouterr().out
    (folder / "twitter.csv").unlink()
    before = tree(folder)
    assert "remove it" in refusal(folder, capsys)
    assert tree(folder) == before


@pytest.mark.parametrize("present", ["emoji", "emoji/google.csv", "emoji/holiday.png"])
def test_something_else_is_left_alone(
    present: str, npm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / present
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine\n")
    before = tree(tmp_path)
    said = refusal(tmp_path / "emoji", capsys)
    assert "holds something else, or not all" in said
    assert "name another" in said
    assert tree(tmp_path) == before
    assert file.read_text() == "mine\n"


def test_npm_is_missing(npm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (npm / "npm").unlink()
    before = tree(tmp_path)
    assert "install Node.js" in refusal(tmp_path / "new/emoji", capsys)
    assert tree(tmp_path) == before


def test_npm_fails(npm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (npm / "npm").write_text("#!/bin/sh\n: > half.tgz\necho npm error code ENOTFOUND >&2\nexit 1\n")
    before = tree(tmp_path)
    said = refusal(tmp_path / "emoji", capsys)
    assert "npm cannot fetch" in said
    assert "npm error code ENOTFOUND" in said
    assert tree(tmp_path) == before


def test_the_disk_is_full(
    npm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.parent.name == "twitter":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    before = tree(tmp_path)
    with pytest.raises(emoji_pictures.FetchError, match="No space left on device"):
        emoji_pictures.fetch(tmp_path / "emoji", min_pictures=2)
    assert tree(tmp_path) - {"npm/calls"} == before


def test_names_and_links_of_a_tar_file_lead_nowhere(npm: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_text("secret")
    place = "package/img/google/64/"
    publish(
        npm,
        packages(
            member("../x.png", b"x"),
            member(f"{tmp_path}/x.png", b"x"),
            member(f"{place}../../../../x.png", b"x"),
            member(f"{place}{tmp_path}/x.png", b"x"),
            member(f"{place}1f9fe.png", type=tarfile.SYMTYPE, linkname=str(secret)),
            member(f"{place}1f9fd.png", type=tarfile.LNKTYPE, linkname=f"{place}1f44b.png"),
            member("package/img/google", type=tarfile.SYMTYPE, linkname=str(tmp_path)),
        ),
    )
    before = tree(tmp_path)
    emoji_pictures.fetch(tmp_path / "emoji", min_pictures=2)
    made = {path for path in tree(tmp_path) - before if not path.startswith("npm/")}
    assert {Path(path).name for path in made} == {
        *("emoji", "google", "google.csv", "twitter", "twitter.csv"),
        *("1f44b.png", "1f44b-1f3fb.png", "2764-fe0f.png", "1f511.png", "1f9ff.png"),
    }
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def link_for_picture(npm: Path) -> None:
    hand = "package/img/google/64/1f44b.png"
    contents = packages(member(hand, type=tarfile.SYMTYPE, linkname="/etc/hostname"))
    contents["emoji-datasource-google"] = [
        (info, content) for info, content in contents["emoji-datasource-google"] if info.name != hand or info.issym()
    ]
    publish(npm, contents)


def cut_short(npm: Path) -> None:
    (package,) = npm.glob("emoji-datasource-twitter-*")
    package.write_bytes(package.read_bytes()[:-200])


def no_tar_file(npm: Path) -> None:
    (package,) = npm.glob("emojibase-data-*")
    package.write_text("<html>")


def not_there(npm: Path) -> None:
    (package,) = npm.glob("emojibase-data-*")
    package.unlink()


def no_json(npm: Path) -> None:
    publish(npm, {"emojibase-data": [member("package/en/data.json", b"<html>")]})


@pytest.mark.parametrize("spoil", [link_for_picture, cut_short, no_tar_file, not_there, no_json])
def test_a_spoilt_package_leaves_nothing(
    spoil: Callable[[Path], None], npm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(npm)
    before = tree(tmp_path)
    assert "cannot be made" in refusal(tmp_path / "emoji", capsys)
    assert tree(tmp_path) - {"npm/calls"} == before
