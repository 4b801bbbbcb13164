"""Faults at every operation on files: disks that fail, processes killed, power that is lost."""

import errno
import os
import random
import shutil
from contextlib import suppress
from functools import cache, partial
from itertools import count
from unittest import mock

import pytest
from faults import (
    CHOICES,
    CODES,
    Disk,
    Operations,
    contents,
    each_error,
    each_kill,
    kill_after,
    kill_before,
    left_without_power,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from i2am.files import (
    FolderLock,
    append,
    fresh_folder,
    publish,
    replaced_folder,
    write,
    write_together,
)
from i2am.files.atomic import is_temporary, temporary_name

NEW = b"new content"
PIECES = [NEW[:2], memoryview(NEW)[2:7], NEW[7:]]
OUT = f"parent{os.sep}out"
# removing what is not needed any more
TIDYING = frozenset({"unlink", "rmdir", "scandir", "os.open"})


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    # the disk of this machine loses nothing here, and waiting for it takes most of the time
    monkeypatch.setattr(os, "fsync", os.fstat)


# What is done to a folder, and what may be found in it then


class Job:
    """Operations on files that lead from one state of a folder to another one.

    Attributes:
        begin: Files before, by path.
        end: Files after.
        old: Files of the folder that is replaced, as seen from it.
        silent: Operations whose failure need not be told.
    """

    silent = frozenset()

    def __init__(self, begin, end, do):
        foreign = {"foreign": b"1", "parent/foreign": b"2"}
        self.begin, self.end, self.do = {**foreign, **begin}, {**foreign, **end}, do
        self.old = {
            os.path.relpath(name, OUT): data for name, data in begin.items() if name.startswith(OUT)
        }

    def prepare(self, folder):
        for name, data in self.begin.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    def check(self, folder, *, loss=False):
        """What is there may be there, and another attempt ends well."""
        final, temporary = apart(folder)
        self.check_state(final, temporary, loss)
        self.do(folder)
        assert apart(folder)[0] == self.end

    def check_state(self, final, temporary, loss):
        assert final in (self.begin, self.end)


class Together(Job):
    def check_state(self, final, temporary, loss):
        new = [final.get(name) == data for name, data in self.end.items()]
        old = [final.get(name) == self.begin.get(name) for name in self.end]
        assert all(map(max, new, old))
        # in this order; a disk without power may know another one
        assert loss or final in [
            {**self.begin, **dict([*self.end.items()][:number])} for number in range(len(new) + 1)
        ]


class Append(Job):
    def check(self, folder, *, loss=False):
        before, _ = apart(folder)
        # a line may be cut short, or zeros without power; the ones before it stay
        assert before.keys() == self.begin.keys()
        assert before["a"].startswith(self.begin["a"])
        assert loss or self.end["a"].startswith(before["a"])
        self.do(folder)
        added = self.end["a"].removeprefix(self.begin["a"])
        assert apart(folder)[0] == {**before, "a": before["a"] + added}


class Overwrite(Job):
    silent = TIDYING

    def check_state(self, final, temporary, loss):
        if not any(name.startswith(OUT) for name in final):
            # between two renames
            assert self.old in temporary
            final |= {os.path.join(OUT, name): data for name, data in self.old.items()}
        super().check_state(final, temporary, loss)


class Lock(Job):
    silent = frozenset({"flock"})
    left_over = temporary_name()

    def prepare(self, folder):
        super().prepare(folder)
        (folder / self.left_over / "inner").mkdir(parents=True)
        for name in (f"{self.left_over}/inner/file", f"parent/{self.left_over}"):
            (folder / name).write_bytes(b"left over")

    def check(self, folder, *, loss=False):
        super().check(folder, loss=loss)
        assert not apart(folder)[1]


def apart(folder):
    """Files by name without those in something temporary, and what is in each of these."""
    final, temporary = {}, {}
    for path, data in contents(folder).items():
        parts = path.split(os.sep)
        depth = next((at for at, part in enumerate(parts) if is_temporary(part)), None)
        if depth is None:
            final |= {path: data} if data is not None else {}
        else:
            inside = temporary.setdefault(os.sep.join(parts[: depth + 1]), {})
            inside |= {os.sep.join(parts[depth + 1 :]): data} if data is not None else {}
    return final, [*temporary.values()]


def publish_without_links(folder):
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    with mock.patch.object(os, "link", link):
        publish(folder / "a", PIECES)


def build(make, folder):
    with make(folder / OUT) as inner:
        (inner / "x").mkdir()
        for name in ("x/y", "run.json"):
            with open(inner / name, "wb") as file:
                file.write(BUILT[f"{OUT}/{name}"])


BUILT = {f"{OUT}/run.json": b'{"files": ["x/y"]}', f"{OUT}/x/y": NEW}
EARLIER = {f"{OUT}/run.json": b'{"files": ["o/a", "o/b"]}', f"{OUT}/o/a": b"A", f"{OUT}/o/b": b"B"}
TOGETHER = {"b": PIECES, "a": b"new a", "c": b""}
write_a = lambda folder: write(folder / "a", PIECES)  # noqa: E731
publish_a = lambda folder: publish(folder / "a", PIECES)  # noqa: E731
fresh = partial(build, partial(fresh_folder, overwrite=True))

JOBS = {
    "write": Job({}, {"a": NEW}, write_a),
    "write-again": Job({"a": b"old"}, {"a": NEW}, write_a),
    "write-together": Together(
        {"b": b"old b", "a": b"old a"},
        {"b": NEW, "a": b"new a", "c": b""},
        lambda folder: write_together(folder, TOGETHER),
    ),
    "publish": Job({}, {"a": NEW}, publish_a),
    "publish-second": Job({"a": b"first"}, {"a": b"first"}, publish_a),
    "publish-without-links": Job({}, {"a": NEW}, publish_without_links),
    "append": Append(
        {"a": b"one\n"},
        {"a": b"one\ntwo\nthree\n"},
        lambda folder: append(folder / "a", "two\nthree\n"),
    ),
    "fresh-folder": Job({}, BUILT, fresh),
    "overwritten-folder": Overwrite(EARLIER, BUILT, fresh),
    "replaced-folder": Overwrite(
        {**EARLIER, f"{OUT}/anything": b"?"}, BUILT, partial(build, replaced_folder)
    ),
    "lock": Lock(
        {"run.json": b"{}", ".i2am-00.tmp": b"3"},
        {"run.json": b"{}", ".i2am-00.tmp": b"3"},
        lambda folder: FolderLock(folder / "run.json", clean=(folder, folder / "parent")) and None,
    ),
}
ALL_JOBS = pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)


