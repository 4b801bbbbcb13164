"""The folder of a run: made, gone on with, read, verified; what is not ours is left alone."""

import copy
import fcntl
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from i2am.evaluation import plan_file
from i2am.evaluation import store as store_module
from i2am.evaluation.shard import Reason
from i2am.evaluation.store import Store, StoreConflict, StoreDamaged
from i2am.evaluation.testing import make_plan, make_shard
from i2am.files import canonical, open_regular

PLAN = make_plan()
LEFTOVER = ".i2am-0123456789abcdef.tmp"


def files(folder):
    """Content of every file, and None for each folder, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def fill(store, **options):
    for setting in store.settings():
        for number in store.shard_numbers(setting):
            store.commit(*make_shard(store.plan, setting, number, **options))
    return store


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs" / "run"


@pytest.fixture
def full(run):
    fill(Store.create(run, PLAN))
    return run


# A run from beginning to end


def test_a_run(run):
    store = Store.create(run, PLAN)
    assert store.plan == PLAN
    assert store.settings() == ["paired", "unpaired"]
    assert store.ids("paired")[:2] == ["00000_00", "00001_00"]
    assert [*store.shard_numbers("unpaired")] == [0, 1, 2]
    assert [*store.positions("paired", 2)] == [4, 5]
    assert store.committed("paired") == set()
    shard, images = make_shard(PLAN, "paired", 1, failed=0)
    store.commit(shard, images)
    assert store.committed("paired") == Store.open(run).committed("paired") == {1}
    assert store.committed("unpaired") == set()
    read = Store.open(str(run)).read("paired", 1)
    assert read.to_bytes() == shard.to_bytes()
    assert store.image_path("paired", "00003_00").read_bytes() == images["00003_00"]
    assert not store.image_path("paired", "00002_00").exists()
    assert store.verify() == []
    assert {*files(run)} == {
        "run.json",
        *("images", "images/paired", "images/unpaired", "images/paired/00003_00.png"),
        *("shards", "shards/paired", "shards/unpaired", "shards/paired/000001.safetensors"),
    }


def test_the_last_shard_may_be_short(run):
    store = Store.create(run, make_plan(pairs=5))
    assert [*store.positions("paired", 2)] == [4]
    assert len(fill(store).read("paired", 2).ids) == 1


def test_going_on(full):
    before = files(full)
    plan = copy.deepcopy(PLAN)
    plan["model"]["name"], plan["data"]["folder"] = "elsewhere/pocket", "elsewhere"
    store = Store.create(full, plan)
    assert store.committed("paired") == {0, 1, 2}
    assert store.plan == PLAN
    fill(store)
    assert files(full) == before


def test_shards_in_order_without_maps(full):
    shards = [*Store.open(full).shards("paired")]
    assert [shard.number for shard in shards] == [0, 1, 2]
    assert all(not shard.maps for shard in shards)
    names = {"g2r_uniform"}
    (first, *_) = Store.open(full).shards("paired", tensors=names)
    assert first.maps.keys() == names


def test_equal_runs_have_equal_bytes(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    fill(Store.create(first, PLAN), undefined=1)
    store = Store.create(second, dict(reversed(PLAN.items())))
    for setting in reversed(store.settings()):
        for number in reversed(store.shard_numbers(setting)):
            store.commit(*make_shard(PLAN, setting, number, undefined=1))
    assert files(first) == files(second)


def test_an_empty_folder_may_be_there_and_leftovers_of_a_run_that_never_began(run):
    run.mkdir(parents=True)
    (run / LEFTOVER).write_bytes(b"{")
    Store.create(run, PLAN)
    assert sorted(os.listdir(run)) == ["images", "run.json", "shards"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_modes_follow_the_umask(run, umask, mode):
    before = os.umask(umask)
    try:
        fill(Store.create(run, PLAN))
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in [run, *run.rglob("*")]}
    assert {m for path, m in modes.items() if path.is_file()} == {mode}
    assert {m for path, m in modes.items() if path.is_dir()} == {0o777 & ~umask}


def test_the_group_of_a_setgid_folder_is_kept(run):
    run.mkdir(parents=True)
    run.chmod(0o2775)
    fill(Store.create(run, PLAN))
    assert all(path.stat().st_mode & 0o2000 for path in run.rglob("*") if path.is_dir())


# Leftovers of processes that died, and of those that live


def leave(folder):
    left = [
        folder,
        *(folder / kind / s for kind in ("shards", "images") for s in PLAN["data"]["pairs"]),
    ]
    for path in left:
        (path / LEFTOVER).write_bytes(b"half")
        (path / ".i2am-mine.txt").write_bytes(b"kept")
    return [path / LEFTOVER for path in left]


def test_leftovers_are_removed(full):
    before, left = files(full), leave(full)
    Store.open(full)
    assert all(path.exists() for path in left)
    Store.create(full, PLAN)
    after = files(full)
    assert {name for name in after if name not in before} == {
        str((path.parent / ".i2am-mine.txt").relative_to(full)) for path in left
    }
    assert Store.open(full).committed("paired") == {0, 1, 2}


HOLD = """
import sys, time
from i2am.evaluation.store import Store
from i2am.evaluation.testing import make_plan, make_shard
store = Store.open(sys.argv[1])
store.commit(*make_shard(make_plan()))
print("writing", flush=True)
time.sleep(300)
"""


def test_leftovers_stay_while_another_process_writes(fork, run):
    Store.create(run, PLAN)
    other = fork(HOLD, run)
    assert other.stdout.readline() == "writing\n"
    left = leave(run)
    Store.create(run, PLAN)
    assert all(path.exists() for path in left)
    other.kill()
    other.communicate()
    Store.create(run, PLAN)
    assert not any(path.exists() for path in left)


def test_leftovers_stay_where_files_cannot_be_locked(full, monkeypatch):
    def refuse(*arguments):
        raise OSError(37, "No locks available")

    left = leave(full)
    monkeypatch.setattr(fcntl, "flock", refuse)
    fill(Store.create(full, PLAN))
    assert all(path.exists() for path in left)


def test_two_that_begin_at_once_get_one_run(run, monkeypatch):
    link = os.link

    def late(source, target):
        # the other one has begun, and taken our temporary file for a leftover
        monkeypatch.setattr(os, "link", link)
        other.append(Store.create(run, PLAN))
        link(source, target)

    other = []
    monkeypatch.setattr(os, "link", late)
    mine = Store.create(run, PLAN)
    assert mine.plan == other[0].plan == PLAN
    assert sorted(os.listdir(run)) == ["images", "run.json", "shards"]


def test_of_two_different_runs_that_begin_at_once_the_second_is_refused(run, monkeypatch):
    link = os.link

    def late(source, target):
        monkeypatch.setattr(os, "link", link)
        Store.create(run, make_plan(steps=9))
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(StoreConflict, match=r"differs in settings.steps \(9 there, 4 now\)"):
        Store.create(run, PLAN)
    assert Store.open(run).plan == make_plan(steps=9)


def test_a_file_system_without_links(run, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    Store.create(run, PLAN)
    assert Store.open(run).plan == PLAN
    assert sorted(os.listdir(run)) == ["images", "run.json", "shards"]


# What is not ours


def test_another_plan_is_refused_and_nothing_touched(full):
    leave(full)
    before, times = files(full), {p: p.stat().st_mtime_ns for p in full.rglob("*")}
    plan = make_plan(pairs=7, steps=9, maps="none")
    message = (
        r"run holds another run, which differs in data\.pairs\.paired, data\.pairs\.unpaired, "
        r"settings\.maps \('float16' there, 'none' now\), settings\.steps \(4 there, 9 now\); name"
    )
    with pytest.raises(StoreConflict, match=message):
        Store.create(full, plan)
    assert files(full) == before
    assert {p: p.stat().st_mtime_ns for p in full.rglob("*")} == times


def other_run(folder):
    fill(Store.create(folder, make_plan(steps=9)))
    return folder


def test_a_shard_of_another_run_is_refused_and_nothing_touched(full, tmp_path):
    name = "shards/paired/000001.safetensors"
    shutil.copy(other_run(tmp_path / "other") / name, full / name)
    leave(full)
    before = files(full)
    message = rf"{name} belongs to another run: its fingerprint is \w+, that of this run \w+$"
    with pytest.raises(StoreConflict, match=message):
        Store.create(full, PLAN)
    with pytest.raises(StoreConflict, match=message):
        Store.open(full).read("paired", 1)
    problems = [problem for problem in Store.open(full).verify() if "mine.txt" not in problem]
    assert len(problems) == 1
    assert re.search(message, problems[0])
    assert files(full) == before


def test_a_shard_of_another_schema_is_refused(full):
    path = Store.open(full).shard_path("paired", 1)
    path.write_bytes(with_schema(path.read_bytes(), 2))
    with pytest.raises(StoreConflict, match="has schema 2 and this i2am reads schema 1"):
        Store.create(full, PLAN)
    with pytest.raises(StoreConflict, match=r"000001\.safetensors has schema 2"):
        [*Store.open(full).shards("paired")]
    assert len(Store.open(full).verify()) == 1


def with_schema(data, schema):
    import zlib

    from safetensors.torch import load, save

    length = int.from_bytes(data[:8], "little")
    document = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["i2am"])
    document["schema"] = schema
    document.pop("checksum")
    document["checksum"] = zlib.crc32(canonical(document))
    return save(load(data), {"i2am": canonical(document).decode()})


@pytest.mark.parametrize(
    "name", ["shards/paired/000000.safetensors", "shards/unpaired/000001.safetensors"]
)
def test_a_shard_under_the_name_of_another_is_damage(full, name):
    shutil.copy(full / "shards/paired/000001.safetensors", full / name)
    store = Store.create(full, PLAN)
    missing = {s: {*store.shard_numbers(s)} - store.committed(s) for s in store.settings()}
    setting, number = Path(name).parent.name, int(Path(name).stem)
    assert missing == {"paired": set(), "unpaired": set()} | {setting: {number}}
    with pytest.raises(StoreDamaged, match="holds other samples than the plan wants there"):
        store.read(setting, number)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, StoreConflict, "is not a run of i2am evaluate: it has no run.json of one"),
        (b"", StoreDamaged, "run.json is damaged"),
        (canonical(PLAN)[:-9], StoreDamaged, "run.json is damaged"),
        (b"\xff\xfe", StoreDamaged, "run.json is damaged"),
        (b"[" * 200_000, StoreDamaged, "run.json is damaged"),
        (json.dumps(PLAN).encode(), StoreDamaged, "run.json is damaged: it is not as it was"),
        (b"[]", StoreConflict, "run.json was not written by i2am evaluate"),
        (b'{"command": "record"}', StoreConflict, "run.json was not written by i2am evaluate"),
        (
            canonical({**PLAN, "schema": 2, "i2am": "7.8.9"}),
            StoreConflict,
            "has schema 2 and was written by i2am 7.8.9; this i2am reads schema 1",
        ),
        (
            canonical({"schema": 2, "fingerprint": {}, "i2am": "7.8.9"}),
            StoreConflict,
            "has schema 2 and was written by i2am 7.8.9",
        ),
    ],
    ids=["none", "empty", "cut", "bytes", "deep", "spaces", "list", "record", "newer", "new kind"],
)
def test_no_run(tmp_path, content, kind, message):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "image.png").write_bytes(b"")
    if content is not None:
        (folder / "run.json").write_bytes(content)
    before = files(folder)
    with pytest.raises(kind, match=message):
        Store.open(folder)
    with pytest.raises((StoreConflict, StoreDamaged)) as caught:
        Store.create(folder, PLAN)
    if content is None:
        message = "other holds image.png but no run of i2am evaluate; name another folder"
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(folder) == before


def test_no_folder(tmp_path):
    with pytest.raises(StoreConflict, match="none is not a run of i2am evaluate"):
        Store.open(tmp_path / "none")
    assert [*tmp_path.iterdir()] == []


def test_a_file_in_place_of_the_folder(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    for call in (lambda: Store.create(file, PLAN), lambda: Store.open(file)):
        with pytest.raises(StoreConflict, match="file is a file, a folder was expected"):
            call()
    assert file.read_bytes() == b"mine"


def plan_with(**settings):
    return sealed({**PLAN, "settings": {**PLAN["settings"], **settings}})


def plan_of(*ids):
    plan = make_plan(settings=("paired",))
    plan["data"]["pairs"]["paired"] = [[id, "a", "b", 1, "a.jpg"] for id in ids]
    return plan


def plan_of_pairs(*pairs):
    plan = make_plan(settings=("paired",))
    plan["data"]["pairs"]["paired"] = [*pairs]
    return plan


def plan_without(field):
    plan = copy.deepcopy(PLAN)
    *above, last = field.split(".")
    holder = plan
    for name in above:
        holder = holder[name]
    del holder[last]
    return plan


def sealed(plan):
    return {**plan, "fingerprint": plan_file.fingerprint_of(plan)}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "plan is damaged: it has no schema"),
        (sealed({**PLAN, "schema": 2}), "plan must have schema 1, got 2"),
        ({**PLAN, "fingerprint": ""}, "plan must have the fingerprint of its content, .* got $"),
        ({**PLAN, "i2am": "9"}, "plan must have the fingerprint of its content"),
        (plan_with(shard=0), "plan must have at least 1 sample in a shard, got 0"),
        (plan_with(shard=True), "plan is damaged: settings.shard must be an integer, got true"),
        (plan_with(steps="50"), 'plan is damaged: settings.steps must be an integer, got "50"'),
        (plan_with(pairs=["none"]), "plan is damaged: it has no data.pairs.none"),
        *(
            (plan_with(size=size), "size of a plan must be two integers, got ")
            for size in ([], [128], [128, 96, 3], [128.0, 96.0], [True, 96], ["128", 96], [[], {}])
        ),
        *(
            (plan_without(field), f"plan is damaged: it has no {field}")
            for field in ("model", "model.name", "data.folder", "settings.size", "settings.maps")
        ),
        *(
            (plan_of_pairs(pair), "pairs of a plan must be an id, a person, a garment, a line")
            for pair in ([], ["a"], ["a", "a", "b", 1], ["a", "a", "b", "1", "a.jpg"], "abcde", 7)
        ),
        (plan_of(), "ids of paired must be distinct, and at least one"),
        (plan_of("a", "a"), "ids of paired must be distinct"),
        *(
            (plan_of(name), "ids of a plan must be bare file names of at most 240 bytes, got")
            for name in ("", ".", "..", "a/b", "/etc/passwd", "a\\b", "a\0", "é" * 121)
        ),
        (plan_of("a") | {"more": float("nan")}, "Out of range float values"),
    ],
)
def test_plans_that_are_refused(run, plan, message):
    with pytest.raises(ValueError, match=message):
        Store.create(run, plan)
    assert not run.parent.exists()


def test_a_name_of_240_bytes(run):
    plan = plan_of("é" * 120)
    store = Store.create(run, plan)
    store.commit(*make_shard(plan, maps=False))
    assert store.verify() == []


# Damage


def damaged_numbers(store):
    return {s: {*found} for s, found in store.check_headers().items()}


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_truncated_shard_is_computed_again(full, length):
    before = files(full)
    path = Store.open(full).shard_path("paired", 1)
    os.truncate(path, length % path.stat().st_size)
    assert Store.open(full).committed("paired") == {0, 1, 2}
    with pytest.raises(StoreDamaged, match=r"000001\.safetensors is truncated"):
        [*Store.open(full).shards("paired")]
    (problem,) = Store.open(full).verify()
    assert "000001.safetensors is truncated" in problem
    store = Store.create(full, PLAN)
    assert store.committed("paired") == {0, 2}
    assert damaged_numbers(store) == {"paired": {1}, "unpaired": set()}
    assert [shard.number for shard in store.shards("paired")] == [0, 2]
    store.commit(*make_shard(PLAN, "paired", 1))
    assert store.committed("paired") == {0, 1, 2}
    assert damaged_numbers(store) == {"paired": set(), "unpaired": set()}
    assert files(full) == before


def test_a_flipped_bit_of_a_tensor_is_found(full):
    path = Store.open(full).shard_path("unpaired", 0)
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    assert Store.create(full, PLAN).committed("unpaired") == {0, 1, 2}
    (problem,) = Store.open(full).verify()
    assert problem.startswith(f"{path} is damaged: ")
    with pytest.raises(StoreDamaged, match="does not match its checksum"):
        Store.open(full).read("unpaired", 0)
    Store.open(full).read("unpaired", 0, check=False)


def test_verify_lists_every_problem(full):
    store = Store.open(full)
    store.shard_path("paired", 0).unlink()
    store.shard_path("paired", 1).write_bytes(b"")
    store.image_path("paired", "00004_00").unlink()
    store.image_path("unpaired", "00000_00_00005_00").write_bytes(b"PNG")
    store.image_path("unpaired", "orphan").write_bytes(b"PNG")
    shutil.copy(store.shard_path("unpaired", 0), full / "shards/unpaired/000003.safetensors")
    shutil.copy(store.shard_path("unpaired", 0), full / "shards/unpaired/0000000.safetensors")
    leave(full)
    assert [problem.removeprefix(f"{full}{os.sep}") for problem in store.verify()] == [
        "shards/paired/.i2am-mine.txt is not a shard of this run",
        "shards/paired/000001.safetensors is truncated or not a safetensors file",
        "images/paired/00004_00.png is missing",
        "shards/unpaired/.i2am-mine.txt is not a shard of this run",
        "shards/unpaired/0000000.safetensors is not a shard of this run",
        "shards/unpaired/000003.safetensors is not a shard of this run",
        "images/unpaired/00000_00_00005_00.png is damaged: it does not match its checksum",
    ]
    assert store.committed("unpaired") == {0, 1, 2}


def test_verify_may_show_a_bar(full, capsys):
    assert Store.open(full).verify(progress=True) == []
    assert "unpaired: 100%" in capsys.readouterr().err


# What cannot be committed or read


@pytest.fixture
def store(run):
    return Store.create(run, PLAN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"setting": "other"}, r"setting must be one of \['paired', 'unpaired'\], got 'other'"),
        ({"number": 3}, "number must be below 3 for paired, got 3"),
        ({"number": -1}, "number must be below 3 for paired, got -1"),
        ({"number": 1}, r"shard 1 must hold the samples \['00002_00', '00003_00'\] of paired"),
        ({"setting": "unpaired"}, "shard 0 must hold the samples .* of unpaired"),
        ({"index": torch.tensor([0, 2])}, "shard 0 must hold the samples"),
        ({"fingerprint": "0"}, "shard must have the fingerprint of the run"),
        ({"images": {}}, "images must be those whose checksums the shard lists"),
        ({"images": {"00000_00": 1, "00001_00": 2}}, "images must be those whose checksums"),
    ],
)
def test_a_shard_that_does_not_belong_is_refused(store, change, message):
    shard, images = make_shard(PLAN)
    with pytest.raises(ValueError, match=message):
        store.commit(replace(shard, **change), images)
    assert not [*store.folder.glob("*/*/*")]


@pytest.mark.parametrize("maps", [True, False])
def test_what_was_whole_is_kept_when_it_fails_now(run, maps):
    store = Store.create(run, PLAN)
    store.commit(*make_shard(PLAN, failed=0, maps=maps))
    assert store.commit(*make_shard(PLAN, failed=1, maps=maps)) == ["00001_00"]
    whole, _ = make_shard(PLAN, maps=maps)
    assert store.read("paired", 0).to_bytes() == whole.to_bytes()
    assert store.verify() == []
    # nor does a failure of all of them replace anything
    everything_failed, _ = make_shard(PLAN, failed=0, maps=maps)
    everything_failed = replace(
        everything_failed,
        status=torch.ones(2, dtype=torch.uint8),
        scores=torch.full_like(everything_failed.scores, torch.nan),
        maps={},
        reasons={id: {"sample": Reason("missing", "gone")} for id in everything_failed.ids},
        images={},
    )
    assert store.commit(everything_failed, {}) == ["00000_00", "00001_00"]
    assert store.read("paired", 0).to_bytes() == whole.to_bytes()


@pytest.mark.parametrize("damage", ["image", "shard"])
def test_what_is_damaged_is_not_kept(run, damage):
    store = Store.create(run, PLAN)
    store.commit(*make_shard(PLAN))
    path = store.image_path("paired", "00001_00")
    if damage == "shard":
        path = store.shard_path("paired", 0)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    failed, images = make_shard(PLAN, failed=1)
    assert store.commit(failed, images) == []
    assert store.read("paired", 0).to_bytes() == failed.to_bytes()


def test_what_is_not_there_cannot_be_read(store):
    with pytest.raises(StoreDamaged, match=r"shard 2 of paired is not in .*: it is not committed"):
        store.read("paired", 2)
    for call in (store.committed, store.shard_numbers, store.ids):
        with pytest.raises(ValueError, match=r"setting must be one of .*, got 'other'"):
            call("other")
    with pytest.raises(ValueError, match="number must be below 3 for paired, got 3"):
        store.positions("paired", 3)


def test_a_run_that_was_only_planned_can_be_read(run):
    # a crash between run.json and the folders
    plan_file.create(run, PLAN)
    store = Store.open(run)
    assert store.committed("paired") == set()
    assert store.verify() == []
    assert [*store.shards("paired")] == []
    fill(store)
    assert store.committed("paired") == {0, 1, 2}


# Many shards


def test_going_on_reads_each_shard_once_and_no_tensor(run, monkeypatch):
    plan = make_plan(pairs=1_600, shard=16, settings=("unpaired",))
    store = Store.create(run, plan)
    paths = [store.shard_path("unpaired", number) for number in store.shard_numbers("unpaired")]
    for number, path in enumerate(paths):
        path.write_bytes(make_shard(plan, "unpaired", number, undefined=3)[0].to_bytes())
    read = Counter()

    class Counted:
        def __init__(self, path):
            self.path, self.file = str(path), open_regular(path)
            assert self.path not in read

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def readinto(self, buffer):
            count = self.file.readinto(buffer)
            read[self.path] += count
            return count

    monkeypatch.setattr(store_module, "open_regular", Counted)
    again = Store.create(run, plan)
    assert len(again.committed("unpaired")) == len(paths) == 100
    # eight bytes tell how long the header is
    headers = {str(path): 8 + int.from_bytes(path.read_bytes()[:8], "little") for path in paths}
    assert read == headers
