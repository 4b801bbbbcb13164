"""SHA-256 of files and folders: what it depends on, and on nothing else."""

import hashlib
import os
import re

import pytest

from i2am.files import FileRejected, digests_of, is_listed, sha256_of_file, sha256_of_folder


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "b" / "c").mkdir(parents=True)
    for name in ("a.txt", "b/a", "b/c/z", "b.txt"):
        (folder / name).write_text(f"content of {name}")
    return folder


def test_a_file(tmp_path):
    data = os.urandom(10_000_000)
    (tmp_path / "file").write_bytes(data)
    pieces = []
    found = sha256_of_file(tmp_path / "file", progress=pieces.append)
    assert found == hashlib.sha256(data).hexdigest()
    assert sum(pieces) == len(data)
    assert len(pieces) > 1


def test_what_a_manifest_lists(folder):
    assert digests_of(folder, ["b/a"]) == {
        "b/a": {"bytes": 14, "sha256": hashlib.sha256(b"content of b/a").hexdigest()}
    }
    with pytest.raises(FileNotFoundError):
        digests_of(folder, ["none"])


def test_whether_a_file_is_the_listed_one(folder):
    entry = digests_of(folder, ["a.txt"])["a.txt"]
    path = folder / "a.txt"
    assert is_listed(path, entry)
    assert is_listed(path, {**entry, "more": 1})
    path.write_text("content of b.txt")
    assert not is_listed(path, entry)
    os.truncate(path, 10**12)
    # at once: that much is not read
    assert not is_listed(path, entry)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        is_listed(path, entry)
    os.mkfifo(path)
    with pytest.raises(FileRejected, match="must be a regular file"):
        is_listed(path, entry)


def test_a_folder_by_hand(folder):
    lines = [
        f"{name}\0{hashlib.sha256(f'content of {name}'.encode()).hexdigest()}\n"
        for name in ("a.txt", "b/a", "b/c/z", "b.txt")
    ]
    expected = {hashlib.sha256("".join(lines).encode()).hexdigest()}
    assert {sha256_of_folder(folder)} == expected


def test_the_same_wherever_it_lies(folder, tmp_path, monkeypatch):
    before = sha256_of_folder(folder)
    (tmp_path / "link").symlink_to(folder)
    assert sha256_of_folder(tmp_path / "link") == before
    monkeypatch.chdir(folder / "b")
    assert sha256_of_folder(folder / "b" / "..") == before
    monkeypatch.chdir(tmp_path)
    moved = folder.rename(tmp_path / "a name that is longer and sorts otherwise")
    assert sha256_of_folder(moved) == before
    (moved / "empty").mkdir()
    os.utime(moved / "a.txt", (0, 0))
    assert sha256_of_folder(moved.relative_to(tmp_path)) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "b" / "c" / "z").write_text("content of b/c/y"),
        lambda folder: (folder / "a.txt").rename(folder / "c.txt"),
        lambda folder: (folder / "b" / "a").rename(folder / "a"),
        lambda folder: (folder / "b.txt").unlink(),
        lambda folder: (folder / "new").touch(),
    ],
)
def test_what_changes_it(folder, change):
    before = sha256_of_folder(folder)
    change(folder)
    assert sha256_of_folder(folder) != before


def test_links_stand_for_what_they_lead_to(folder, tmp_path):
    before = sha256_of_folder(folder)
    (folder / "b").rename(tmp_path / "elsewhere")
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "a.txt").rename(tmp_path / "file")
    (folder / "a.txt").symlink_to("../file")
    assert sha256_of_folder(folder) == before
    (tmp_path / "elsewhere" / "c" / "z").write_text("changed behind a link to a folder")
    changed = sha256_of_folder(folder)
    assert changed != before
    (tmp_path / "file").write_text("changed behind a link to a file")
    assert sha256_of_folder(folder) not in (before, changed)


def test_one_folder_that_is_linked_twice_is_no_cycle(folder, tmp_path):
    for name in ("one", "two"):
        (folder / name).symlink_to("b")
    other = tmp_path / "other"
    other.mkdir()
    (other / "up").symlink_to(folder)
    assert len({sha256_of_folder(folder), sha256_of_folder(other)}) == 2


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_cycle_is_refused(folder, target):
    (folder / "b" / "again").symlink_to(target)
    with pytest.raises(FileRejected, match=re.escape("leads back to a folder that holds it")):
        sha256_of_folder(folder)


def test_what_is_no_file_is_left_out(folder):
    before = sha256_of_folder(folder)
    os.mkfifo(folder / "fifo")
    (folder / "dangling").symlink_to("nothing")
    (folder / "itself").symlink_to("itself")
    (folder / "device").symlink_to("/dev/zero")
    assert sha256_of_folder(folder) == before


def test_names_that_are_no_utf_8(folder):
    before = sha256_of_folder(folder)
    (folder / os.fsdecode(b"\xff")).touch()
    one = sha256_of_folder(folder)
    (folder / os.fsdecode(b"\xff")).rename(folder / os.fsdecode(b"\xfe"))
    assert len({before, one, sha256_of_folder(folder)}) == 3


def test_what_is_no_folder(folder):
    with pytest.raises(NotADirectoryError):
        sha256_of_folder(folder / "a.txt")
    with pytest.raises(FileNotFoundError):
        sha256_of_folder(folder / "none")
