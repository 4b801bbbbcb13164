"""Whole commands in processes of their own: ranks, Ray, signals and kills give the same bytes."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from i2am.cli import main
from i2am.data import write_viton_hd

pytestmark = pytest.mark.slow

PAIRS = 8
OPTIONS = ("--batch=2", "--shard=2", "--steps=4", "--time-groups=2", "--threads=1")
SHARDS = 2 * PAIRS // 2

COMMAND = "import sys; from i2am.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    write_viton_hd(folder, train=0, test=PAIRS)
    return folder


@pytest.fixture(scope="module")
def command(data):
    """Arguments of a run into a folder."""

    def of(out, *more):
        return ["evaluate", "pocket", "--data", str(data), "-o", str(out), *OPTIONS, *more]

    return of


@pytest.fixture
def start(fork, command):
    """Starts a run in a process of its own."""

    def started(out, *more, **environment):
        return fork(COMMAND, *command(out, *more), RAY_USAGE_STATS_ENABLED="0", **environment)

    return started


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, command, digest):
    """Digest of a run in this process."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(command(out, "--json")) == 0
    result = json.loads(printed.getvalue())
    assert (result["samples"], result["failed"], result["remaining"]) == (2 * PAIRS, 0, 0)
    return digest(out)


def finish(process, *, code=0):
    _, stderr = process.communicate()
    assert process.returncode == code, stderr
    return stderr


def committed(out):
    return len([*out.glob("shards/*/*.safetensors")])


