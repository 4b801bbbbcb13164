"""Paths that may name anything: one sentence, and nobody waits."""

import errno
import os
import re
import signal
import socket
from pathlib import Path

import pytest

from i2am.files import (
    FileRejected,
    FileTooLarge,
    open_regular,
    read_bytes,
    read_json,
    sha256_of_file,
)
from i2am.files import regular as module

READERS = pytest.mark.parametrize("read", [open_regular, read_bytes, read_json, sha256_of_file])


@pytest.fixture(autouse=True)
def _no_hang():
    def stop(number, frame):
        raise TimeoutError("it waits")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def folder(path):
    path.mkdir()


def fifo(path):
    os.mkfifo(path)


def unix_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # its address may have no more than 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def link_to(target):
    return lambda path: path.symlink_to(target)


@READERS
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (folder, "is a folder, a file was expected"),
        (link_to("/"), "is a folder, a file was expected"),
        (fifo, "must be a regular file, it is a pipe or a device"),
        (unix_socket, "must be a regular file, it is a pipe or a device"),
        (link_to("/dev/zero"), "must be a regular file, it is a pipe or a device"),
    ],
    ids=["folder", "link to a folder", "fifo", "socket", "endless device"],
)
def test_what_is_no_regular_file_is_refused(tmp_path, read, make, message):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(FileRejected, match=f"^{re.escape(str(path))} {message}") as caught:
        read(path)
    assert not isinstance(caught.value, FileTooLarge)


@READERS
@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, errno.ENOENT),
        (link_to("nothing"), errno.ENOENT),
        (link_to("thing"), errno.ENOENT),
        (link_to("../none/thing"), errno.ENOENT),
        (link_to("/dev/null/thing"), errno.ENOTDIR),
    ],
    ids=[
        "nothing",
        "dangling link",
        "link to itself",
        "link to no folder",
        "link through a device",
    ],
)
def test_what_is_not_there_is_an_error_of_the_system(tmp_path, read, make, code):
    make(tmp_path / "thing")
    with pytest.raises(OSError, match="thing") as caught:
        read(tmp_path / "thing")
    assert caught.value.errno == code


@pytest.mark.parametrize("make", [fifo, folder])
def test_what_takes_the_place_of_a_file_while_it_is_opened(tmp_path, monkeypatch, make):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    opened = os.open

    def replace(*arguments):
        path.unlink()
        make(path)
        return opened(*arguments)

    monkeypatch.setattr(os, "open", replace)
    # a folder cannot be opened as a file at all
    with pytest.raises(FileRejected if make is fifo else IsADirectoryError):
        read_bytes(path)


def test_a_file_that_vanishes_while_it_is_opened(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    check = module._check_regular
    monkeypatch.setattr(module, "_check_regular", lambda *_: (check(*_), path.unlink()))
    with pytest.raises(FileNotFoundError, match="file"):
        read_bytes(path)


def test_a_refused_file_is_closed(tmp_path):
    (tmp_path / "file").write_bytes(bytes(11))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(FileTooLarge):
            open_regular(tmp_path / "file", limit=10)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 6 * 10**12)
    for read in (open_regular, read_bytes, read_json):
        with pytest.raises(
            FileTooLarge,
            match=r"^the thing must have at most 1,000 bytes, it has 6,000,000,000,000",
        ):
            read(path, what="the thing", limit=1000)
    with open_regular(path) as file:
        assert file.read(3) == bytes(3)


def test_the_limit_itself_is_allowed(tmp_path):
    (tmp_path / "file").write_bytes(b"1234567890")
    assert read_bytes(tmp_path / "file", limit=10) == b"1234567890"
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(str(tmp_path / "link"), limit=10) == b"1234567890"


def test_content_of_many_sizes(tmp_path):
    path = Path(tmp_path / "file")
    for size in (0, 1, 65536, 10_000_019):
        data = os.urandom(size)
        path.write_bytes(data)
        assert read_bytes(path) == data
