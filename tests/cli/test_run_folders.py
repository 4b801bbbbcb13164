"""``i2am status``, ``verify`` and ``export``: what they say of a run, and how they end."""

import json
import os
import sys

import pytest
from pyarrow import parquet

from i2am.cli.errors import ExitCode
from i2am.evaluation.store import Store
from i2am.evaluation.testing import make_plan, make_shard

PLAN = make_plan(pairs=5)
COMMANDS = {
    "status": lambda run: ["status", str(run)],
    "verify": lambda run: ["verify", str(run)],
    "zarr": lambda run: ["export", str(run), "--zarr", f"{run}.zarr"],
    "parquet": lambda run: ["export", str(run), "--parquet", f"{run}.parquet"],
}


def commit(run, *, settings=("paired", "unpaired"), numbers=(0, 1, 2), **options):
    store = Store.create(run, PLAN)
    for setting in settings:
        for number in numbers:
            store.commit(*make_shard(PLAN, setting, number, **options))
    return store


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def sentence(done):
    """The one line on stderr behind what the command is about to do."""
    *first, line = done.err.splitlines()
    assert all(each.startswith("reading ") for each in first)
    assert len(first) <= 1
    assert done.out == ""
    return line


def state(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# status


def test_status_of_a_whole_run(run, run_here):
    commit(run)
    before = state(run)
    done = run_here(["status", str(run)])
    assert (done.code, done.err) == (ExitCode.DONE, f"reading {run}\n")
    assert done.out.splitlines() == [
        "paired: 5 of 5 samples committed, in 3 of 3 shards; 0 failed",
        "unpaired: 5 of 5 samples committed, in 3 of 3 shards; 0 failed",
    ]
    assert state(run) == before


def half(run):
    store = commit(run, settings=("paired",), numbers=(0, 2), failed=0)
    store.commit(*make_shard(PLAN, "unpaired", 0, undefined=1))
    store.commit(*make_shard(PLAN, "unpaired", 1, undefined=0))
    store.commit(*make_shard(PLAN, "unpaired", 2))
    os.truncate(store.shard_path("unpaired", 1), 99)
    return store


def test_status_of_a_run_with_gaps(run, run_here):
    store = half(run)
    done = run_here(["status", str(run)])
    assert (done.code, done.err) == (ExitCode.INCOMPLETE, f"reading {run}\n")
    assert done.out.splitlines() == [
        "paired: 3 of 5 samples committed, in 2 of 3 shards; 2 failed",
        "  missing shards: 1",
        "  00000_00 failed: NaN in layer up.0 (nonfinite_map)",
        "  00004_00 failed: NaN in layer up.0 (nonfinite_map)",
        "unpaired: 3 of 5 samples committed, in 2 of 3 shards; 0 failed",
        "  missing shards: 1",
        f"  {store.shard_path('unpaired', 1)} is truncated or not a safetensors file",
        "  imacs_r is undefined in 1 of 3 samples: 1 [1]",
        "[1] its map is the same everywhere",
    ]


def test_status_says_why_once(run, run_here):
    commit(run, undefined=0)
    assert run_here(["status", str(run)]).out.splitlines() == [
        "paired: 5 of 5 samples committed, in 3 of 3 shards; 0 failed",
        "  imacs_r is undefined in 3 of 5 samples: 3 [1]",
        "unpaired: 5 of 5 samples committed, in 3 of 3 shards; 0 failed",
        "  imacs_r is undefined in 3 of 5 samples: 3 [1]",
        "[1] its map is the same everywhere",
    ]


def test_one_is_no_plural(run, run_here):
    plan = make_plan(pairs=1, settings=("paired",))
    Store.create(run, plan).commit(*make_shard(plan))
    said = run_here(["status", str(run)]).out + run_here(["verify", str(run)]).out
    assert said.splitlines() == [
        "paired: 1 of 1 sample committed, in 1 of 1 shard; 0 failed",
        f"{run}: 1 shard and all images are as they were written",
    ]
    out = f"{run}.parquet"
    assert run_here(["export", str(run), "--parquet", out]).out == f"{out}: 1 of 1 sample\n"


def test_status_as_json(run, run_here):
    store = half(run)
    done = run_here(["status", str(run), "--json"])
    assert (done.code, done.err) == (ExitCode.INCOMPLETE, f"reading {run}\n")
    result = json.loads(done.out)
    reason = {"code": "nonfinite_map", "message": "NaN in layer up.0"}
    assert result == {
        "run": str(run),
        "fingerprint": PLAN["fingerprint"],
        "complete": False,
        "settings": {
            "paired": {
                "samples": 5,
                "committed": 3,
                "ok": 1,
                "failed": {"00000_00": reason, "00004_00": reason},
                "undefined": {},
                "shards": 3,
                "missing": [[1, 1]],
                "damaged": [],
            },
            "unpaired": {
                "samples": 5,
                "committed": 3,
                "ok": 3,
                "failed": {},
                "undefined": {
                    "imacs_r": [
                        {
                            "code": "degenerate_map",
                            "message": "its map is the same everywhere",
                            "n": 1,
                        }
                    ]
                },
                "shards": 3,
                "missing": [[1, 1]],
                "damaged": [
                    f"{store.shard_path('unpaired', 1)} is truncated or not a safetensors file"
                ],
            },
        },
    }


def test_status_is_complete_only_without_failures(run, run_here):
    store = commit(run)
    store.shard_path("paired", 0).unlink()
    store.commit(*make_shard(PLAN, "paired", 0, failed=1))
    done = run_here(["status", str(run), "--json"])
    assert done.code == ExitCode.INCOMPLETE
    assert json.loads(done.out)["complete"] is False


def test_status_names_sequences_of_shards_and_counts_many_failures(run, run_here):
    plan = make_plan(pairs=40, shard=1, settings=("paired",))
    store = Store.create(run, plan)
    for number in (*range(5, 30), 31):
        store.commit(*make_shard(plan, "paired", number, failed=0))
    lines = run_here(["status", str(run)]).out.splitlines()
    assert lines[0] == "paired: 26 of 40 samples committed, in 26 of 40 shards; 26 failed"
    assert lines[1] == "  missing shards: 0-4, 30, 32-39"
    assert len(lines) == 23
    assert lines[-1] == "  6 more failed; --json lists all"
    result = json.loads(run_here(["status", str(run), "--json"]).out)["settings"]["paired"]
    assert len(result["failed"]) == 26
    assert result["missing"] == [[0, 4], [30, 30], [32, 39]]


# verify


def test_verify(run, run_here):
    commit(run, undefined=0)
    before = state(run)
    done = run_here(["verify", str(run)])
    assert done == (
        ExitCode.DONE,
        f"{run}: 6 shards and all images are as they were written\n",
        f"reading {run}\n",
    )
    done = run_here(["verify", str(run), "--json"])
    assert json.loads(done.out) == {"run": str(run), "shards": 6, "problems": []}
    assert state(run) == before


def test_verify_finds_flipped_bits_of_shards_and_images(run, run_here):
    store = commit(run)
    paths = [store.shard_path("paired", 1), store.image_path("unpaired", "00001_00_00003_00")]
    for path in paths:
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)
    done = run_here(["verify", str(run)])
    assert done.code == ExitCode.CONFLICT
    first, second = done.out.splitlines()
    assert first.startswith(f"{paths[0]} is damaged: ")
    assert second == f"{paths[1]} is damaged: it does not match its checksum"
    assert "\nwarning: 2 problems; delete the shards concerned, then " in done.err
    problems = json.loads(run_here(["verify", str(run), "--json"]).out)["problems"]
    assert problems == [first, second]
    # as the message says
    for setting, number in (("paired", 1), ("unpaired", 0)):
        store.shard_path(setting, number).unlink()
        store.commit(*make_shard(PLAN, setting, number))
    assert run_here(["verify", str(run)]).code == ExitCode.DONE


