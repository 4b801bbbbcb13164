"""Who writes to a folder; leftovers go when nobody else does."""

import os
import signal
from contextlib import suppress

import pytest

from i2am.files import FolderLock
from i2am.files.atomic import temporary_name


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    return folder


def leave(folder):
    """Leftovers: a file, a folder with something in it, and one in an inner folder."""
    paths = [folder / temporary_name(), folder / temporary_name()]
    paths.append(folder / "inner" / temporary_name())
    paths[0].write_bytes(b"half")
    (paths[1] / "a" / "b").mkdir(parents=True)
    (paths[1] / "a" / "file").write_bytes(b"half")
    paths[2].touch()
    return paths


def lock(folder):
    return FolderLock(folder / "run.json", clean=(folder, folder / "inner"))


@pytest.fixture
def other():
    """Starts a process that holds a lock, and returns how to end it."""
    children = []

    def start(folder):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            with suppress(BaseException):
                held = lock(folder)
                os.write(writer, b"x")
                signal.pause()
                del held
            os._exit(0)
        children.append(child)
        os.close(writer)
        assert os.read(reader, 1) == b"x"
        os.close(reader)

        def end():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            children.remove(child)

        return end

    yield start
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_leftovers_go_and_nothing_else(folder):
    paths = leave(folder)
    kept = [".i2am-0123456789abcdef.tmp2", ".i2am-0123456789ABCDEF.tmp", ".i2am-1.tmp", "x.tmp"]
    for name in kept:
        (folder / name).touch()
    held = lock(folder)
    assert not any(path.exists() for path in paths)
    assert sorted(os.listdir(folder)) == sorted([*kept, "inner", "run.json"])
    assert (folder / "run.json").read_text() == "{}"
    del held


def test_leftovers_stay_while_another_process_writes(folder, other):
    end = other(folder)
    paths = leave(folder)
    # both may write
    first = lock(folder)
    assert all(path.exists() for path in paths)
    end()
    # this process itself does not stop a second one
    del first
    second = lock(folder)
    assert not any(path.exists() for path in paths)
    del second


def test_a_killed_process_holds_nothing(folder, other):
    other(folder)()
    paths = leave(folder)
    held = lock(folder)
    assert not any(path.exists() for path in paths)
    del held


def test_a_link_named_like_a_leftover_is_not_followed(folder, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    names = [temporary_name() for _ in range(3)]
    (folder / names[0]).symlink_to(mine)
    (folder / names[1]).symlink_to(mine / "thesis.tex")
    (folder / names[2]).symlink_to("nothing")
    (folder / temporary_name()).mkdir()
    inside = folder / temporary_name()
    inside.mkdir()
    (inside / "link").symlink_to(mine)
    held = lock(folder)
    assert sorted(os.listdir(folder)) == ["inner", "run.json"]
    assert (mine / "thesis.tex").read_text() == "mine"
    del held


def test_a_fifo_named_like_a_leftover(folder):
    os.mkfifo(folder / temporary_name())
    held = lock(folder)
    assert sorted(os.listdir(folder)) == ["inner", "run.json"]
    del held


def test_a_lock_that_fails_is_let_go(folder, other):
    with pytest.raises(FileNotFoundError):
        FolderLock(folder / "run.json", clean=(folder / "none",))
    paths = leave(folder)
    other(folder)
    # that process was alone
    assert not any(path.exists() for path in paths)


def test_a_file_that_is_not_there(folder):
    with pytest.raises(FileNotFoundError):
        FolderLock(folder / "none", clean=(folder,))
    assert not (folder / "none").exists()
