"""Faults while a run is written: processes killed, disks that fail, power that is lost.

At every operation on a file, one after the other, until none is left to go wrong.
"""

import builtins
import errno
import fcntl
import io
import os
import random
import shutil
import signal
from contextlib import ExitStack, suppress
from functools import partial
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from i2am.evaluation.store import Store, StoreError
from i2am.evaluation.testing import make_plan, make_shard
from i2am.files.atomic import is_temporary

PLAN = make_plan(pairs=4, shard=2, settings=("paired",))
SHARDS = [make_shard(PLAN, number=0, failed=1), make_shard(PLAN, number=1, undefined=0)]
CALLS = ("open", "fsync", "replace", "link", "unlink", "mkdir", "listdir", "scandir")


def work(folder, acknowledge=lambda number: None):
    """Makes a run or goes on with it, and commits what is not there yet."""
    store = Store.create(folder, PLAN)
    for shard, images in SHARDS:
        if shard.number not in store.committed("paired"):
            store.commit(shard, images)
            acknowledge(shard.number)


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    work(folder)
    assert len(files(folder)) == 10
    return files(folder)


def check(folder, acknowledged, reference):
    """What was acknowledged is there, what is there is whole, and going on makes it complete."""
    if acknowledged or (folder / "run.json").exists():
        store = Store.open(folder)
        committed = store.committed("paired")
        # in this order they were committed, and one may have been on its way
        assert committed in ({*range(len(acknowledged))}, {*range(len(acknowledged) + 1)})
        assert store.verify() == []
        assert not any(store.check_headers().values())
    work(folder)
    assert files(folder) == reference


class Operations(ExitStack):
    """Calls `happens(name, call)` in place of each operation on a file in its block."""

    def __init__(self, happens):
        super().__init__()
        self.happens = happens

    def __enter__(self):
        for module, name in (*((os, name) for name in CALLS), (fcntl, "flock")):
            label = "os.open" if name == "open" else name
            self._replace(module, name, partial(self._call, label, getattr(module, name)))
        for module in (builtins, io):
            self._replace(module, "open", partial(self._open, builtins.open))
        return super().__enter__()

    def _replace(self, module, name, call):
        self.enter_context(mock.patch.object(module, name, call))

    def _call(self, name, function, *arguments, **options):
        return self.happens(name, partial(function, *arguments, **options))

    def _open(self, function, path, mode="r", *arguments, **options):
        file = self._call(f"open {mode}", function, path, mode, *arguments, **options)
        return File(file, self._call)


class File:
    """An open file whose reads and writes are operations."""

    def __init__(self, file, call):
        self.file, self.call = file, call

    def __getattr__(self, name):
        function = getattr(self.file, name)
        is_operation = name in ("read", "write", "flush")
        return partial(self.call, name, function) if is_operation else function

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