# export


@pytest.mark.parametrize("kind", ["zarr", "parquet"])
def test_export(run, run_here, kind):
    commit(run)
    before = state(run)
    done = run_here([*COMMANDS[kind](run), "--json"])
    assert (done.code, done.err) == (ExitCode.DONE, f"reading {run}\n")
    out = f"{run}.{kind}"
    assert json.loads(done.out) == {"run": str(run), "out": out, "ok": 10, "samples": 10}
    assert state(run) == before
    again = run_here(COMMANDS[kind](run))
    assert again.code == ExitCode.CONFLICT
    assert sentence(again).startswith(f"error: output {'folder ' * (kind == 'zarr')}{out} ")


@pytest.mark.parametrize("kind", ["zarr", "parquet"])
def test_export_of_a_run_with_gaps(run, run_here, kind):
    half(run)
    done = run_here(COMMANDS[kind](run))
    assert (done.code, done.err) == (ExitCode.INCOMPLETE, f"reading {run}\n")
    out = f"{run}.{kind}"
    assert done.out == f"{out}: 4 of 10 samples; the others failed or are not committed\n"
    if kind == "parquet":
        states = parquet.read_table(out)["status"].to_pylist()
        assert states == [
            *("failed", "ok", "missing", "missing", "failed"),
            *("ok", "ok", "missing", "missing", "ok"),
        ]


