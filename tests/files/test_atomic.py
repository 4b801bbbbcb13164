"""Files that appear whole or not at all; see also test_faults.py."""

import os

import pytest

from i2am.files import write


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["io", "ctrl-c"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, error):
    path = tmp_path / "maps"
    path.write_bytes(b"old")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


def test_the_order_is_write_sync_rename_sync_folder(tmp_path, monkeypatch):
    path, calls = tmp_path / "maps", []
    fsync, rename = os.fsync, os.replace

    def record_fsync(descriptor):
        is_folder = os.path.samestat(os.fstat(descriptor), tmp_path.stat())
        calls.append("sync folder" if is_folder else "sync")
        fsync(descriptor)

    def record_replace(source, target):
        calls.append(f"rename {os.path.getsize(source)}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write(path, b"12345")
    assert calls == ["sync", "rename 5", "sync folder"]
    assert path.read_bytes() == b"12345"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / "maps", b"")
