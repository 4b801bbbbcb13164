"""Who computes which shard: this process, this process's share, or workers that Ray keeps alive."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

from i2am.evaluation.opening import Sources, open_worker
from i2am.evaluation.store import Store
from i2am.evaluation.worker import Done, Worker

log = logging.getLogger("i2am")

Job = tuple[str, int]
"""A setting and the number of a shard of it."""

ATTEMPTS = 2
"""How often Ray starts a shard whose worker dies, before the shard is given up."""

# the variables of torchrun and accelerate, then of Slurm
_RANKS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


class Share(NamedTuple):
    """This process's part of a static split."""

    rank: int
    world: int
    local_rank: int

    def of(self, jobs: list[Job]) -> list[Job]:
        """Every `world`-th job."""
        return jobs[self.rank :: self.world]


@dataclass
class Outcome:
    """What became of the jobs of a run."""

    samples: int = 0
    given_up: dict[Job, str] = field(default_factory=dict)
    """Shards that could not be computed, and why."""


def share_of(environment: Mapping[str, str] = os.environ) -> Share:
    """This process's share, as torchrun, accelerate launch or srun say it; all of it otherwise.

    Raises:
        ValueError: The variables do not go together.
    """
    for rank, world, local in _RANKS:
        if rank in environment and world in environment:
            try:
                share = Share(*(int(environment.get(name, "0")) for name in (rank, world, local)))
            except ValueError:
                share = Share(0, 0, 0)
            if not 0 <= share.rank < share.world:
                raise ValueError(
                    f"{rank} must be a number below {world}, got {environment[rank]!r} and "
                    f"{environment[world]!r}"
                )
            return share
    return Share(0, 1, 0)


def open_jobs(store: Store, *, share: Share, retry_failed: bool = False) -> list[Job]:
    """The shards of a share that are still to be computed, in order.

    Args:
        store: The run.
        share: Which part of all shards; it does not depend on what is committed.
        retry_failed: Whether shards with a failed sample are computed once more.
    """
    every = [
        (setting, number) for setting in store.settings() for number in store.shard_numbers(setting)
    ]
    committed = {
        (setting, number) for setting in store.settings() for number in store.committed(setting)
    }
    if retry_failed:
        committed -= {
            (shard.setting, shard.number)
            for setting in store.settings()
            for shard in store.shards(setting)
            if bool(shard.status.any())
        }
    return [job for job in share.of(every) if job not in committed]


def run_here(worker: Worker, jobs: list[Job], tick: Callable[[int], Any]) -> Outcome:
    """Computes shards one after the other.

    Args:
        worker: Computes them.
        jobs: Which.
        tick: Called with the number of samples that were just made.

    Raises:
        OutOfMemory, OSError: As `Worker.run`.
    """
    outcome = Outcome()
    for setting, number in jobs:
        outcome.samples += worker.run(setting, number, tick=tick).samples
    return outcome


def run_on_ray(
    store: Store, sources: Sources, jobs: list[Job], workers: int | None, tick: Callable[[int], Any]
) -> Outcome:
    """Computes shards on actors that each hold the model, on this machine or a Ray cluster.

    The run folder, the model and the data must have the same paths on all machines. Ray starts an
    actor that dies anew and gives it its shard again; one that is lost `ATTEMPTS` times is given
    up, and the others go on.

    Args:
        store: The run.
        sources: Where its model and data are.
        jobs: Which shards.
        workers: How many actors; None takes one per GPU, on CPUs one.
        tick: Called with the number of samples of each committed shard.

    Raises:
        ImportError: Ray is not installed.
        OutOfMemory: A batch does not fit.
    """
    try:
        # without types: its own are not those of its decorators
        ray: Any = import_module("ray")
    except ImportError as error:
        raise ImportError(
            'engine ray needs Ray: install it with pip install "i2am[ray]"'
        ) from error

    cuda = store.plan["settings"]["device"] == "cuda"
    address = os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        # an actor takes one of Ray's CPUs, whatever number of threads the plan gives torch
        own = {} if address else {"num_cpus": max(workers or 1, os.cpu_count() or 1)}
        ray.init(address=address, include_dashboard=False, logging_level=logging.WARNING, **own)
    count = min(
        workers or (int(ray.cluster_resources().get("GPU", 0)) if cuda else 1) or 1, len(jobs)
    )
    remote = ray.remote(
        num_cpus=1, num_gpus=1 if cuda else 0, max_restarts=-1, max_task_retries=ATTEMPTS - 1
    )(_RayWorker)
    log.info("computing on %d Ray workers", count)
    actors = [
        remote.remote(str(store.folder), sources, "cuda" if cuda else "cpu") for _ in range(count)
    ]
    outcome, waiting = Outcome(), list(jobs)
    running: dict[Any, tuple[Any, Job]] = {}
    try:
        free = list(actors)
        while waiting or running:
            while waiting and free:
                actor, job = free.pop(), waiting.pop(0)
                running[actor.run.remote(*job)] = actor, job
            (ready, *_), _ = ray.wait(list(running))
            actor, job = running.pop(ready)
            try:
                done = ray.get(ready)
                outcome.samples += done.samples
                tick(done.samples)
            except ray.exceptions.RayActorError as error:
                reason = f"its worker died {ATTEMPTS} times"
                log.warning("shard %d of %s is given up: %s", job[1], job[0], reason)
                log.debug("%s", error)
                outcome.given_up[job] = reason
            except ray.exceptions.RayTaskError as error:
                # what the worker itself raised, an OutOfMemory for example
                raise error.cause from error
            free.append(actor)
    finally:
        for actor in actors:
            ray.kill(actor)
    return outcome


class _RayWorker:
    """The actor: a worker that was opened where it runs."""

    def __init__(self, folder: str, sources: Sources, device: str) -> None:
        store = Store.open(folder)
        self._worker = open_worker(store, sources, device)

    def run(self, setting: str, number: int) -> Done:
        return self._worker.run(setting, number)