@pytest.mark.parametrize("kind", ["zarr", "parquet"])
def test_export_of_nothing(run, run_here, kind):
    Store.create(run, PLAN)
    done = run_here(COMMANDS[kind](run))
    assert done.code == ExitCode.REJECTED
    assert sentence(done) == f"error: {run} has no committed shard, so nothing can be exported"
    assert [path.name for path in run.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("options", [[], ["--zarr", "a", "--parquet", "b"]], ids=["none", "both"])
def test_export_wants_one_format(run, run_here, options):
    done = run_here(["export", str(run), *options])
    assert done.code == ExitCode.USAGE
    assert sentence(done).startswith("error: Give either --zarr or --parquet.")


@pytest.mark.parametrize(("kind", "package"), [("zarr", "zarr"), ("parquet", "pyarrow")])
def test_export_without_its_packages(run, run_here, monkeypatch, kind, package):
    commit(run)
    monkeypatch.setitem(sys.modules, package, None)
    done = run_here(COMMANDS[kind](run))
    assert done.code == ExitCode.REJECTED
    assert sentence(done).endswith(
        f"{package} is missing; install it with pip install i2am[export]"
    )


# What is no run, damaged, or not readable, for all of them

ALL = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)


@ALL
def test_no_run(tmp_path, run_here, command):
    done = run_here(command(tmp_path))
    assert done.code == ExitCode.CONFLICT
    assert sentence(done).endswith(
        f"{tmp_path} is not a run of i2am evaluate: it has no run.json of one"
    )


@ALL
def test_a_run_of_a_newer_version(run, run_here, command):
    commit(run)
    (run / "run.json").write_text(json.dumps({**PLAN, "schema": 2, "i2am": "7.8.9"}))
    done = run_here(command(run))
    assert done.code == ExitCode.CONFLICT
    assert "has schema 2 and was written by i2am 7.8.9" in sentence(done)


@ALL
def test_a_shard_of_another_run(run, tmp_path, run_here, command):
    commit(run)
    plan = make_plan(pairs=5, steps=9)
    other = Store.create(tmp_path / "other", plan)
    other.commit(*make_shard(plan))
    path = "shards/paired/000000.safetensors"
    (run / path).write_bytes((tmp_path / "other" / path).read_bytes())
    done = run_here(command(run))
    assert done.code == ExitCode.CONFLICT
    assert "belongs to another run: its fingerprint is" in (done.err + done.out)
    assert not [*tmp_path.glob("run.*")]


@ALL
def test_an_error_of_the_disk(run, run_here, monkeypatch, command):
    commit(run)

    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "listdir", fail)
    done = run_here(command(run))
    assert done.code == ExitCode.IO
    assert sentence(done) == "error: [Errno 5] Input/output error"