@pytest.fixture
def make(tmp_path):
    """Makes a folder in the state before a job."""
    numbers = count()

    def made(job):
        folder = tmp_path / f"{next(numbers)}"
        folder.mkdir()
        job.prepare(folder)
        return folder

    return made


# Disks that fail


@pytest.mark.parametrize(
    "code",
    [errno.ENOSPC, *(pytest.param(code, marks=pytest.mark.slow) for code in CODES[1:])],
    ids=errno.errorcode.get,
)
@ALL_JOBS
def test_an_error_at_every_operation(make, job, code):
    before = contents(make(job))
    names = []
    for folder, name, error in each_error(lambda: make(job), job.do, code):
        names.append(name)
        assert error or name in job.silent
        final, temporary = apart(folder)
        if error and name not in TIDYING:
            # at the very end the old folder may be left; one made on the way never is
            assert not temporary or (final, temporary) == (job.end, [job.old])
            assert final != job.begin or contents(folder).keys() <= before.keys()
        if isinstance(job, Overwrite) and name in ("unlink", "rmdir"):
            # the new folder is there, so it is done
            assert error is None
            assert final == job.end
        if name in ("open xb", "write", "flush", "mkdir"):
            assert contents(folder) == before
        job.check(folder)
        shutil.rmtree(folder)
    assert len(names) >= 2


def test_a_fault_of_each_kind_was_tried(make):
    names = set()
    for job in JOBS.values():
        names |= {name for _, name, _ in each_error(lambda job=job: make(job), job.do, errno.EIO)}
    assert names >= {
        *("open xb", "open rb", "read", "write", "flush", "fsync", "replace", "rename", "link"),
        *("unlink", "mkdir", "rmdir", "scandir", "os.open", "os.write", "flock"),
    }


# Processes that are killed


@pytest.mark.parametrize("wrong", [kill_before, pytest.param(kill_after, marks=pytest.mark.slow)])
@ALL_JOBS
def test_killed_at_every_operation(make, job, wrong):
    number = 0
    for folder, _ in each_kill(lambda: make(job), lambda folder, _: job.do(folder), wrong):
        number += 1
        job.check(folder)
        shutil.rmtree(folder)
    assert number >= 2


# Power that is lost


def recorded(folder, job, **options):
    disk = Disk(folder, **options)
    with Operations(disk.happens):
        job.do(folder)
        disk.acknowledge(1)
    return disk


def check_loss(disk, number, choose, job, target):
    shutil.rmtree(target, ignore_errors=True)
    acknowledged = left_without_power(disk.states[number], choose, target)
    if acknowledged and not isinstance(job, Append):
        assert apart(target)[0] == job.end
    job.check(target, loss=True)


@pytest.fixture
def disks(make):
    """The disk of each job, recorded once for all examples of a test."""
    return cache(lambda job: recorded(make(job), job))


@pytest.mark.slow
@ALL_JOBS
def test_power_lost_after_every_operation(make, job, tmp_path):
    disk = recorded(make(job), job)
    assert len(disk.states) > 2
    for number in range(len(disk.states)):
        for choose in CHOICES:
            check_loss(disk, number, choose, job, tmp_path / "target")


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
@ALL_JOBS
def test_power_lost_with_anything_unsynced_found(disks, job, tmp_path, seed):
    disk, chance = disks(job), random.Random(seed)
    check_loss(disk, chance.randrange(len(disk.states)), chance.choice, job, tmp_path / "target")


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["sync_files", "sync_folders"])
@pytest.mark.parametrize("name", ["write-again", "write-together", "publish", "overwritten-folder"])
def test_the_disk_of_these_tests_forgets_what_is_not_synced(make, name, missing, tmp_path):
    disk = recorded(make(JOBS[name]), JOBS[name], **{missing: False})

    def is_lost(number, choose):
        target = tmp_path / f"{number} {choose.__name__}"
        try:
            check_loss(disk, number, choose, JOBS[name], target)
        except AssertionError:
            return True
        return False

    assert any(is_lost(number, choose) for number in range(len(disk.states)) for choose in CHOICES)


# Several processes at once


def test_of_processes_that_publish_the_first_wins(tmp_path):
    path, children = tmp_path / "a", []
    for number in range(8):
        children.append(os.fork())
        if not children[-1]:
            with suppress(BaseException):
                publish(path, [bytes([number])] * 1000)
                # what one of them has seen is what all see
                os.write(writer := os.open(tmp_path / "seen", SEEN), path.read_bytes())
                os.close(writer)
                os._exit(0)
            os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert (tmp_path / "seen").read_bytes() == path.read_bytes() * 8
    assert len(path.read_bytes()) == 1000


SEEN = os.O_WRONLY | os.O_APPEND | os.O_CREAT
