"""Faults while a run is written: processes killed, disks that fail, power that is lost.

At every operation on a file, one after the other, until none is left to go wrong. Of the functions
that write files there is more in tests/files.
"""

import errno
import os
import random
import shutil
from contextlib import suppress
from itertools import count

import pytest
from faults import (
    CHOICES,
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

from i2am.evaluation.store import Store
from i2am.evaluation.testing import make_plan, make_shard
from i2am.files.atomic import is_temporary

PLAN = make_plan(pairs=4, shard=2, settings=("paired",))
SHARDS = [make_shard(PLAN, number=0, failed=1), make_shard(PLAN, number=1, undefined=0)]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    # the disk of this machine loses nothing here, and waiting for it takes most of the time
    monkeypatch.setattr(os, "fsync", os.fstat)


def work(folder, acknowledge=lambda number: None):
    """Makes a run or goes on with it, and commits what is not there yet."""
    store = Store.create(folder / "run", PLAN)
    for shard, images in SHARDS:
        if shard.number not in store.committed("paired"):
            store.commit(shard, images)
            acknowledge(shard.number)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    work(folder)
    assert len(contents(folder / "run")) == 10
    return contents(folder)


def check(folder, acknowledged, reference):
    """What was acknowledged is there, what is there is whole, and going on makes it complete."""
    if acknowledged or (folder / "run" / "run.json").exists():
        store = Store.open(folder / "run")
        committed = store.committed("paired")
        # in this order they were committed, and one may have been on its way
        assert committed in ({*range(len(acknowledged))}, {*range(len(acknowledged) + 1)})
        assert store.verify() == []
        assert not any(store.check_headers().values())
    work(folder)
    assert contents(folder) == reference


@pytest.fixture
def make(tmp_path):
    """Makes an empty folder."""
    numbers = count()

    def made():
        folder = tmp_path / f"{next(numbers)}"
        folder.mkdir()
        return folder

    return made


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [kill_before, kill_after])
def test_killed_at_every_operation(make, reference, wrong):
    seen = []
    for folder, acknowledged in each_kill(make, work, wrong):
        seen.append(acknowledged)
        check(folder, acknowledged, reference)
        shutil.rmtree(folder)
    # they fired before, between and after the commits
    assert len(seen) > 70
    assert [] in seen
    assert [0] in seen
    assert [0, 1] not in seen


@pytest.mark.slow
def test_a_full_disk_at_every_operation(make, reference):
    acknowledged, names = [], []

    def try_to_work(folder):
        acknowledged.clear()
        work(folder, acknowledged.append)

    for folder, name, error in each_error(make, try_to_work, errno.ENOSPC):
        # without locks it goes on, only cannot tidy up; and a folder may be there already
        assert error or name in ("flock", "mkdir")
        left = [path for path in folder.rglob("*") if is_temporary(path.name)]
        assert not left or name == "unlink"
        check(folder, acknowledged, reference)
        shutil.rmtree(folder)
        names.append(name)
    assert len(names) > 70
    assert {*names} >= {"open rb", "open xb", "replace", "link", "mkdir", "listdir", "flock"}


def test_a_full_disk_is_told_with_what_is_needed(tmp_path, monkeypatch):
    store = Store.create(tmp_path / "run", PLAN)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left .*; shard 0 of paired with its .* 0\.0 MB"):
        store.commit(*SHARDS[0])
    assert store.committed("paired") == set()


@pytest.fixture
def disk(tmp_path):
    """Of a run that was made without a fault."""
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root)
    with Operations(disk.happens):
        work(root, disk.acknowledge)
    assert disk.acknowledged == [0, 1]
    assert len(disk.states) > 40
    return disk


@pytest.mark.slow
@pytest.mark.parametrize("choose", CHOICES)
def test_power_lost_after_every_operation(disk, tmp_path, reference, choose):
    for state in disk.states:
        acknowledged = left_without_power(state, choose, tmp_path / "target")
        check(tmp_path / "target", acknowledged, reference)
        shutil.rmtree(tmp_path / "target")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_power_lost_with_anything_unsynced_found(disk, tmp_path, reference, seed):
    chance = random.Random(seed)
    shutil.rmtree(tmp_path / "target", ignore_errors=True)
    acknowledged = left_without_power(
        chance.choice(disk.states), chance.choice, tmp_path / "target"
    )
    check(tmp_path / "target", acknowledged, reference)


def test_two_processes_with_the_same_shards(tmp_path, reference):
    for attempt in range(8):
        folder, children = tmp_path / f"{attempt}", []
        for _ in range(3):
            children.append(os.fork())
            if not children[-1]:
                with suppress(BaseException):
                    store = Store.create(folder / "run", PLAN)
                    for shard, images in SHARDS:
                        store.commit(shard, images)
                    os._exit(0)
                os._exit(1)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        assert contents(folder) == reference