def wait_for(count, out, process):
    """Until so many shards are committed."""
    deadline = time.monotonic() + 200
    while committed(out) < count:
        assert process.returncode is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_ranks(uninterrupted, start, tmp_path, digest):
    ranks = [
        start(tmp_path / "run", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        assert f"worker {rank} of 2" in finish(process)
    assert digest(tmp_path / "run") == uninterrupted
    assert len([*tmp_path.glob("run/logs/*.jsonl")]) == 2


def test_one_of_two_ranks_killed(uninterrupted, start, tmp_path, digest):
    out = tmp_path / "run"
    ranks = [start(out, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    wait_for(1, out, ranks[0])
    ranks[1].kill()
    ranks[1].communicate()
    finish(ranks[0])
    assert committed(out) < SHARDS
    # whoever comes next finishes the rest
    finish(start(out))
    assert digest(out) == uninterrupted


def test_a_rank_that_stands_still_for_a_while(uninterrupted, start, tmp_path, digest):
    out = tmp_path / "run"
    ranks = [start(out, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    wait_for(1, out, ranks[0])
    ranks[1].send_signal(signal.SIGSTOP)
    finish(ranks[0])
    # what the sleeping one has begun stays, also while others come and go
    before = sorted(path for path in out.rglob(".i2am-*"))
    finish(start(out, RANK="0", WORLD_SIZE="2"))
    assert sorted(path for path in out.rglob(".i2am-*")) == before
    ranks[1].send_signal(signal.SIGCONT)
    finish(ranks[1])
    assert digest(out) == uninterrupted
    assert not [*out.rglob(".i2am-*")]


JUMPS = """
import itertools, time
jumps, real = itertools.cycle([0, -3600, 10**6, -(10**8)]), time.time
time.time = lambda: real() + next(jumps)
time.strftime = lambda form, *_: "1970-01-01T00:00:00+0000"
"""


def test_a_clock_that_jumps(uninterrupted, fork, command, tmp_path, digest):
    finish(fork(JUMPS + COMMAND, *command(tmp_path / "run")))
    assert digest(tmp_path / "run") == uninterrupted


def test_torchrun(uninterrupted, command, tmp_path, digest):
    out = tmp_path / "run"
    line = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node=2"]
    line += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [*line, "-m", "i2am", *command(out)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert digest(out) == uninterrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_whole_shards(uninterrupted, start, tmp_path, digest, number, code):
    out = tmp_path / "run"
    process = start(out)
    wait_for(2, out, process)
    process.send_signal(number)
    message = finish(process, code=code)
    assert "the same command goes on with what is missing" in message
    assert "Traceback" not in message
    assert 2 <= committed(out) < SHARDS
    assert not [*out.rglob(".*.tmp")]
    finish(start(out))
    assert digest(out) == uninterrupted


def test_a_second_signal_kills_at_once(uninterrupted, start, tmp_path, digest):
    out = tmp_path / "run"
    process = start(out)
    wait_for(1, out, process)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    process.communicate(timeout=60)
    # the first may have been enough already
    assert process.returncode in (-signal.SIGTERM, 143)
    finish(start(out))
    assert digest(out) == uninterrupted


def test_twenty_kills(uninterrupted, start, tmp_path, digest):
    chance = random.Random(6)
    kills = runs = 0
    while kills < 20:
        runs += 1
        out = tmp_path / f"run-{runs}"
        while kills < 20 and committed(out) < SHARDS:
            before, process = committed(out), start(out)
            if kills % 2:
                # in or right behind a commit
                deadline = time.monotonic() + 60
                while committed(out) == before and time.monotonic() < deadline:
                    time.sleep(0.001)
                time.sleep(chance.uniform(0, 0.01))
            else:
                time.sleep(chance.uniform(0, 2))
            # it may have finished just now
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
        finish(start(out))
        assert digest(out) == uninterrupted


def test_ray(uninterrupted, start, tmp_path, digest):
    pytest.importorskip("ray")
    finish(start(tmp_path / "run", "--engine=ray", "--workers=2"))
    assert digest(tmp_path / "run") == uninterrupted
    assert len([*tmp_path.glob("run/logs/*.jsonl")]) == 2


def test_ray_with_a_killed_worker(uninterrupted, start, tmp_path, digest):
    pytest.importorskip("ray")
    out = tmp_path / "run"
    process = start(out, "--engine=ray", "--workers=2")
    wait_for(1, out, process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "_RayWorker" in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    workers[0].kill()
    finish(process)
    assert digest(out) == uninterrupted
    # the worker that took its place wrote a log of its own, unless nothing was left to do
    assert len([*out.glob("logs/*.jsonl")]) >= 2


def test_ray_with_a_worker_that_stands_still_for_a_while(uninterrupted, start, tmp_path, digest):
    pytest.importorskip("ray")
    out = tmp_path / "run"
    process = start(out, "--engine=ray", "--workers=2")
    wait_for(1, out, process)
    worker = next(
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "_RayWorker" in " ".join(child.cmdline())
    )
    worker.suspend()
    # the other one takes all shards but the one that the sleeping one holds
    wait_for(SHARDS - 1, out, process)
    worker.resume()
    finish(process)
    assert digest(out) == uninterrupted


POISON = """
    import json, os, sys
    from pathlib import Path
    import ray

    def poison():
        from i2am.evaluation.worker import Worker
        real = Worker.run
        def run(self, setting, number, **options):
            if (setting, number) == ("paired", 2):
                Path(os.environ["DEATHS"]).open("a").write("x")
                os.kill(os.getpid(), 9)
            return real(self, setting, number, **options)
        Worker.run = run

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        runtime_env={
            "worker_process_setup_hook": poison,
            "env_vars": {"DEATHS": os.environ["DEATHS"]},
        },
    )
    from i2am.cli import main
    sys.exit(main(json.loads(sys.argv[1])))
"""


def test_a_shard_that_kills_its_workers_is_given_up(
    command, start, tmp_path, uninterrupted, digest
):
    pytest.importorskip("ray")
    out, deaths = tmp_path / "run", tmp_path / "deaths"
    arguments = json.dumps(command(out, "--engine=ray", "--workers=1", "--json"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(POISON), arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DEATHS": str(deaths)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 3, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["remaining"] == 1
    assert result["problems"] == ["shard 2 of paired: its worker died 2 times"]
    assert deaths.read_text() == "xx"
    assert committed(out) == SHARDS - 1
    finish(start(out))
    assert digest(out) == uninterrupted