class Strike:
    """Lets the n-th operation go wrong, once."""

    def __init__(self, number, wrong):
        self.left, self.wrong, self.name = number, wrong, None

    def __call__(self, name, call):
        self.left -= 1
        if self.left:
            return call()
        self.name = name
        if name == "write":
            # half of it arrives
            (data,) = call.args
            call.func(data[: len(data) // 2])
        return self.wrong(call)


# Processes that are killed


def kill_before(call):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(call):
    try:
        call()
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def work_in_child(folder, strike):
    """Numbers acknowledged by a process that may be killed, and whether it was."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException), Operations(strike):
            work(folder, lambda number: os.write(writer, bytes([number])))
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        return [*pipe.read()], os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [kill_before, kill_after])
def test_killed_at_every_operation(tmp_path, reference, wrong):
    number, seen = 0, []
    while True:
        number += 1
        folder = tmp_path / f"{number}"
        acknowledged, killed = work_in_child(folder, Strike(number, wrong))
        if not killed:
            break
        seen.append(acknowledged)
        check(folder, acknowledged, reference)
        shutil.rmtree(folder)
    # no fault was left to fire, and they fired before, between and after the commits
    assert files(folder) == reference
    assert number > 70
    assert [] in seen
    assert [0] in seen
    assert [0, 1] not in seen


# Disks that fail


@pytest.mark.slow
@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get
)
def test_an_error_at_every_operation(tmp_path, reference, code):
    def fail(call):
        raise OSError(code, os.strerror(code))

    number, names = 0, set()
    while True:
        number += 1
        folder = tmp_path / f"{number}"
        strike, acknowledged = Strike(number, fail), []
        raised = None
        try:
            with Operations(strike):
                work(folder, acknowledged.append)
        except OSError as error:
            raised = error
        if strike.name is None:
            break
        if raised is None:
            # without locks it goes on, only cannot tidy up; and a folder may be there already
            assert strike.name in ("flock", "mkdir")
        else:
            assert raised.errno == code
            assert raised.strerror.startswith(os.strerror(code))
        names.add(strike.name)
        left = [path for path in folder.rglob("*") if is_temporary(path.name)]
        assert not left or strike.name == "unlink"
        check(folder, acknowledged, reference)
        shutil.rmtree(folder)
    assert files(folder) == reference
    assert number > 70
    assert names == {
        *("open rb", "open xb", "read", "write", "flush", "fsync", "replace", "link", "unlink"),
        *("mkdir", "listdir", "scandir", "os.open", "flock"),
    }


def test_a_full_disk_is_told_with_what_is_needed(tmp_path, monkeypatch):
    store = Store.create(tmp_path / "run", PLAN)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left .*; shard 0 of paired with its .* 0\.0 MB"):
        store.commit(*SHARDS[0])
    assert store.committed("paired") == set()


# Power that is lost


class Disk:
    """What is on a disk, and what of it would still be there without power.

    Contents of files and names in folders are kept apart: each lasts once it was synced, and until
    then any of its states since may be found.
    """

    def __init__(self, root, *, sync_files=True, sync_folders=True):
        self.root, self.syncs = root, {"file": sync_files, "folder": sync_folders}
        self.names = {str(root): {}}
        """By folder and name: what it may stand for, a file's number or a folder's path."""
        self.contents = []
        """By number of a file: bytes that it may hold."""
        self.handles = {}
        self.acknowledged = []
        self.states = []

    def happens(self, name, call):
        result = call()
        if name == "open xb":
            self.contents.append([b""])
            self._bind(call.args[0], len(self.contents) - 1)
            self.handles[result.fileno()] = len(self.contents) - 1
        elif name == "os.open":
            self.handles[result] = str(call.args[0])
        elif name == "mkdir":
            self.names[str(call.args[0])] = {}
            self._bind(call.args[0], str(call.args[0]))
        elif name == "write":
            data = bytes(call.args[0])
            self.contents[-1] += [bytes(len(data)), data[: len(data) // 2], data]
        elif name == "fsync":
            self._sync(self.handles[call.args[0]])
        elif name in ("replace", "link"):
            self._bind(call.args[1], self._find(call.args[0]))
        if name in ("replace", "unlink"):
            self._bind(call.args[0], None)
        self.remember()
        return result

    def remember(self):
        names = {
            folder: {name: [*states] for name, states in found.items()}
            for folder, found in self.names.items()
        }
        contents = [[*states] for states in self.contents]
        self.states.append((names, contents, [*self.acknowledged]))

    def acknowledge(self, number):
        self.acknowledged.append(number)
        self.remember()

    def _find(self, path):
        folder, name = os.path.split(path)
        return self.names[folder][name][-1]

    def _bind(self, path, what):
        folder, name = os.path.split(path)
        self.names[folder].setdefault(name, [None]).append(what)

    def _sync(self, what):
        if isinstance(what, int):
            if self.syncs["file"]:
                del self.contents[what][:-1]
        elif what in self.names and self.syncs["folder"]:
            for states in self.names[what].values():
                del states[:-1]


def left_without_power(state, choose, root, target):
    """Builds what a disk holds, where `choose` takes one of several possible states."""
    names, contents, acknowledged = state
    found = [choose(states) for states in contents]

    def build(folder, path):
        path.mkdir()
        for name, states in names[folder].items():
            what = choose(states)
            if isinstance(what, int):
                (path / name).write_bytes(found[what])
            elif what is not None:
                build(what, path / name)

    build(str(root), target)
    return acknowledged


def recorded(tmp_path, **options):
    disk = Disk(tmp_path / "disk", **options)
    disk.root.mkdir()
    with Operations(disk.happens):
        work(disk.root / "run", disk.acknowledge)
    return disk


def first(states):
    return states[0]


def last(states):
    return states[-1]


def oldest_content_with_newest_names(states):
    return states[0] if isinstance(states[0], bytes) else states[-1]


CHOICES = [first, last, oldest_content_with_newest_names]


@pytest.mark.slow
@pytest.mark.parametrize("choose", CHOICES)
def test_power_lost_after_every_operation(tmp_path, reference, choose):
    disk = recorded(tmp_path)
    assert disk.acknowledged == [0, 1]
    assert len(disk.states) > 50
    for number, state in enumerate(disk.states):
        target = tmp_path / f"{number}"
        acknowledged = left_without_power(state, choose, disk.root, target)
        check(target / "run", acknowledged, reference)
        shutil.rmtree(target)


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32 - 1))
def test_power_lost_with_anything_unsynced_found(tmp_path_factory, disk_of_a_run, reference, seed):
    chance = random.Random(seed)
    state = chance.choice(disk_of_a_run.states)
    target = tmp_path_factory.mktemp("loss") / "disk"
    acknowledged = left_without_power(state, chance.choice, disk_of_a_run.root, target)
    check(target / "run", acknowledged, reference)


@pytest.fixture(scope="module")
def disk_of_a_run(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["sync_files", "sync_folders"])
def test_the_disk_of_these_tests_forgets_what_is_not_synced(tmp_path, reference, missing):
    disk = recorded(tmp_path, **{missing: False})

    def is_lost(number, choose):
        target = tmp_path / f"{number} {choose.__name__}"
        state = left_without_power(disk.states[number], choose, disk.root, target)
        try:
            check(target / "run", state, reference)
        except (AssertionError, StoreError):
            return True
        return False

    assert any(is_lost(number, choose) for number in range(len(disk.states)) for choose in CHOICES)


# Two processes that write the same


def test_two_processes_with_the_same_shards(tmp_path, reference):
    for attempt in range(8):
        folder, children = tmp_path / f"{attempt}", []
        for _ in range(3):
            children.append(os.fork())
            if not children[-1]:
                with suppress(BaseException):
                    store = Store.create(folder, PLAN)
                    for shard, images in SHARDS:
                        store.commit(shard, images)
                    os._exit(0)
                os._exit(1)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        assert files(folder) == reference
