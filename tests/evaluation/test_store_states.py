"""Runs that are written, interrupted, damaged and gone on with in any order."""

import itertools
import os
import shutil
import signal
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from i2am.evaluation.store import Store
from i2am.evaluation.testing import make_plan, make_shard

PLAN = make_plan(pairs=4, shard=2)
SHARDS = {
    (setting, number): make_shard(PLAN, setting, number, undefined=number)
    for setting in PLAN["settings"]["pairs"]
    for number in (0, 1)
}
WHICH = st.sampled_from([*SHARDS])
PLACES = st.floats(0, 1, exclude_max=True)


class Runs(RuleBasedStateMachine):
    """Knows of each shard whether it should be there, and whether something was done to it."""

    @initialize()
    def begin(self):
        self.root = Path(tempfile.mkdtemp())
        self.store = Store.create(self.root / "run", PLAN)
        self.there, self.unreadable, self.altered, self.without_image = set(), set(), set(), set()

    def teardown(self):
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    @rule(which=WHICH)
    def commit(self, which):
        self.store.commit(*SHARDS[which])
        self.is_whole(which)

    @rule(which=WHICH, number=st.integers(1, 22))
    def commit_and_be_killed(self, which, number):
        """At the n-th of the calls that make something last."""
        path = self.store.shard_path(*which)
        before = path.stat().st_ino if path.exists() else None
        child = os.fork()
        if not child:
            calls = itertools.count(1)

            def or_die(function, *arguments):
                if next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)

            os.fsync, os.replace = partial(or_die, os.fsync), partial(or_die, os.replace)
            self.store.commit(*SHARDS[which])
            os._exit(0)
        os.waitpid(child, 0)
        # images come first, so a shard that is new has all of its own
        if path.exists() and path.stat().st_ino != before:
            self.is_whole(which)
        else:
            setting, _ = which
            if all(self.image_is_whole(setting, id) for id in SHARDS[which][1]):
                self.without_image.discard(which)

    @rule(which=WHICH, place=PLACES)
    def truncate(self, which, place):
        if which in self.there:
            path = self.store.shard_path(*which)
            size = int(place * path.stat().st_size)
            os.truncate(path, size)
            self.unreadable.add(which)

    @rule(which=WHICH, place=PLACES)
    def flip_a_bit_of_a_tensor(self, which, place):
        if which in self.there - self.unreadable - self.altered:
            path = self.store.shard_path(*which)
            data = bytearray(path.read_bytes())
            start = 8 + int.from_bytes(data[:8], "little")
            data[start + int(place * (len(data) - start))] ^= 1
            path.write_bytes(data)
            self.altered.add(which)

    @rule(which=WHICH)
    def damage_an_image(self, which):
        if which in self.there:
            setting, _ = which
            path = self.store.image_path(setting, SHARDS[which][0].ids[0])
            path.write_bytes(b"PNG")
            self.without_image.add(which)

    @rule(which=WHICH)
    def delete(self, which):
        if which in self.there:
            self.store.shard_path(*which).unlink()
            for of in (self.there, self.unreadable, self.altered, self.without_image):
                of.discard(which)

    @rule()
    def go_on(self):
        # as a new process would: the lock of the old one is gone
        del self.store
        self.store = Store.create(self.root / "run", PLAN)
        seen = {(s, n) for s in self.store.settings() for n in self.store.committed(s)}
        assert seen == self.there - self.unreadable
        left = [path.name for path in self.root.rglob("*.tmp")]
        assert left == []

    @rule()
    def finish(self):
        """What a user does who was told of problems: delete those shards and go on."""
        for which in sorted(self.altered | self.without_image):
            self.delete(which)
        self.go_on()
        for setting, number in SHARDS:
            if number not in self.store.committed(setting):
                self.commit((setting, number))
        assert self.store.verify() == []
        for (setting, number), (shard, images) in SHARDS.items():
            assert self.store.shard_path(setting, number).read_bytes() == shard.to_bytes()
            for id, data in images.items():
                assert self.store.image_path(setting, id).read_bytes() == data

    @invariant()
    def verify_knows(self):
        if not hasattr(self, "root"):
            return
        damaged = self.unreadable | self.altered
        assert len(self.store.verify()) == len(damaged | self.without_image)
        assert {
            (s, n)
            for s, found in Store.open(self.root / "run").check_headers().items()
            for n in found
        } == self.unreadable

    def is_whole(self, which):
        self.there.add(which)
        for of in (self.unreadable, self.altered, self.without_image):
            of.discard(which)

    def image_is_whole(self, setting, id):
        path = self.store.image_path(setting, id)
        return path.exists() and path.read_bytes() == f"PNG of {setting} {id}".encode()


TestRuns = pytest.mark.slow(Runs.TestCase)
TestRuns.settings = settings(
    max_examples=15,
    stateful_step_count=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
